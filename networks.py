"""A name and weights in, a PyTorch network in eval mode out.

The network is torchvision's or your own; its weights are torchvision's, a checkpoint file's, those
that your function returns it with, or random. Its preprocessing is that of your transform, or of
the one of the library that the network comes from: measured, and proven on the bundled pictures.

torch takes seconds to import, so scripts import this late, and not for a network's second run.
"""

import contextlib
import difflib
import http.client
import importlib.util
import inspect
import os
import re
import socket
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves
from torchvision import models

from checkpoints import find_state_dict, read_checkpoint
from classification import RANDOM, RequestError, one_line, read_picture, scale_resize
from common import SCRIPT_DIR, SEED, Preprocessing, Request, find_bundled, get_digest, read_fields
from default_preprocess_config import PYTORCH_RSZ_HEIGHT, pytorch_resize_input_blob
from forward import adapt_own, get_dtype, no_autocast, run_forward, takes_grey
from preprocessing import GREY, get_parts, measure, read_pil, run_transform
from test_config import CLS_TEST_DATA_DIR

# torchvision resizes the shorter side, the tutorial both
IMAGENET = Preprocessing(
    **read_fields(pytorch_resize_input_blob | {"rsz_width": None, "rsz_height": None}),
    resize=(PYTORCH_RSZ_HEIGHT,),
)
DOWNLOAD_TIMEOUT = 30  # seconds without a byte

# torchvision's weights for these two expect other pictures than ImageNet's, and transform_input
# converts them; torchvision sets it only if it loads the weights. Auxiliary heads are for training.
BUILD_OPTIONS = {
    name: {"transform_input": True, "aux_logits": False, "init_weights": False}
    for name in ("googlenet", "inception_v3")
}

# As training scripts, transformers, ultralytics and ImageFolder call the class names.
CLASS_NAMES = ("class_names", "classes", "id2label", "idx_to_class", "names", "class_to_idx")

# In grey levels, the mean over a picture: transforms of tensors, which round elsewhere, are up to
# 0.31 from Pillow's, Lanczos is 1.4 from bicubic.
MAX_DIFFERENCE = 0.5


@dataclass
class Network:
    """A classifier in PyTorch: float32 (batch, 3, height, width) to logits (batch, classes)."""

    request: Request  # as fulfilled: with random weights if the default ones can't be downloaded
    weights: str = ""  # torchvision's name, the file's name, "random", or "own"
    model: object = None  # torch.nn.Module in eval mode
    preprocessing: Preprocessing = IMAGENET
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
    network, known = Network(request), {}
    if request.is_own:
        build = partial(build_own, request.name)
    else:
        known = get_torchvision_weights(request.name)
        entry = known.get(request.weights.upper(), next(iter(known.values())))
        set_preprocessing(network, request.size, test_picture, entry)
        size = request.width or network.preprocessing.width
        build = partial(build_torchvisions, request.name, size)
    if request.is_file:
        load_weights(network, build)
    elif known and request.weights.upper() in ("", *known):
        download_torchvisions(network, build, entry, or_random)
    elif request.weights and not request.is_random:
        choices = ", ".join([*known, RANDOM])
        raise RequestError(f"--weights {request.weights}: no such file; known names: {choices}")
    else:
        network.model, network.weights = build(), request.weights.lower() or "own"
    if request.is_own:
        prepare_own(network, test_picture)
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
        return models.get_model(name, **options, **BUILD_OPTIONS.get(name, {})).eval()
    except (AssertionError, ValueError) as error:
        problem = f"{name} can't be made for {size}x{size} pictures: {one_line(error)}"
        raise RequestError(f"{problem}; give another --frame_size") from None


def download_torchvisions(network, build, entry, or_random):
    """Give a Network torchvision's weights; random ones if they can't be had, and those may be."""
    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(entry.url))
    # the name ends in the start of its SHA-256; torch checks that only when it downloads the file
    if path.is_file() and not get_digest(path).startswith(path.stem.rpartition("-")[2]):
        raise RequestError(f"{path}: not the file that torchvision means by this name: delete it")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub has no time limit
    try:
        network.model = build(weights=entry, progress=sys.stderr.isatty())
        network.weights, network.published = entry.name, entry.meta["_metrics"]["ImageNet-1K"]
    # RuntimeError: the hash doesn't fit; HTTPException: the answer isn't HTTP
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = one_line(getattr(error, "reason", error))
        reason = f"{network.request.name}'s weights can't be downloaded: {path.name}: {reason}"
        if not or_random:
            hint = f"put it into {path.parent}, or give --weights {RANDOM}"
            raise RequestError(f"{reason}: {hint}") from None
        effect = "which prove the conversion just as well, but give meaningless answers"
        print(f"WARNING: {reason}: continuing with RANDOM WEIGHTS, {effect}", file=sys.stderr)
        network.request = replace(network.request, weights=RANDOM)
        network.model, network.weights = build(), RANDOM
    finally:
        socket.setdefaulttimeout(before)


def prepare_own(network, test_picture):
    """Give the Network of your code its preprocessing; without a transform, ImageNet's."""
    if network.weights == "own":
        print(f"{network.request.name}: using the weights the function returns it with")
    if size := find_in_config(network.model, "image_size"):  # or (height, width)
        size = (size, size) if isinstance(size, int) else tuple(size)[::-1]
        network.preprocessing = scale_frame(IMAGENET, *size)
    set_preprocessing(network, network.request.size or size, test_picture)
    if network.transform is None:
        network.declared, p = False, network.preprocessing
        if takes_grey(network.model, p.width, p.height):
            network.mix = np.append(GREY, 0)[None]


def set_preprocessing(network, size, test_picture, entry=None):
    """Give a Network the preprocessing that its transform is measured to do, and prove it.

    size: (width, height), px, or None, for a transform that doesn't resize; entry: torchvision's
    weights. If get_blob can't do the same, that is a RequestError for the user's transform, and a
    NOTE for a library's: its network is right all the same.
    """
    request, paths = network.request, sorted(Path(find_bundled(CLS_TEST_DATA_DIR)).glob("*.jpg"))
    (theirs, name), mode = find_transform(network, entry), "RGB"
    if theirs is None:
        return

    def transform(picture):
        picture = picture.resize(size, 2) if size else picture  # 2: bilinear
        return theirs(picture.convert(mode))

    try:
        sizes = (64, 48), (50, 70)
        if any(run_transform(theirs, np.zeros((*s, 3), np.uint8)).shape[1:] != s for s in sizes):
            size = None
        elif not size:
            raise ValueError("it doesn't resize, so give the network's size as --frame_size")
        pictures = [np.asarray(read_pil(path)) for path in paths[:3]]
        channels, height, width = run_transform(transform, pictures[0]).shape
        if channels == 3 and request.is_own and takes_grey(network.model, width, height):
            mode = "L"  # as MNIST's pictures are
        measured, _ = measure(transform, pictures)
        network.preprocessing, network.mix = measured.preprocessing, measured.mix
        network.transform, network.transform_name = transform, name
        if test_picture and not any(path.samefile(test_picture) for path in paths):
            paths.append(test_picture)
        how = prove(measured, paths)
        if not measured.preprocessing.rgb:
            how += "; it takes pictures in RGB, and makes BGR of them"
        print(f"preprocessing: the same pixels as {name} {how}")
    except ValueError as problem:
        if request.transform:
            raise RequestError(f"--transform {name}: {problem}") from None
        print(f"NOTE: {name}: {problem}", file=sys.stderr)


def find_transform(network, entry=None):
    """(the transform of PIL pictures that a network comes with, its name), or (None, "")."""
    request, model = network.request, network.model
    if request.transform:
        return load_transform(request.transform), request.transform
    if entry:
        return entry.transforms(), "torchvision's transforms"
    carriers = [m for m in model.modules() if isinstance(getattr(m, "pretrained_cfg", None), dict)]
    folder = find_in_config(model, "_name_or_path")
    try:
        # timm's, or one that contains one; a timm network may have others within it
        if carriers and (carriers[0] is model or len(carriers) == 1):
            from timm.data import create_transform, resolve_model_data_config

            config = resolve_model_data_config(carriers[0])
            size = getattr(getattr(carriers[0], "patch_embed", None), "img_size", None)
            if size:  # of create_model(img_size=160), which resolve_model_data_config ignores
                config["input_size"] = (3, *size)
            return create_transform(**config), "timm's create_transform"
        if folder and (about := Path(folder, "preprocessor_config.json")).is_file():
            from transformers import AutoImageProcessor

            return AutoImageProcessor.from_pretrained(folder), f"the image processor of {about}"
    except Exception as error:  # whatever these libraries raise; ImportError: one isn't installed
        reason = f"its library's transform can't be made: {type(error).__name__}"
        print(f"NOTE: {request.name}: {reason}: {one_line(error)[:150]}", file=sys.stderr)
    return None, ""


def load_transform(name):
    """The user's transform that "module:name" names, or that this makes without arguments."""
    with your_code("--transform", name) as found:
        # an object is a transform even if its __call__ takes any arguments
        if inspect.isclass(found) or inspect.isroutine(found) or isinstance(found, partial):
            try:
                inspect.signature(found).bind()
            except TypeError:  # it needs a picture
                return found
            return found()
        return found


def find_in_config(model, name):
    """What the config of a transformers network, or of one inside a module, has by this name."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return next((value for c in configs if (value := getattr(c, name, None))), None)


def prove(measured, paths):
    """How far get_blob is from the transform on these pictures, from the file on, in words.

    Two parts of each are compared as well, whose sizes tell a centre that is rounded from one that
    is floored. Raises ValueError if the mean difference in one is over MAX_DIFFERENCE.
    """
    found, p = [], measured.preprocessing
    for path in paths:
        picture = read_picture(path)[..., ::-1]
        if not np.array_equal(picture, read_pil(path)):
            print(f"{path}: left out, since Pillow reads other pixels than OpenCV")
            continue
        for part in (picture, *get_parts(picture, p.resize[0], p)):
            difference = measured.compare(part, run_transform(measured.transform, part))
            found.append((float(difference.mean()), float(difference.max()), str(path)))
    mean, _, worst = max(found)
    how = f"mean difference {mean:.3f}, at most {max(d for _, d, _ in found):.0f} grey levels"
    if mean > MAX_DIFFERENCE:
        nearest = f"--resize {' '.join(map(str, p.resize))} --interpolation {p.interpolation}"
        nearest += f" --center {p.center}"
        raise ValueError(f"no options do the same: {how}, in {worst}; the nearest: {nearest}")
    return f"on {len(found) // 3} pictures ({how})"


def add_grey(network):
    """Put the 1x1 convolution `mix`, which makes grey of RGB, before a network, and say so."""
    theirs, model, mix = network.transform, network.model, np.float32(network.mix)
    convolution = torch.nn.Conv2d(3, len(mix), 1).requires_grad_(False)
    convolution.weight.copy_(torch.from_numpy(mix[:, :3, None, None]))
    convolution.bias.copy_(torch.from_numpy(mix[:, 3]))
    network.model = torch.nn.Sequential(convolution.to(get_dtype(model)), model).eval()
    print(f"{network.request.name}: takes grey pictures: a 1x1 convolution makes them of RGB ones")

    def transform(picture):  # to what the convolution takes
        grey = (run_transform(theirs, picture)[:1] - mix[0, 3]) / mix[0, :3].sum()
        return np.repeat(grey, 3, axis=0)

    network.transform = transform if theirs else None


def build_own(name):
    """The nn.Module that "module:function" names or returns, in eval mode."""
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
    for switch in ("train", "eval"):  # a torch.export program's raise NotImplementedError
        vars(model).pop(switch, None)
    return model.cpu().eval()


@contextlib.contextmanager
def your_code(option, name):
    """Yield what "module:name", given as `option`, names in this folder or a package.

    Your code sees the files of this folder before ours, and not our command line.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise RequestError(f"{option} {name}: '{module_name}' isn't the name of a module")
    ours = {file.stem for file in SCRIPT_DIR.glob("*.py")}
    hidden = {stem: sys.modules.pop(stem) for stem in ours & sys.modules.keys()}
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
        for stem in ours & sys.modules.keys():
            del sys.modules[stem]  # yours, called like one of ours
        sys.modules.update(hidden)
        sys.path[:] = [*path, os.getcwd()]  # for what your code imports later
        sys.argv = argv


def scale_frame(p, width, height):
    """The same preprocessing for pictures of another width and height, px; None: as it is."""
    width, height = width or p.width, height or p.height
    resize = scale_resize(p.resize, (p.width, p.height), (width, height))
    return replace(p, width=width, height=height, resize=tuple(resize))


def calibrate(model, width, height):
    """Change random weights so that a wrong conversion shows; pictures are width x height px.

    Parameters that start as one constant are perturbed: with a head of zeros, as torchvision's ViT
    has it, any two networks agree. BatchNorm gets the variances of a seeded batch, layer by layer;
    without them a deep network's logits are the same for all pictures, or grow without bound.
    """
    # from smooth to noisy, and from dark to bright, as verify.py's are
    size = (height, width)
    smooth = torch.nn.functional.interpolate(torch.randn(8, 3, 6, 6), size, mode="bilinear")
    step = torch.linspace(0, 1, 8).reshape(8, 1, 1, 1)
    batch = smooth + step * torch.randn(8, 3, *size) + 4 * step - 2

    def set_statistics(module, inputs):
        if not isinstance(module, _BatchNorm):
            return
        # The whole mean and the variance of channels that hardly change would amplify rounding
        # errors (resnet152: to 2e-4; ConvMixer: to 6e-3), a twentieth and a least variance don't.
        axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
        variance = inputs[0].var(axes)
        module.running_mean = 0.05 * inputs[0].mean(axes)
        module.running_var = variance.clamp(min=variance.mean())

    with torch.no_grad():
        for parameter in model.parameters():
            if (parameter == parameter.flatten()[0]).all():
                parameter += 0.02 * torch.randn_like(parameter)
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        with register_module_forward_pre_hook(set_statistics), no_autocast():
            run_forward(model, batch.to(get_dtype(model)))


def load_weights(network, build):
    """Give a Network the model of build(), with the weights of its request's file.

    The head of torchvision's networks is sized by the file: build(num_classes=...). Raises
    RequestError if the file is damaged, holds no state dict, or another network's.
    """
    request, path = network.request, network.request.weights
    model, checkpoint = build().float(), read_checkpoint(path)
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
    if request.name in BUILD_OPTIONS:
        note = "assuming it was trained with transform_input=True; if not, give MODULE:FUNCTION"
        print(f"NOTE: {path}: {note}", file=sys.stderr)
    model.class_names = find_class_names(checkpoint)
    network.model, network.weights = model.eval(), Path(path).name


def find_class_names(about):
    """The names in a dictionary or in one in it, in the order of the classes; [] for none."""
    for values in (about, *(value for value in about.values() if isinstance(value, dict))):
        for names in (values[key] for key in CLASS_NAMES if key in values):
            names = sort_names(names) if isinstance(names, dict) else names
            names = names if isinstance(names, (list, tuple, np.ndarray)) else []
            are_names = all(isinstance(name, str) for name in names)
            # transformers and ultralytics have numbers if nobody gave names
            if are_names and not all(re.fullmatch(r"(LABEL_|class)?\d+", name) for name in names):
                return [" ".join(name.split()) for name in names]
    return []


def sort_names(names):
    """The names of {class ID: name} or {name: class ID}, in the order of the IDs."""
    if all(isinstance(value, int) for value in names.values()):
        names = {value: name for name, value in names.items()}
    ids = (key for key in names if str(key).isdecimal())
    return [names[key] for key in sorted(ids, key=int)]


def check_float(source, values):
    """Raise RequestError if there is a quantized tensor in a state dict, or in what holds one."""
    if any(getattr(value, "is_quantized", False) for value in tree_leaves(values)):
        raise RequestError(f"{source}: its weights are quantized: convert the float network")
