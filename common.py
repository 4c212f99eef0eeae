"""What the two py_to_py scripts share: weights, conversion to ONNX, and the comparison.

torch and onnx take seconds to import, so the functions here import them where they need them,
and a mistyped option is answered at once.
"""

import hashlib
import http.client
import importlib.metadata
import os
import pickle
import queue
import struct
import sys
import threading
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from classification import RANDOM_SUFFIX, RequestError, one_line, read_onnx, whole_file

# What torch.load raises for a file that isn't one of its own.
NO_WEIGHTS = (
    RuntimeError,
    EOFError,
    OSError,
    pickle.UnpicklingError,
    struct.error,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
)

SCRIPT_DIR = Path(__file__).resolve().parent

DEFAULT_WEIGHTS = "IMAGENET1K_V1"  # what torchvision's pretrained=True meant
RANDOM = "random"
SEED = 0
DOWNLOAD_TIMEOUT = 30  # seconds without a byte

# Read by OpenCV 5.0.0, 4.14 and 4.10 alike, with the same answers.
OPSET_VERSION = 17
INPUT_NAME, OUTPUT_NAME = "input", "output"

# max|a - b| / max|a| over which two networks disagree. Measured for scale: the sixteen networks
# of py_to_py_cls.py stay below 4e-6 in OpenCV 5.0.0 (tests/test_all_models.py).
MAX_RELATIVE_ERROR = 1e-4


class NetworksDisagree(RequestError):
    """OpenCV doesn't give PyTorch's answer."""

    exit_code = 1


def find_bundled(path):
    """`path` beside the scripts where that exists, so that they run from any folder.

    Seen from the scripts' own folder it stays short, since it is printed.
    """
    beside = SCRIPT_DIR / path
    return str(beside) if beside.exists() and Path.cwd() != SCRIPT_DIR else path


# --- weights --------------------------------------------------------------------------------------


def load_network(model_name, weights=DEFAULT_WEIGHTS, or_random=True):
    """(model in eval mode, origin of its weights) for a torchvision classifier.

    weights: one of torchvision's names for this network (IMAGENET1K_V1, DEFAULT ...), a
    state-dict file, or "random". Where named weights can be neither found nor downloaded, the
    origin is RANDOM and stderr says so; with or_random=False, RequestError is raised instead.
    """
    from torchvision import models

    if weights.lower() == RANDOM:
        return get_random_network(model_name), RANDOM
    known = models.get_model_weights(model_name).__members__
    if weights.upper() not in known:
        if not Path(weights).is_file():
            names = ", ".join(known)
            raise RequestError(
                f"--weights {weights}: no file, and no weights of {model_name}, "
                f"which are {names}; or '{RANDOM}'"
            )
        return load_state_dict(model_name, weights), weights
    entry = known[weights.upper()]
    try:
        path = fetch_weights(entry.url)
    except RequestError as error:
        reason = f"{model_name}'s weights can't be downloaded: {error}"
        if not or_random:
            raise RequestError(
                f"{reason}: put {os.path.basename(entry.url)} into {checkpoints_dir()}, "
                f"or give --weights FILE, or --weights {RANDOM}"
            ) from None
        print(f"WARNING: {reason}", file=sys.stderr)
        print(
            "WARNING: going on with RANDOM WEIGHTS: the conversion is proved all the same, "
            "but no answer means anything",
            file=sys.stderr,
            flush=True,
        )
        return get_random_network(model_name), RANDOM
    return load_state_dict(model_name, path), entry.name


def checkpoints_dir():
    """Where torchvision keeps downloaded weights: TORCH_HOME moves it."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def fetch_weights(url):
    """Path of the weights of `url`, from torchvision's cache or downloaded into it."""
    path = checkpoints_dir() / os.path.basename(url)
    if not path.is_file():
        # torchvision's file names end in the start of their SHA-256: resnet50-0676ba61.pth
        download(url, path, sha256_start=path.stem.rpartition("-")[2])
    return path


def download(url, path, sha256_start, timeout=DOWNLOAD_TIMEOUT):
    """Fetch `url` to `path` with a progress bar; a download that breaks off leaves nothing.

    torch.hub's own has no time limit. A thread reads and this one waits for it, because a
    look-up of the host's name and the attempts at its several addresses heed no limit either.
    Raises RequestError, after `timeout` seconds without a byte at the latest.
    """
    received = queue.Queue(maxsize=16)

    def read():
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                received.put(int(response.headers.get("Content-Length", 0)))
                while chunk := response.read1(1 << 18):
                    received.put(chunk)
            received.put(b"")
        except (OSError, http.client.HTTPException, ValueError) as error:
            received.put(error)

    def next_item():
        try:
            item = received.get(timeout=timeout)
        except queue.Empty:
            raise RequestError(f"{path.name}: no byte in {timeout} s") from None
        if isinstance(item, Exception):
            raise RequestError(f"{path.name}: {getattr(item, 'reason', item)}")
        return item

    threading.Thread(target=read, daemon=True).start()
    size = next_item()
    digest = hashlib.sha256()
    with (
        whole_file(path) as part,
        open(part, "wb") as file,
        tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None) as bar,
    ):
        while chunk := next_item():
            file.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
        if not digest.hexdigest().startswith(sha256_start):
            raise RequestError(f"{path.name}: broke off after {file.tell()} of {size} bytes")


def load_state_dict(model_name, path):
    """The network with the weights of a state-dict file, in eval mode.

    Raises RequestError where the file is damaged, no state dict, or another network's.
    """
    import torch
    from torchvision import models

    how = "delete it, or save one with torch.save(model.state_dict(), FILE)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol
            # weights_only: a pickle can run any code, and a downloaded file is a stranger's
            state = torch.load(path, map_location="cpu", weights_only=True)
    except NO_WEIGHTS:
        raise RequestError(
            f"{path}: no weights: cut short, another format, or more in it than tensors; {how}"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and torch.is_tensor(value) and value.device.type == "cpu"
        for key, value in state.items()
    ):
        raise RequestError(f"{path}: no state dict; {how}")
    for key, value in state.items():
        if value.layout != torch.strided or value.is_complex() or not torch.isfinite(value).all():
            raise RequestError(f"{path}: {key} holds something else than finite numbers; {how}")
    # On "meta" nothing is initialised, which takes longer than reading the weights.
    with torch.device("meta"):
        model = models.get_model(model_name, weights=None)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        keys = str(error).split("\n\t")[1][:200]
        raise RequestError(f"{path}: not the weights of {model_name}: {keys}") from None
    return model.float().eval()


def get_random_network(model_name):
    """The network with seeded random weights and calibrated BatchNorm, in eval mode.

    Left with its initial statistics, BatchNorm lets a deep network's outputs shrink to 1e-9 or
    grow to 1e+4, and a comparison of such outputs proves little. So a seeded batch goes through
    in train mode. At the momentum of 0.1 that PyTorch has: a random network that takes the
    statistics of one batch whole amplifies rounding errors (resnet152: to 5e-4), and no fault
    shows more for it.
    """
    import torch
    from torchvision import models

    torch.manual_seed(SEED)
    model = models.get_model(model_name, weights=None)
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        with torch.no_grad():
            model.train()(torch.randn(8, 3, 224, 224))
    return model.eval()


# --- conversion -----------------------------------------------------------------------------------


def get_onnx_path(model_name, origin, models_dir):
    """Where the converted network is kept: all but the default weights are told by the name."""
    if origin == DEFAULT_WEIGHTS:
        name = model_name
    elif origin == RANDOM:
        name = model_name + RANDOM_SUFFIX
    else:
        name = f"{model_name}-{Path(origin).stem}"
        name += "-weights" if name.endswith(RANDOM_SUFFIX) else ""  # a file called random.pth
    return Path(models_dir) / f"{name}.onnx"


def convert(model, origin, onnx_path, sample_blob):
    """Write `model` to `onnx_path`, unless it is there already; only a verified file gets there.

    origin: where its weights are from; the file says it in its metadata.
    sample_blob: float32, (1, 3, height, width), what both networks are compared on, besides
    noise. Raises NetworksDisagree, and then no file is left.
    """
    key = get_conversion_key(model, origin, sample_blob.shape)
    if read_conversion_key(onnx_path) == key:
        print(f"{onnx_path}: converted and verified before, with these weights and versions")
        return
    run_pytorch(model, sample_blob)  # a size that the network can't take is told before the export
    Path(onnx_path).unlink(missing_ok=True)  # of other weights or versions: not this network
    with whole_file(onnx_path) as part:
        export_onnx(model, part, sample_blob.shape)
        write_conversion_key(part, key)
        try:
            net = read_onnx(part)
        except RequestError as error:
            raise NetworksDisagree(error) from None
        verify(model, net, sample_blob)
    print(f"{onnx_path}: converted and verified")


def export_onnx(model, path, blob_shape):
    """Export to ONNX with any batch size. The one place where PyTorch's exporter is called.

    By the TorchScript exporter (dynamo=False), deprecated since PyTorch 2.9: OpenCV 5.0.0 reads
    its graphs right and it is several times faster, while MobileNetV3 from the new exporter is
    silently wrong in OpenCV 5.0.0. Once OpenCV reads that right, the argument can go.
    """
    import torch

    # A failing export prints pages of its graph, because setup_onnx_logging switches that on
    # whether it was on or not (seen with PyTorch 2.14 and 2.15): so the switch is disarmed.
    torch._C._jit_set_onnx_log_enabled = lambda enabled: None
    with warnings.catch_warnings():
        # DeprecationWarning and UserWarning: what the file is worth is verified after this
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model,
                torch.zeros(1, *blob_shape[1:]),
                str(path),
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                dynamic_axes={INPUT_NAME: {0: "batch"}, OUTPUT_NAME: {0: "batch"}},
                opset_version=OPSET_VERSION,
                dynamo=False,
            )
        except RuntimeError as error:
            height, width = blob_shape[2:]
            raise RequestError(
                f"PyTorch can't export the network for {width}x{height} pictures "
                f"({str(error).split('. ')[0][:120]}); try 224x224"
            ) from None


def get_conversion_key(model, origin, blob_shape):
    """What a converted file depends on, as the metadata it carries: {name: text}."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy())
    return {
        "weights": os.path.basename(origin),
        "weights_sha256": digest.hexdigest(),
        "input": "x".join(map(str, blob_shape[1:])),
        "opset": str(OPSET_VERSION),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "verified_with_opencv": cv2.__version__,
    }


def write_conversion_key(path, key):
    import onnx

    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, key)
    onnx.save(proto, path)


def read_conversion_key(path):
    """The metadata of a converted file; {} where there is none, or no whole ONNX file."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return {p.key: p.value for p in onnx.load(path).metadata_props}
    except (FileNotFoundError, DecodeError):
        return {}


# --- the same answer? -----------------------------------------------------------------------------


@dataclass
class Difference:
    """How far two outputs of shape (batch, classes) are apart."""

    l1: float  # mean |a - b|, as the tutorial has it
    l_inf: float  # max |a - b|
    relative: float  # max |a - b| / max |a|
    same_class: int  # pictures for which both name the same class
    pictures: int

    @property
    def agree(self):
        # "not over" would let nan pass
        return self.relative <= MAX_RELATIVE_ERROR and self.same_class == self.pictures

    def __str__(self):
        return (
            f"L1 {self.l1:.2e}, L_inf {self.l_inf:.2e}, relative error {self.relative:.1e}, "
            f"same class {self.same_class} of {self.pictures}"
        )


def compare(reference, output):
    """Difference of OpenCV's `output` to PyTorch's `reference`, both (batch, classes)."""
    if reference.shape != output.shape:
        raise NetworksDisagree(f"PyTorch's output is {reference.shape}, OpenCV's {output.shape}")
    diff = np.abs(reference.astype(np.float64) - output)
    scale = np.abs(reference).max()
    same = (reference.argmax(axis=1) == output.argmax(axis=1)).sum()
    return Difference(
        l1=float(diff.mean()),
        l_inf=float(diff.max()),
        relative=float(diff.max() / scale) if scale > 0 else np.nan,
        same_class=int(same),
        pictures=len(reference),
    )


def run_pytorch(model, blob, memory_format=None):
    """PyTorch's logits, (batch, classes), for a float32 blob (batch, 3, height, width)."""
    import torch

    with torch.inference_mode():
        try:
            batch = torch.from_numpy(blob)
            if memory_format is not None:
                batch = batch.contiguous(memory_format=memory_format)
            return model(batch).numpy()
        except RuntimeError as error:
            height, width = blob.shape[2:]
            raise RequestError(f"the network takes no {width}x{height} picture: {error}") from None


def run_opencv(net, blob):
    """OpenCV's logits, likewise."""
    try:
        net.setInput(blob)
        return net.forward()
    except cv2.error as error:
        raise NetworksDisagree(
            f"OpenCV {cv2.__version__} can't run the network: {one_line(error)}"
        ) from None


def verify(model, net, sample_blob):
    """Compare both networks on the sample and on a seeded batch of two; print how they differ.

    Raises NetworksDisagree over MAX_RELATIVE_ERROR, with the figures, and RequestError where
    PyTorch's outputs are no evidence.
    """
    noise = np.random.default_rng(SEED).standard_normal((2, *sample_blob.shape[1:]))
    for name, blob in {
        "the picture": sample_blob,
        "a batch of 2": noise.astype(np.float32),
    }.items():
        reference = run_pytorch(model, blob)
        if not np.isfinite(reference).all() or np.ptp(reference) == 0:
            raise RequestError(
                f"on {name} PyTorch's own outputs are nan, inf or all alike, and prove nothing: "
                "check the weights and the preprocessing"
            )
        difference = compare(reference, run_opencv(net, blob))
        print(f"PyTorch against OpenCV {cv2.__version__} on {name}: {difference}", flush=True)
        if not difference.agree:
            raise NetworksDisagree(
                f"OpenCV {cv2.__version__} doesn't give PyTorch's answer on {name}: {difference} "
                f"(limit {MAX_RELATIVE_ERROR:g})"
            )
