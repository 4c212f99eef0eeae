"""A name and weights in, a PyTorch network in eval mode out.

The network is torchvision's or your own; its weights are torchvision's, a checkpoint file's, those
that your function returns it with, or random.

torch takes seconds to import, so scripts import this when they have read their options, and not at
all for a network that was converted before.
"""

import contextlib
import difflib
import http.client
import importlib.util
import os
import re
import socket
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from torchvision import models

from checkpoints import find_state_dict, read_checkpoint
from class_names import find_class_names
from classification import RANDOM, TORCHVISION, RequestError, one_line, scale_resize
from common import SCRIPT_DIR, SEED, Preprocessing, Request, get_digest, read_fields
from forward import adapt_own, get_dtype, no_autocast, run_forward, takes_grey
from preprocessing import GREY, run_transform
from transforms import find_in_config, find_transform, is_factory, measure_and_prove

IMAGENET = Preprocessing(**read_fields(TORCHVISION))
DOWNLOAD_TIMEOUT = 30  # seconds without a byte

# torchvision's weights for these two expect pictures that aren't normalized as ImageNet's are, and
# transform_input converts them; torchvision sets it only if it loads the weights itself. The
# auxiliary heads are for training.
BUILD_OPTIONS = {
    name: {"transform_input": True, "aux_logits": False, "init_weights": False}
    for name in ("googlenet", "inception_v3")
}


@dataclass
class Network:
    """A classifier in PyTorch: float32 (batch, 3, height, width) to logits (batch, classes)."""

    request: Request  # as fulfilled: with random weights if the default ones can't be downloaded
    weights: str  # torchvision's name, the file's name, "random", or "own"
    model: object  # torch.nn.Module in eval mode
    preprocessing: Preprocessing
    declared: bool = True  # whether somebody says how it wants its pictures
    transform: object = None  # of PIL pictures, that the preprocessing was measured on
    transform_name: str = ""
    published: dict = field(default_factory=dict)  # {"acc@1": %, ...} of torchvision's weights
    class_names: list = field(default_factory=list)  # that it or its checkpoint carries
    mix: np.ndarray = None  # of a network of grey pictures: preprocessing.Measured's


def load_network(request, or_random=True, test_picture=None):
    """The Network of a Request; test_picture: one more for the proof of the preprocessing.

    If torchvision's weights can't be downloaded it gets random ones, and stderr says so, unless
    or_random=False. Raises RequestError for that, and for whatever else can't be loaded.
    """
    network = Network(request, request.weights.lower(), None, IMAGENET)
    if request.transform:
        network.transform, network.transform_name = load_transform(request.transform)
    if request.is_own:
        load_own(network, test_picture)
    else:
        load_torchvisions(network, test_picture, or_random)
    names = {"id2label": find_in_config(network.model, "id2label")}
    network.class_names = find_class_names(vars(network.model) | names)
    if network.mix is not None:
        add_grey(network)
    own = network.preprocessing
    network.preprocessing = p = scale_frame(own, request.width, request.height)
    if p == own:  # the same file as without the size
        network.request = replace(network.request, width=None, height=None)
    elif request.transform:
        problem = f"--transform makes {own.width}x{own.height} pixels"
        raise RequestError(f"{problem}; leave --frame_size out")
    elif network.transform:
        network.transform = None
        print(f"preprocessing: scaled to {p.width}x{p.height}, so not the transform's any more")
    # before any forward pass: timm's LeViT, for one, keeps what it computes from its weights
    if network.request.is_random:
        calibrate(network.model, p.width, p.height)
    if request.is_own:
        adapt_own(network)
    return network


def load_torchvisions(network, test_picture, or_random):
    """Fill in the Network of a Request for one of torchvision's classifiers."""
    request, known = network.request, get_torchvision_weights(network.request.name)
    default = next(iter(known.values()))
    entry = known.get(request.weights.upper()) if request.weights else default
    if not network.transform:
        network.transform = (entry or default).transforms()
        network.transform_name = "torchvision's transforms"
    measure_and_prove(network, request.size, test_picture)
    build = partial(build_torchvisions, request.name, request.width or network.preprocessing.width)
    if request.is_file:
        network.model, network.weights = load_weights(request, build), Path(request.weights).name
        if request.name in BUILD_OPTIONS:
            note = "assuming it was trained with transform_input=True; if not, give MODULE:FUNCTION"
            print(f"NOTE: {request.weights}: {note}", file=sys.stderr)
    elif entry:
        network.model = download_torchvisions(request.name, build, entry, or_random)
        network.weights, network.published = entry.name, entry.meta["_metrics"]["ImageNet-1K"]
    elif not request.is_random:
        choices = ", ".join([*known, RANDOM])
        raise RequestError(f"--weights {request.weights}: not a file, and not one of {choices}")
    if network.model is None:
        network.request, network.published = replace(request, weights=RANDOM), {}
        network.model, network.weights = build(), RANDOM
    network.model.eval()


def get_torchvision_names():
    """torchvision's classifiers: 80 in 0.29."""
    return models.list_models(module=models)


def get_torchvision_weights(name):
    """{name: torchvision's weights} of one of its networks; the first are the default."""
    if name not in (names := get_torchvision_names()):
        near = " or ".join(difflib.get_close_matches(name, names, n=3) or [*names[:2], "..."])
        hint = f"did you mean {near}? --list_models shows all; MODULE:FUNCTION names your own"
        raise RequestError(f"--model_name: unknown network '{name}'; {hint}")
    return models.get_model_weights(name).__members__


def build_torchvisions(name, size, **options):
    """The network for pictures of `size` px; options: torchvision's, weights or num_classes."""
    torch.manual_seed(SEED)
    if name.startswith("vit_"):  # it has a parameter for each patch of the picture
        options["image_size"] = size
    try:
        return models.get_model(name, **options, **BUILD_OPTIONS.get(name, {}))
    except (AssertionError, ValueError) as error:
        problem = f"{name} can't be made for {size}x{size} pictures: {one_line(error)}"
        raise RequestError(f"{problem}; give another --frame_size") from None


def download_torchvisions(name, build, entry, or_random):
    """The network with torchvision's weights; None if they can't be had and random ones may be."""
    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(entry.url))
    # the name ends in the start of its SHA-256; torch checks that only when it downloads the file
    if path.is_file() and not get_digest(path).startswith(path.stem.rpartition("-")[2]):
        raise RequestError(f"{path}: not the file that torchvision means by this name: delete it")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub has no time limit
    try:
        return build(weights=entry, progress=sys.stderr.isatty())
    # RuntimeError: the hash doesn't fit; HTTPException: the answer isn't HTTP
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = one_line(getattr(error, "reason", error))
    finally:
        socket.setdefaulttimeout(before)
    reason = f"{name}'s weights can't be downloaded: {path.name}: {reason}"
    if not or_random:
        raise RequestError(f"{reason}: put it into {path.parent}, or give --weights {RANDOM}")
    effect = "which prove the conversion just as well, but give meaningless answers"
    print(f"WARNING: {reason}: continuing with RANDOM WEIGHTS, {effect}", file=sys.stderr)
    return None


def load_own(network, test_picture):
    """Fill in the Network of a Request for "module:function"."""
    request, build = network.request, partial(build_own, network.request.name)
    if request.is_file:
        network.model, network.weights = load_weights(request, build), Path(request.weights).name
    elif request.weights and not request.is_random:
        raise RequestError(f"--weights {request.weights}: no such file")
    else:
        network.model, network.weights = build(), RANDOM if request.is_random else "own"
    if network.weights == "own":
        print(f"{request.name}: using the weights the function returns it with")
    if size := find_in_config(network.model, "image_size"):  # or (height, width)
        size = (size, size) if isinstance(size, int) else tuple(size)[::-1]
        network.preprocessing = scale_frame(IMAGENET, *size)
    if not network.transform:
        network.transform, network.transform_name = find_transform(request.name, network.model)
    if network.transform and measure_and_prove(network, request.size or size, test_picture):
        return
    network.declared, network.transform, p = False, None, network.preprocessing
    if takes_grey(network.model, p.width, p.height):
        network.mix = np.append(GREY, 0)[None]


def load_transform(name):
    """(The user's transform that "module:name" names, the name)."""
    with your_code("--transform", name) as found:
        return found() if is_factory(found) else found, name


def add_grey(network):
    """Put the 1x1 convolution `mix`, which makes grey of RGB, before a network, and say so."""
    theirs, model, mix = network.transform, network.model, np.float32(network.mix)
    convolution = torch.nn.Conv2d(3, len(mix), 1).requires_grad_(False)
    convolution.weight.copy_(torch.from_numpy(mix[:, :3, None, None]))
    convolution.bias.copy_(torch.from_numpy(mix[:, 3]))
    network.model = torch.nn.Sequential(convolution.to(get_dtype(model)), model).eval()
    print(f"{network.request.name}: takes grey pictures: a 1x1 convolution makes them of RGB ones")
    if theirs:
        network.transform = lambda picture: np.repeat(
            (run_transform(theirs, picture)[:1] - mix[0, 3]) / mix[0, :3].sum(), 3, axis=0
        )


def build_own(name):
    """The nn.Module that "module:function" names, in eval mode; RequestError if it gives none.

    What that code raises keeps its traceback.
    """
    torch.manual_seed(SEED)
    with your_code("--model_name", name) as model:
        if not isinstance(model, torch.nn.Module):
            model = model()
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    if not isinstance(model, torch.nn.Module):
        raise RequestError(f"--model_name {name}: returns {type(model).__name__}, not an nn.Module")
    while isinstance(model, torch.nn.DataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, torch.nn.DataParallel) else model._orig_mod
    check_float(f"--model_name {name}", model.state_dict())
    try:
        return model.cpu().eval()
    except NotImplementedError:  # a torch.export program's, which has no modes
        program, model = model, torch.nn.Module()
        model.forward = lambda batch: program(batch)
        return model.eval()


@contextlib.contextmanager
def your_code(option, name):
    """Yield what "module:name", given as `option`, names in this folder or a package.

    Your code sees the files of this folder before ours, and not our command line.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise RequestError(f"{option} {name}: '{module_name}' isn't the name of a module")
    files = {key: getattr(module, "__file__", None) for key, module in sys.modules.items()}
    ours = [key for key, file in files.items() if file and Path(file).parent == SCRIPT_DIR]
    hidden = {key: sys.modules.pop(key) for key in ours if key != "__main__"}
    path, argv = list(sys.path), sys.argv
    sys.path.insert(0, os.getcwd())
    sys.argv = argv[:1]
    try:
        module = importlib.import_module(module_name)
        if not hasattr(module, attribute):
            raise RequestError(f"{option} {name}: {module.__file__} has no {attribute}")
        yield getattr(module, attribute)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0]:
            raise
        raise RequestError(f"{option} {name}: {error} in this folder") from None
    except SystemExit as error:
        hint = 'put what a script runs under `if __name__ == "__main__":`'
        raise RequestError(f"{option} {name}: exits (SystemExit: {error}); {hint}") from None
    finally:
        for stem in {file.stem for file in SCRIPT_DIR.glob("*.py")} - files.keys():
            sys.modules.pop(stem, None)  # yours, called like one of ours
        sys.modules.update(hidden)
        sys.path[:] = [*path, os.getcwd()]  # for what your code imports later
        sys.argv = argv


def scale_frame(preprocessing, width, height):
    """The same preprocessing for pictures of another width and height, px; None: as it is."""
    p = preprocessing
    before, after = (p.width, p.height), (width or p.width, height or p.height)
    resize = tuple(scale_resize(p.resize, before, after))
    return replace(p, width=after[0], height=after[1], resize=resize)


def calibrate(model, width, height):
    """Change random weights so that a wrong conversion shows; pictures are width x height px.

    Parameters that start as one constant are perturbed: with a head of zeros, as torchvision's ViT
    has it, any two networks agree, and layer scales of 1e-6 or biases of 0 hide errors behind
    them. And BatchNorm gets the variances of a seeded batch, layer by layer; without them a deep
    network's logits are the same for all pictures, or grow without bound.
    """
    # from smooth to noisy, and from dark to bright, as verify.py's are
    size = (height, width)
    smooth = torch.nn.functional.interpolate(torch.randn(8, 3, 6, 6), size, mode="bilinear")
    step = torch.linspace(0, 1, 8).reshape(8, 1, 1, 1)
    batch = smooth + step * torch.randn(8, 3, *size) + 4 * step - 2

    def set_statistics(batch_norm, inputs):
        # A twentieth of the batch's mean: a deep random network that subtracts the whole mean
        # amplifies rounding errors (resnet152: to 2e-4). Channels that hardly change aren't
        # amplified: if they are, PyTorch's float32 is 6e-3 from its float64 (ConvMixer; now 1e-6).
        axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
        variance = inputs[0].var(axes)
        batch_norm.running_mean = 0.05 * inputs[0].mean(axes)
        batch_norm.running_var = variance.clamp(min=variance.mean())

    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(set_statistics) for norm in norms]
    with torch.no_grad():
        for parameter in model.parameters():
            if (parameter == parameter.flatten()[0]).all():
                parameter += 0.02 * torch.randn_like(parameter)
    if hooks:
        with no_autocast():
            run_forward(model, batch.to(get_dtype(model)))
    for hook in hooks:
        hook.remove()


def load_weights(request, build):
    """The network of build(), with the weights of a checkpoint file.

    The head of torchvision's networks is sized by the file: build(num_classes=...). Raises
    RequestError if the file is damaged, holds no state dict, or another network's.
    """
    path, model, checkpoint = request.weights, build().float(), read_checkpoint(request.weights)
    wanted = model.state_dict()
    check_float(path, checkpoint)
    state = find_state_dict(checkpoint, wanted, path, request.weights_key)
    # the head is the last parameter of two or more dimensions, in all of torchvision's networks
    head = [key for key, parameter in model.named_parameters() if parameter.ndim > 1][-1]
    shape = getattr(state.get(head), "shape", ())
    if not request.is_own and len(shape) > 1 and shape[0] != len(wanted[head]):
        model = build(num_classes=shape[0])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = one_line(error).partition(": ")[2][:200]
        hint = "if you changed its head or stem, give --model_name MODULE:FUNCTION --weights FILE"
        if re.search(r"size mismatch for \S*pos", reason):  # a position embedding
            hint = "if it was trained with pictures of another size, give --frame_size"
        raise RequestError(f"{path}: not the weights of {request.name}: {reason}; {hint}") from None
    for key, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise RequestError(f"{path}: {key} isn't a tensor of finite numbers")
    model.class_names = find_class_names(checkpoint)
    return model.eval()


def check_float(source, values):
    """Raise RequestError if there is a quantized tensor in a state dict, or in what holds one."""
    if any(getattr(value, "is_quantized", False) for value in tree_leaves(values)):
        raise RequestError(f"{source}: its weights are quantized: convert the float network")
