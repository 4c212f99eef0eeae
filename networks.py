"""A name and weights in, a PyTorch network in eval mode out.

The network is torchvision's or your own; its weights are torchvision's, a checkpoint file's, those
that your function returns it with, or random.

torch takes seconds to import, so functions import it where they need it: a mistyped option is
reported at once, and a network that was converted before needs no torch at all.
"""

import argparse
import contextlib
import http.client
import importlib.util
import os
import pathlib
import re
import socket
import sys
import traceback
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common import (
    RANDOM,
    SEED,
    Preprocessing,
    RequestError,
    get_digest,
    read_config,
)
from default_preprocess_config import pytorch_resize_input_blob

DOWNLOAD_TIMEOUT = 30  # seconds without a byte

# torchvision's weights for these two expect pictures that aren't normalized as ImageNet's are, and
# transform_input converts them; torchvision sets it only when it loads the weights itself. The
# auxiliary heads are for training.
BUILD_OPTIONS = {
    name: {"transform_input": True, "aux_logits": False, "init_weights": False}
    for name in ("googlenet", "inception_v3")
}
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")

# Types that a checkpoint may hold beside tensors: they are data and run nothing.
INERT_TYPES = [
    argparse.Namespace,
    pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath,
    np.dtype,
    np._core.multiarray.scalar,
    *(type(np.dtype(code)) for code in "?bhilqBHILQefdU"),
]  # fmt: skip


@dataclass
class Weights:
    """Where a network's weights come from."""

    kind: str  # "torchvision", "file", "random", or "own": as MODULE:FUNCTION returns them
    name: str = ""  # torchvision's, or the file's; "" for torchvision's first
    path: Path | None = None  # the file
    sha256: str = ""  # of the file
    default: bool = False  # whether they are torchvision's first for the network
    key: str = ""  # of the state dict in the file; "" for the first that fits


@dataclass
class Network:
    """A classifier in PyTorch: float32 (batch, 3, height, width) to logits (batch, classes)."""

    name: str  # torchvision's, or "module:function"
    weights: Weights
    preprocessing: Preprocessing
    model: object = None  # torch.nn.Module in eval mode; None if it was converted before
    assumed: bool = False  # whether nobody says how it wants its pictures


def load_network(name, weights, frame_size=None, or_random=True):
    """The Network `name`, of torchvision's or "module:function", with its Weights loaded.

    frame_size: width and height of its pictures, px; None for its own. Without torchvision's
    weights and without a network connection it gets random weights, and stderr says so; with
    or_random=False, or for any other reason, RequestError is raised.
    """
    announce_torch()
    import torch

    if weights.kind == "torchvision":
        weights = find_torchvision_weights(name, weights, or_random)
    preprocessing = None if is_own(name) else get_preprocessing(name, weights)
    size = frame_size or (preprocessing or Preprocessing()).width
    if weights.kind == "random":
        torch.manual_seed(SEED)
        model = build_network(name, size).eval()  # useless until `calibrate`, below
    elif weights.kind == "own":
        print(f"{name}: using the weights the function returns it with")
        model = build_network(name).eval()
    else:
        if weights.kind == "file" and name in BUILD_OPTIONS:
            print(
                f"NOTE: {weights.path}: assuming a network with transform_input=True, like "
                "torchvision's trained ones; the file doesn't say. If yours was trained without "
                "it, give --model_name MODULE:FUNCTION",
                file=sys.stderr,
            )
        model = load_weights(name, weights.path, size, weights.key)
    preprocessing = preprocessing or get_own_preprocessing(name, model)
    assumed = preprocessing is None
    preprocessing = preprocessing or Preprocessing(**read_config(pytorch_resize_input_blob))
    if weights.kind == "random":
        scaled = scale_frame(preprocessing, frame_size)
        calibrate(model, scaled.width, scaled.height)
    return Network(name, weights, preprocessing, model, assumed)


def announce_torch():
    """Say that torch is imported next, which takes seconds."""
    if "torch" not in sys.modules:
        print("loading PyTorch ...", flush=True)


def is_own(name):
    """Whether the name is the user's "module:function"."""
    return ":" in name


# --- which weights --------------------------------------------------------------------------------


def parse_weights(name, text, key=None):
    """The Weights that --weights (None: the default ones) and --weights_key ask for."""
    if key and not (text and Path(text).is_file()):
        raise RequestError("--weights_key needs --weights FILE: it names a state dict in a file")
    if text and text.lower() == RANDOM:
        return Weights("random", RANDOM)
    if text and Path(text).is_file():
        digest = get_digest(text, "sha256")
        return Weights("file", Path(text).name, Path(text), digest, key=key or "")
    if not is_own(name):
        return Weights("torchvision", (text or "").upper(), default=not text)
    if text:
        raise RequestError(f"--weights {text}: no such file")
    return Weights("own", name)


def find_torchvision_weights(name, weights, or_random):
    """`weights` with the file, downloaded if need be; random ones if that fails."""
    known = get_torchvision_weights(name)
    weights_name = weights.name or next(iter(known))
    if weights_name not in known:
        raise RequestError(
            f"--weights {weights.name}: not a file, and not weights of {name}, which are "
            f"{', '.join(known)}; or '{RANDOM}'"
        )
    entry = known[weights_name]
    path = checkpoints_dir() / os.path.basename(entry.url)
    try:
        if not path.is_file():
            download(entry.url, path)
    except RequestError as error:
        reason = f"{name}'s weights can't be downloaded: {error}"
        if not or_random:
            raise RequestError(
                f"{reason}: put {path.name} into {path.parent}, or give --weights FILE, or "
                f"--weights {RANDOM}"
            ) from None
        print(
            f"WARNING: {reason}: continuing with RANDOM WEIGHTS, which prove the conversion just "
            "as well, but give meaningless answers",
            file=sys.stderr,
            flush=True,
        )
        return Weights("random", RANDOM)
    sha256 = get_digest(path, "sha256")
    if not sha256.startswith(get_hash_prefix(path)):
        raise RequestError(
            f"{path}: not the file that torchvision offers under this name: delete it to download "
            "it again, or rename it and give it with --weights"
        )
    default = entry == next(iter(known.values()))
    return Weights("torchvision", entry.name, path, sha256, default)


def get_hash_prefix(path):
    """The start of the SHA-256 that torchvision's file names end in: resnet50-0676ba61.pth"""
    return path.stem.rpartition("-")[2]


def get_torchvision_weights(name):
    """{name: torchvision's weights} of one of its networks; the first are the default."""
    from torchvision import models

    return models.get_model_weights(name).__members__


def checkpoints_dir():
    """Where torchvision keeps downloaded weights: torch.hub.get_dir(), without torch."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(home).expanduser() / "hub" / "checkpoints"


def download(url, path):
    """Fetch torchvision's weights; RequestError if that fails, and then no file is left."""
    import torch

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub has no time limit
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix, progress = get_hash_prefix(path), sys.stderr.isatty()
        torch.hub.download_url_to_file(url, str(path), prefix, progress)
    # RuntimeError: the hash doesn't fit; HTTPException: the answer isn't HTTP
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise RequestError(f"{path.name}: {getattr(error, 'reason', error)}") from None
    finally:
        socket.setdefaulttimeout(before)


# --- preprocessing --------------------------------------------------------------------------------


def get_transforms(name, weights):
    """torchvision's transforms of these weights; of the network's first for all others."""
    known = get_torchvision_weights(name)
    return known.get(weights.name, next(iter(known.values()))).transforms()


def get_preprocessing(name, weights):
    """The tutorial's Preprocessing with the sizes, mean and std that torchvision gives."""
    transforms = get_transforms(name, weights)
    (crop,), (resize,) = transforms.crop_size, transforms.resize_size
    return adapt_preprocessing(transforms.mean, transforms.std, crop, crop, resize / crop)


def adapt_preprocessing(mean, std, width, height, resize):
    """The tutorial's Preprocessing for another size, px, and other normalization.

    mean, std: for pixels from 0 to 1. resize: the size before the crop, over the size after it.
    """
    return Preprocessing(
        **read_config(pytorch_resize_input_blob)
        | {
            "mean": tuple(float(f"{255 * value:g}") for value in mean),
            "std": tuple(std),
            "width": width,
            "height": height,
            "initial_width": int(width * resize + 1e-6),
            "initial_height": int(height * resize + 1e-6),
        }
    )


def get_own_preprocessing(name, model):
    """The Preprocessing that a timm network carries; None for others.

    timm's pretrained_cfg has input_size (3, height, width), mean and std for pixels from 0 to 1,
    and crop_pct, the part of the resized picture that is kept:
    https://huggingface.co/docs/timm/reference/data
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, dict) or not {"input_size", "mean", "std"} <= config.keys():
        return None
    height, width = config["input_size"][1:]
    part = config.get("crop_pct") or 1
    print(f"{name}: preprocessing from the network's pretrained_cfg")
    if config.get("interpolation", "bilinear") != "bilinear":
        print(f"{name}: wants {config['interpolation']} resizing; OpenCV resizes bilinearly")
    return adapt_preprocessing(config["mean"], config["std"], width, height, 1 / part)


def scale_frame(preprocessing, frame_size):
    """The same preprocessing for pictures of another width and height, px; None: as it is."""
    if frame_size is None:
        return preprocessing
    p = preprocessing
    return replace(
        p,
        width=frame_size,
        height=frame_size,
        initial_width=p.initial_width * frame_size // p.width,
        initial_height=p.initial_height * frame_size // p.height,
    )


# --- building -------------------------------------------------------------------------------------


def build_network(name, frame_size=224, **options):
    """The network before any weights are loaded; options: torchvision's, num_classes."""
    if is_own(name):
        return build_own_network(name)
    from torchvision import models

    options |= BUILD_OPTIONS.get(name, {})
    if name.startswith("vit_"):  # it has a parameter for each patch of the picture
        options["image_size"] = frame_size
    try:
        return models.get_model(name, **options)
    except AssertionError as error:
        raise RequestError(
            f"{name} can't be made for {frame_size}x{frame_size} pictures: {error}"
        ) from None


def build_own_network(name):
    """The nn.Module that "module:function" names, from a file in this folder or a package.

    Raises RequestError, with file and line, for whatever that code raises.
    """
    import torch

    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
        if not hasattr(module, function_name):
            raise RequestError(f"--model_name {name}: {module.__file__} has no {function_name}")
        model = getattr(module, function_name)
        if not isinstance(model, torch.nn.Module):
            model = model()
        if isinstance(model, torch.nn.Module):
            model = model.cpu().float()
    except RequestError:
        raise
    except (Exception, SystemExit) as error:
        raise RequestError(f"--model_name {name}: {describe_exception(error)}") from None
    if not isinstance(model, torch.nn.Module):
        raise RequestError(
            f"--model_name {name}: returns {type(model).__name__}, not a torch.nn.Module"
        )
    return model


def describe_exception(error):
    """Its type and text, with the file and line of the user's code that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    known = os.path.exists(place.filename) and place.filename != __file__
    where = f" ({place.filename}, line {place.lineno})" if known else ""
    return f"{type(error).__name__}: {error}{where}"


def build_empty_network(name, frame_size=224, **options):
    """One of torchvision's networks, to be filled with weights."""
    import torch

    # On "meta" nothing is initialized, which takes longer than reading the weights. RegNet
    # computes its widths with tensors and can't be built there (torchvision 0.29).
    try:
        with torch.device("meta"):
            return build_network(name, frame_size, **options)
    except NotImplementedError:
        return build_network(name, frame_size, **options)


def calibrate(model, width, height):
    """Change random weights so that a wrong conversion shows; pictures are width x height px.

    Parameters that start as one constant are perturbed: with a head of zeros, as torchvision's ViT
    has it, any two networks agree, and layer scales of 1e-6 or biases of 0 hide errors behind
    them. And BatchNorm gets the variances of a seeded batch, layer by layer; without them a deep
    network's logits are the same for all pictures, or grow without bound.
    """
    import torch

    # from smooth to noisy, and from dark to bright, as verify.py's are
    size = (height, width)
    smooth = torch.nn.functional.interpolate(torch.randn(8, 3, 6, 6), size, mode="bilinear")
    step = torch.linspace(0, 1, 8).reshape(8, 1, 1, 1)
    batch = smooth + step * torch.randn(8, 3, *size) + 4 * step - 2

    def set_statistics(batch_norm, inputs):
        # The batch's variance, but a twentieth of its mean: a deep random network that subtracts
        # the whole mean amplifies rounding errors (resnet152: to 2e-4), and errors show no better.
        # Channels that hardly change aren't amplified either: if they are, ConvMixer's logits grow
        # to a million, and PyTorch's float32 is 6e-3 from its own float64 (now 1e-6).
        axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
        variance = inputs[0].var(axes)
        batch_norm.running_mean = 0.05 * inputs[0].mean(axes)
        batch_norm.running_var = variance.clamp(min=variance.mean())

    hooks = [
        module.register_forward_pre_hook(set_statistics)
        for module in model.modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            if (parameter == parameter.flatten()[0]).all():
                parameter += 0.02 * torch.randn_like(parameter)
    if hooks:
        run_pytorch(model, batch.numpy())
    for hook in hooks:
        hook.remove()


# --- checkpoints ----------------------------------------------------------------------------------


def load_weights(name, path, frame_size=224, weights_key=""):
    """The network with the weights of a checkpoint file, in eval mode.

    The head of torchvision's networks is sized by the file. Raises RequestError if the file is
    damaged, holds no state dict, or another network's.
    """
    import torch

    own = is_own(name)
    model = build_network(name) if own else build_empty_network(name)
    state = find_state_dict(read_checkpoint(path), model.state_dict().keys(), path, weights_key)
    if not own:
        model = build_empty_network(name, frame_size, num_classes=get_num_classes(name, state))
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        problem = ", ".join(
            f"{what} key {keys[0]} (and {len(keys) - 1} more)"
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        )
        for key in state if not problem else []:
            if state[key].is_complex() or not torch.isfinite(state[key]).all():
                problem = f"{key} isn't a tensor of finite numbers"
    except Exception as error:  # of shapes, or of tensors that aren't plain numbers
        problem = str(error).strip().split("\n\t")[-1][:200]
    if problem:
        raise RequestError(f"{path}: not the weights of {name}: {problem}")
    return model.float().eval()


def read_checkpoint(path):
    """What torch.load finds in a checkpoint file; RequestError if it isn't one, or may run code."""
    import torch

    if str(path).endswith(".safetensors") and importlib.util.find_spec("safetensors") is None:
        raise RequestError(f"{path}: to read it, pip install safetensors")
    types = []
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(INERT_TYPES):
            warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol
            with contextlib.suppress(Exception):  # not a ZIP file, for instance
                types = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            # weights_only: a pickle can run any code, and a downloaded file is a stranger's
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for files that aren't its own
        reason = "truncated, another format, or more than tensors in it, which could run code"
        if types:
            reason = f"more than tensors in it, {', '.join(sorted(types))[:200]}, could run code"
        raise RequestError(
            f"{path}: can't be read ({type(error).__name__}): {reason}; download it again, save "
            "one with torch.save(model.state_dict(), FILE), or load it yourself in a --model_name "
            "MODULE:FUNCTION"
        ) from None


def find_state_dict(checkpoint, network_keys, path, weights_key=""):
    """The network's state dict in a checkpoint, as an OrderedDict with its metadata.

    It is the first dictionary, the checkpoint itself or one in it, whose keys, less one common
    prefix, are the network's: training scripts wrap state dicts in larger dictionaries, and
    DataParallel, torch.compile and Lightning put "module.", "_orig_mod." and "model." before each
    key. If none fits, the one with most keys in common, for load_state_dict's message. With a
    `weights_key` it is the dictionary of that key.
    """
    import torch

    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    found = []
    for key, state in {"": checkpoint, **checkpoint}.items():
        if weights_key and key != weights_key:
            continue
        if not isinstance(state, dict) or not any(map(torch.is_tensor, state.values())):
            continue
        state, metadata = dict(state), getattr(state, "_metadata", None)
        state.pop("n_averaged", None)  # AveragedModel's counter
        prefix = get_prefix(state, network_keys)
        state = {rename(str(k).removeprefix(prefix)): v for k, v in state.items()}
        state = {
            k: v for k, v in state.items() if k in network_keys or not k.startswith(AUXILIARY_HEADS)
        }
        unknown = [
            k for k in state.keys() ^ set(network_keys) if not k.endswith("num_batches_tracked")
        ]
        found.append((len(unknown), key, state, prefix, metadata))
    if not found:
        keys = f", only {', '.join(map(str, checkpoint))[:200]}" if checkpoint else ""
        what = f"no state dict '{weights_key}'" if weights_key else "no state dict"
        raise RequestError(
            f"{path}: {what} in it{keys}; save one with torch.save(model.state_dict(), FILE)"
        )
    fitting = [f"'{key}'" for unknown, key, *_ in found if not unknown]
    if len(fitting) > 1:
        names = " and ".join(fitting)
        print(f"{path}: weights in {names}: taking {fitting[0]}; --weights_key takes another")
    _, _, state, prefix, metadata = min(found, key=lambda item: item[0])  # the first of equals
    # Modules read older files by the versions in here; MNASNet demands one (2 in torchvision 0.29).
    state = OrderedDict(state)
    state._metadata = {"": {"version": 2}}
    if metadata:
        modules = {f"{module}.": version for module, version in metadata.items()}
        state._metadata = {
            module.removeprefix(prefix).rstrip("."): version
            for module, version in modules.items()
            if module.startswith(prefix)
        }
    return state


def get_prefix(keys, network_keys):
    """The shortest prefix of all `keys` without which the first is the network's; "" if none is."""
    first = str(next(iter(keys), ""))
    lengths = [0, *(dot.end() for dot in re.finditer(r"\.", first))]
    fitting = (first[:n] for n in lengths if rename(first[n:]) in network_keys)
    return next((p for p in fitting if all(str(k).startswith(p) for k in keys)), "")


def rename(key):
    """denselayer1.norm.1.weight -> denselayer1.norm1.weight

    torchvision's DenseNet files still have the names of before PyTorch 0.4; torchvision renames
    them in the same way.
    """
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", str(key))


def get_num_classes(name, state):
    """How many classes the head in a state dict of one of torchvision's networks has.

    The head's weight is the last one whose shape depends on the number of classes.
    """
    few, more = (build_empty_network(name, num_classes=n).state_dict() for n in (2, 3))
    head = [key for key in few if few[key].shape != more[key].shape and few[key].ndim > 1][-1]
    return len(state[head]) if getattr(state.get(head), "ndim", 0) else len(few[head])


# --- running --------------------------------------------------------------------------------------


def run_pytorch(model, blob, memory_format=None):
    """PyTorch's logits, (batch, classes), for a float32 blob (batch, 3, height, width).

    Raises RequestError for whatever the network's code raises, and if it isn't a classifier.
    """
    import torch

    # a copy: a network that changes its input in place would change OpenCV's as well
    batch = torch.from_numpy(blob).clone(memory_format=memory_format or torch.contiguous_format)
    try:
        with torch.no_grad():
            logits = model(batch)
    except (Exception, SystemExit) as error:
        height, width = blob.shape[2:]
        raise RequestError(
            f"the network can't take a {width}x{height} picture: {describe_exception(error)}"
        ) from None
    shape = tuple(logits.shape) if torch.is_tensor(logits) else ()
    if len(shape) != 2 or shape[0] != len(blob) or not shape[1] or logits.dtype != torch.float32:
        raise RequestError(
            f"not a classifier: forward returns {describe_output(logits)}, not a float32 tensor of "
            "shape (batch, classes); give a MODULE:FUNCTION that wraps it in a module whose "
            "forward returns the logits"
        )
    return logits.numpy()


def describe_output(output):
    """What a forward returns: its type, and the shapes of the tensors in it."""
    if hasattr(output, "shape"):
        return f"a {str(output.dtype).removeprefix('torch.')} tensor of shape {tuple(output.shape)}"
    if isinstance(output, (tuple, list)):
        named = enumerate(output)
    else:
        named = (output if isinstance(output, dict) else getattr(output, "__dict__", {})).items()
    shapes = [f"{name} {tuple(value.shape)}" for name, value in named if hasattr(value, "shape")]
    return f"{type(output).__name__}" + (f" with {', '.join(shapes)}"[:200] if shapes else "")
