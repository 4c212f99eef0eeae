"""What the two py_to_py scripts share: networks and their weights, and the conversion to ONNX.

torch and onnx take seconds to import, so the functions here import them where they need them,
and a mistyped option is answered at once.
"""

import contextlib
import hashlib
import http.client
import importlib
import importlib.metadata
import os
import pickle
import queue
import re
import shutil
import struct
import sys
import tempfile
import threading
import traceback
import urllib.request
import warnings
from collections import OrderedDict
from pathlib import Path

import cv2
from tqdm import tqdm

import classification
from classification import RANDOM_SUFFIX, RequestError, whole_file
from verify import SEED, NetworksDisagree, failing_network, get_references, verify

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

RANDOM = "random"
DOWNLOAD_TIMEOUT = 30  # seconds without a byte

# torchvision's weights of these two expect pictures normalised otherwise than ImageNet's are, and
# transform_input sees to it; torchvision sets it by itself only where it loads the weights. The
# auxiliary heads serve training alone.
BUILD_OPTIONS = {
    name: {"transform_input": True, "aux_logits": False, "init_weights": False}
    for name in ("googlenet", "inception_v3")
}
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")

# How a training script may have packed a state dict: under a key of a larger dictionary, and with
# its keys prefixed by DataParallel and by torch.compile.
WRAPPER_KEYS = ("state_dict", "model", "model_state_dict")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")

PLAIN_TYPES = (
    "float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64"
)  # fmt: skip

# Read by OpenCV 5.0.0, 4.14 and 4.10 alike, with the same answers.
OPSET_VERSION = 17
MAX_ONNX_SIZE = 2**31 - 2**20  # bytes of weights, with room for the graph
INPUT_NAME, OUTPUT_NAME = "input", "output"


def find_bundled(path):
    """`path` beside the scripts where that exists, so that they run from any folder.

    Seen from the scripts' own folder it stays short, since it is printed.
    """
    beside = SCRIPT_DIR / path
    return str(beside) if beside.exists() and Path.cwd() != SCRIPT_DIR else path


# --- networks and their weights -------------------------------------------------------------------


def load_network(model_name, weights=None, or_random=True, frame_size=224):
    """(model in eval mode, origin of its weights).

    model_name: one of torchvision's classifiers, or "module:function" for a network of one's own.
    weights: one of torchvision's names for this network (IMAGENET1K_V1, DEFAULT ...), a checkpoint
    file, or "random"; None for the first of torchvision's, or as the function returns it. Where
    named weights can be neither found nor downloaded, the origin is RANDOM and stderr says so;
    with or_random=False, RequestError is raised instead.
    """
    if weights and weights.lower() == RANDOM:
        return get_random_network(model_name, frame_size), RANDOM
    if is_own(model_name):
        if weights is None:
            print(f"{model_name}: with the weights that it has when it is returned")
            return build_network(model_name).eval(), model_name
        path = find_weights_file(weights, "no such file")
        return load_weights(model_name, path, frame_size), weights
    known = get_weights(model_name)
    name = (weights or next(iter(known))).upper()
    if name not in known:
        names = ", ".join(known)
        reason = f"no file, and no weights of {model_name}, which are {names}; or '{RANDOM}'"
        path = find_weights_file(weights, reason)
        if model_name in BUILD_OPTIONS:
            print(
                f"NOTE: {path}: taken for a network with transform_input=True, as torchvision's "
                "trained ones are; the file doesn't say. For one without, --model_name MODULE:"
                "FUNCTION",
                file=sys.stderr,
            )
        return load_weights(model_name, path, frame_size), weights
    entry = known[name]
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
        return get_random_network(model_name, frame_size), RANDOM
    return load_weights(model_name, path, frame_size), entry.name


def is_own(model_name):
    """Whether the name is a "module:function" of the user's."""
    return ":" in model_name


def get_weights(model_name):
    """{name: torchvision's weights} of one of its networks; the first are the default."""
    from torchvision import models

    return models.get_model_weights(model_name).__members__


def find_weights_file(path, reason):
    if not Path(path).is_file():
        raise RequestError(f"--weights {path}: {reason}")
    return path


def build_network(model_name, frame_size=224, **options):
    """The network as it is before any weights are loaded; options: torchvision's, num_classes."""
    if is_own(model_name):
        return build_own_network(model_name)
    from torchvision import models

    options |= BUILD_OPTIONS.get(model_name, {})
    if model_name.startswith("vit_"):  # which has a parameter for each place in the picture
        options["image_size"] = frame_size
    try:
        return models.get_model(model_name, **options)
    except AssertionError as error:
        raise RequestError(
            f"{model_name} can't be made for {frame_size}x{frame_size} pictures: {error}"
        ) from None


def build_own_network(model_name):
    """The nn.Module that "module:function" names, from a file in this folder or a package.

    Raises RequestError, with the place, for whatever that code raises.
    """
    import torch

    module_name, _, function_name = model_name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
        if not hasattr(module, function_name):
            raise RequestError(
                f"--model_name {model_name}: {module.__file__} has no {function_name}"
            )
        model = getattr(module, function_name)
        if not isinstance(model, torch.nn.Module):
            model = model()
        if isinstance(model, torch.nn.Module):
            model = model.cpu().float()
    except RequestError:
        raise
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        known = os.path.exists(place.filename) and place.filename != __file__
        where = f" ({place.filename}, line {place.lineno})" if known else ""
        raise RequestError(
            f"--model_name {model_name}: {type(error).__name__}: {error}{where}"
        ) from None
    if not isinstance(model, torch.nn.Module):
        raise RequestError(
            f"--model_name {model_name}: returns {type(model).__name__}, not a torch.nn.Module"
        )
    if not all(is_plain(value) for value in model.state_dict().values()):
        raise RequestError(f"--model_name {model_name}: holds more than plain tensors of numbers")
    return model


def is_plain(value):
    """Whether it is a tensor of numbers on the CPU, each with memory of its own."""
    import torch

    return (
        torch.is_tensor(value)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and str(value.dtype).removeprefix("torch.") in PLAIN_TYPES
        and not (value.is_nested or value.is_neg() or value.is_conj())
        and value.nbytes <= value.untyped_storage().nbytes()
    )


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


def load_weights(model_name, path, frame_size=224):
    """The network with the weights of a checkpoint file, in eval mode.

    The head is sized from the file. Raises RequestError where the file is damaged, no state dict,
    or another network's.
    """
    if is_own(model_name):
        model = build_network(model_name)
        state, metadata = read_state_dict(path, model.state_dict())
    else:
        state, metadata = read_state_dict(path)
        state = {
            rename_densenet_key(key): value
            for key, value in state.items()
            if not key.startswith(AUXILIARY_HEADS)
        }
        classes = get_num_classes(model_name, state)
        model = build_empty_network(model_name, frame_size, num_classes=classes)
    # By the versions in here modules read older files; MNASNet demands one (2 in torchvision 0.29).
    state = OrderedDict(state)
    state._metadata = metadata or {"": {"version": 2}}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        problem = ", ".join(
            f"{what} key {keys[0]}" + (f" (and {len(keys) - 1} more)" if len(keys) > 1 else "")
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        )
    except RuntimeError as error:  # of shapes
        problem = str(error).split("\n\t")[1][:200]
    if problem:
        raise RequestError(f"{path}: not the weights of {model_name}: {problem}")
    return model.float().eval()


def build_empty_network(model_name, frame_size=224, **options):
    """One of torchvision's networks, to be filled with weights."""
    import torch

    # On "meta" nothing is initialised, which takes longer than reading the weights. RegNet
    # computes its widths with tensors, and so can't be built there (torchvision 0.29).
    try:
        with torch.device("meta"):
            return build_network(model_name, frame_size, **options)
    except NotImplementedError:
        return build_network(model_name, frame_size, **options)


def rename_densenet_key(key):
    """denselayer1.norm.1.weight -> denselayer1.norm1.weight

    torchvision's files of DenseNet's weights have the names of before PyTorch 0.4, and torchvision
    renames them so.
    """
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)


def read_state_dict(path, own_keys=()):
    """({name: tensor}, its metadata or None) of a checkpoint file, without what wrapped it.

    own_keys: the network's, whose beginning is no wrapper's prefix.
    """
    import torch

    how = "download it again, or save one with torch.save(model.state_dict(), FILE)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol
            # weights_only: a pickle can run any code, and a downloaded file is a stranger's
            state = torch.load(path, map_location="cpu", weights_only=True)
    except NO_WEIGHTS:
        raise RequestError(
            f"{path}: no weights: cut short, another format, or more in it than tensors (a whole "
            f"model, say), which could run code; {how}"
        ) from None
    if isinstance(state, dict):
        state = next((state[k] for k in WRAPPER_KEYS if isinstance(state.get(k), dict)), state)
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items())
    ):
        raise RequestError(f"{path}: no state dict; {how}")
    for key, value in state.items():
        if not is_plain(value) or not torch.isfinite(value).all():
            raise RequestError(f"{path}: {key} holds something else than finite numbers; {how}")
    metadata = getattr(state, "_metadata", None)  # {module: {"version": its version}}
    for prefix in WRAPPER_PREFIXES * 2:  # in either order
        own = any(key.startswith(prefix) for key in own_keys)
        if not own and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            metadata = metadata and {
                f"{module}.".removeprefix(prefix).rstrip("."): version
                for module, version in metadata.items()
                if f"{module}.".startswith(prefix)
            }
    return state, metadata


def get_num_classes(model_name, state):
    """How many classes the head in a state dict of one of torchvision's networks has.

    The head's weight is the last one whose shape depends on the number of classes.
    """
    few, more = (build_empty_network(model_name, num_classes=n).state_dict() for n in (2, 3))
    head = [key for key in few if few[key].shape != more[key].shape and few[key].ndim > 1][-1]
    return len(state[head]) if head in state and state[head].ndim else len(few[head])


def get_random_network(model_name, frame_size):
    """The network with seeded random weights, in eval mode, made so that a wrong conversion shows.

    Parameters that start as one constant are shaken: with a head of zeros, as torchvision's ViT
    has it, any two networks agree, and layer scales of 1e-6 or biases of 0 hide what is wrong
    behind them. And BatchNorm gets the variances of a seeded batch, layer by layer; without
    them a deep network's logits are the same for all pictures, or grow without bound.
    """
    import torch

    torch.manual_seed(SEED)
    model = build_network(model_name, frame_size).eval()
    # from smooth to noisy, as pictures are; the noise that verify.py compares on is among them
    size = (frame_size, frame_size)
    smooth = torch.nn.functional.interpolate(torch.randn(8, 3, 6, 6), size, mode="bilinear")
    batch = smooth + torch.linspace(0, 1, 8).reshape(8, 1, 1, 1) * torch.randn(8, 3, *size)

    def calibrate(batch_norm, inputs):
        # The batch's variance, but a twentieth of its mean: a deep random network that subtracts
        # the mean amplifies rounding errors (resnet152: to 2e-4), and faults show no better.
        axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
        batch_norm.running_mean = 0.05 * inputs[0].mean(axes)
        batch_norm.running_var = inputs[0].var(axes)

    hooks = [
        module.register_forward_pre_hook(calibrate)
        for module in model.modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            if (parameter == parameter.flatten()[0]).all():
                parameter += 0.02 * torch.randn_like(parameter)
        if hooks:
            with failing_network(batch.shape):
                model(batch)
    for hook in hooks:
        hook.remove()
    return model


# --- conversion -----------------------------------------------------------------------------------


def get_onnx_path(model_name, origin, models_dir):
    """Where the converted network is kept: all but the default weights are told by the name."""
    name = get_alias(model_name)
    if origin == RANDOM:
        name += RANDOM_SUFFIX
    elif origin != (model_name if is_own(model_name) else next(iter(get_weights(model_name)))):
        name += f"-{get_alias(Path(origin).stem)}"
    if origin != RANDOM and name.endswith(RANDOM_SUFFIX):  # a file called random.pth
        name += "-weights"
    return Path(models_dir) / f"{name}.onnx"


def get_alias(name):
    """The name as file names and cv2.FileStorage take it: my_module:build -> my_module-build"""
    name = re.sub(r"[^\x00-\x7f]", lambda letter: f"u{ord(letter.group()):x}", name)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
    return name if name[:1].isalpha() or name.startswith("_") else f"_{name}"


def convert(model, origin, onnx_path, sample_blob, use_cached=True):
    """Write `model` to `onnx_path`, unless it is there already; only a verified file gets there.

    origin: where its weights are from; the file says it in its metadata.
    sample_blob: float32, (1, 3, height, width), what both networks are compared on, besides
    noise. use_cached: whether a file of the same weights and versions will do.
    Returns the names of OpenCV's engines that are right with it, the fastest first. Raises
    NetworksDisagree where there is none, and then no file is left.
    """
    onnx_path = Path(onnx_path)
    key = get_conversion_key(model, origin, sample_blob.shape)
    engines = find_verified(onnx_path, key) if use_cached else None
    if engines:
        return engines
    references = get_references(model, sample_blob)
    data_path = onnx_path.with_name(f"{onnx_path.name}.data")
    for path in (onnx_path, data_path):
        path.unlink(missing_ok=True)  # of other weights or versions: not this network
    failures = []
    for export in (export_by_torchscript, export_by_dynamo):
        with folder_beside(onnx_path) as folder:
            part = folder / onnx_path.name
            try:
                export(model, part, sample_blob.shape)
                rewrite(part)
                engines = verify(part, references)
            except RequestError as error:
                failures.append(error)
                continue
            add_metadata(part, key | {"engines": " ".join(engines), "engine": engines[0]})
            for path in (data_path, onnx_path):
                if (folder / path.name).exists():
                    os.replace(folder / path.name, path)
        print(f"{onnx_path}: converted and verified; OpenCV's engine: {engines[0]}")
        return engines
    disagree = any(isinstance(error, NetworksDisagree) for error in failures)
    raise (NetworksDisagree if disagree else RequestError)(" -- ".join(map(str, failures)))


def find_verified(onnx_path, key):
    """The engines of a file that was converted before with this key; None if it wasn't."""
    found = read_metadata(onnx_path)
    if not key.items() <= found.items() or "content" not in found:
        return None
    if found["content"] != hash_content(onnx_path, int(found["content_size"])):
        return None  # changed since
    print(f"{onnx_path}: converted and verified before, with these weights and versions")
    return found["engines"].split()


@contextlib.contextmanager
def folder_beside(path):
    """A temporary folder beside `path`. Raises RequestError where nothing can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
            yield Path(folder)
    except OSError as error:
        raise RequestError(f"{path}: can't be written: {error.strerror or error}") from None


def export_by_torchscript(model, path, blob_shape):
    """Export to ONNX with any batch size, by the exporter that OpenCV's importer grew up with.

    Deprecated since PyTorch 2.9, but several times faster than the new one, and OpenCV 5.0.0
    reads its graphs with fewer rewrites. Raises RequestError where it can't.
    """
    import torch

    # A failing export prints pages of its graph, because setup_onnx_logging switches that on
    # whether it was on or not (seen with PyTorch 2.14 and 2.15): so the switch is disarmed.
    torch._C._jit_set_onnx_log_enabled = lambda enabled: None
    with failing_export("PyTorch's TorchScript exporter", blob_shape):
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


def export_by_dynamo(model, path, blob_shape):
    """The same by PyTorch's new exporter, which knows operators that TorchScript's lacks."""
    import torch

    with failing_export("PyTorch's new exporter", blob_shape):
        torch.onnx.export(
            model,
            (torch.zeros(2, *blob_shape[1:]),),  # a batch of 1 would be taken for a constant
            str(path),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )


@contextlib.contextmanager
def failing_export(exporter, blob_shape):
    """Whatever an exporter raises becomes RequestError; its warnings are of no use to the user.

    What the file is worth is verified afterwards.
    """
    height, width = blob_shape[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            reason = str(error).strip().split("\n")[0].split(". ")[0][:160]
            raise RequestError(
                f"{exporter} can't export the network for {width}x{height} pictures: {reason}"
            ) from None


def rewrite(path):
    """Put the exported graph into the form that OpenCV reads right, over 2 GB in two files.

    protobuf holds no more in one; then the weights go to a file of that name and ".data".
    """
    import onnx

    from onnx_rewrites import make_readable

    proto = onnx.load(path)
    make_readable(proto)
    data = Path(f"{path}.data")
    data.unlink(missing_ok=True)  # the new exporter's own
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) < MAX_ONNX_SIZE:
        onnx.save(proto, path)
    else:
        onnx.save_model(proto, path, save_as_external_data=True, location=data.name)
        shutil.copymode(path, data)


def get_weights_name(origin):
    """What the metadata call the weights: a file called random holds no random ones."""
    name = os.path.basename(origin)
    return f"./{name}" if name == RANDOM != origin else name


def get_conversion_key(model, origin, blob_shape):
    """What a converted file depends on, as the metadata it carries: {name: text}."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy())
    return {
        "weights": get_weights_name(origin),
        "weights_sha256": digest.hexdigest(),
        "input": "x".join(map(str, blob_shape[1:])),
        "opset": str(OPSET_VERSION),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "verified_with_opencv": cv2.__version__,
    }


def add_metadata(path, texts):
    """Add metadata to an ONNX file: protobuf takes what is appended for a part of the message.

    With a hash of what was there before, by which a file that was changed is told.
    """
    import onnx

    size = os.path.getsize(path)
    content = {"content_size": str(size), "content": hash_content(path, size)}
    proto = onnx.ModelProto()
    onnx.helper.set_model_props(proto, texts | content)
    with open(path, "ab") as file:
        file.write(proto.SerializeToString())


def get_content_size(path):
    """The bytes of an ONNX file before its metadata; all of a file without them."""
    return int(read_metadata(path).get("content_size", os.path.getsize(path)))


def hash_content(path, size):
    """SHA-256 of the first `size` bytes of an ONNX file, and of its weights that lie beside it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (chunk := file.read(min(size, 1 << 24))):
            digest.update(chunk)
            size -= len(chunk)
    data = Path(f"{path}.data")
    if data.exists():
        with open(data, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def read_metadata(path):
    """The metadata of a converted file; {} where there is none, or no whole ONNX file."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except (FileNotFoundError, DecodeError):
        return {}
    return {p.key: p.value for p in proto.metadata_props}


# --- the entry in models.yml ----------------------------------------------------------------------


def add_to_zoo(alias, onnx_path, args, classes):
    """Write what classification.py needs to know of a network into models.yml, beside its file.

    In the form of the models.yml of OpenCV's samples, and read and written by cv2.FileStorage.
    args: the options of classification.py that it was verified with; classes: the file of the
    class names, or None; a copy of it goes beside the model, so that the folder can be taken
    elsewhere. Entries of other networks stay. The entry is called `alias`, but random weights
    don't take the name from trained ones; and as the file is called.
    """
    path = onnx_path.parent / classification.ZOO_NAME
    new = {
        "model": onnx_path.name,
        **{name: getattr(args, name) for name in classification.ZOO_OPTIONS},
        "sample": classification.ZOO_SAMPLE,
    }
    if classes:
        new["classes"] = copy_classes(classes, onnx_path)
    new = {key: value for key, value in new.items() if value not in (None, [])}
    with locked(path.parent):
        entries = classification.read_zoo(path) if path.exists() else {}
        if is_trained(entries.get(alias)) and onnx_path.stem.endswith(RANDOM_SUFFIX):
            alias = onnx_path.stem
        old = entries.get(alias)
        text = path.read_text("utf-8") if path.exists() else "%YAML:1.0\n---\n"
        for name in dict.fromkeys((alias, onnx_path.stem)):
            text = replace_entry(text, name, new)
        with whole_file(path) as part:
            part.write_text(text, "utf-8")
            classification.read_zoo(part)
    changed = ""
    if isinstance(old, dict):
        names = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        changed = f" (new in this entry: {', '.join(names)})" if names else ""
    print(f"{path}: python classification.py {alias}{changed}")


def is_trained(entry):
    """Whether an entry is of a network with other than random weights."""
    return isinstance(entry, dict) and not Path(str(entry.get("model"))).stem.endswith(
        RANDOM_SUFFIX
    )


@contextlib.contextmanager
def locked(folder):
    """No other process writes models.yml in the meantime (but on Windows, which has no flock)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def replace_entry(text, name, entry):
    """The text of a models.yml with this entry in place of an older one, or at the end.

    The rest stays as it is: cv2.FileStorage would write other people's values otherwise than it
    has read them.
    """
    storage = cv2.FileStorage(".yml", cv2.FILE_STORAGE_WRITE | cv2.FILE_STORAGE_MEMORY)
    storage.startWriteStruct(name, cv2.FILE_NODE_MAP)
    for key, value in entry.items():
        write_node(storage, key, value)
    storage.endWriteStruct()
    new = storage.releaseAndGetString()
    new = new[new.index(f"{name}:") :]
    # an entry ends where a line begins that is not indented
    old = re.compile(rf"^{re.escape(name)}:.*\n?((?:[ \t].*)?\n)*(?:[ \t].*)?", re.M)
    if old.search(text):
        return old.sub(lambda _: new, text, count=1)
    return text + ("" if text.endswith("\n") else "\n") + new


def copy_classes(classes, onnx_path):
    """Copy the file of the class names to where the model is; return the copy's name."""
    name, content = Path(classes).name, Path(classes).read_bytes()
    target = onnx_path.with_name(name)
    if target.exists() and target.read_bytes() != content:
        target = onnx_path.with_name(f"{onnx_path.stem}_{name}")
    if not target.exists() or target.read_bytes() != content:
        with whole_file(target) as part:
            part.write_bytes(content)
    return target.name


def write_node(storage, name, value):
    """Write a list, number, text or bool."""
    if isinstance(value, list):
        storage.startWriteStruct(name, cv2.FILE_NODE_SEQ + cv2.FILE_NODE_FLOW)
        for item in value:
            write_node(storage, "", item)
        storage.endWriteStruct()
    elif isinstance(value, bool):
        storage.write(name, str(value).lower())  # written without quotes: a bool of YAML
    else:
        storage.write(name, value)
