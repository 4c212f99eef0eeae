"""Which transform prepares a network's pictures, and does get_blob do the same?

Yours (--transform), or the one of the library that the network comes from. It is measured, and the
blobs of both ways are compared on the bundled pictures, from the file on.
"""

import inspect
import sys
from functools import partial
from pathlib import Path

import numpy as np

from classification import RequestError, one_line, read_picture
from common import find_bundled
from forward import takes_grey
from preprocessing import get_parts, measure, read_pil, run_transform
from test_config import CLS_TEST_DATA_DIR

# In grey levels, the mean over a picture. For scale: transforms of tensors, which round elsewhere,
# are up to 0.31 from Pillow's; Lanczos for bicubic is 1.4, a crop that is a pixel further 9.7.
MAX_DIFFERENCE = 0.5


def find_transform(name, model):
    """(the transform of PIL pictures that a network comes with, its name), or (None, "").

    That is timm's create_transform for a module with a dictionary `pretrained_cfg`, and the image
    processor of a folder from which transformers has loaded the network.
    """
    carriers = [m for m in model.modules() if isinstance(getattr(m, "pretrained_cfg", None), dict)]
    folder = find_in_config(model, "_name_or_path") or ""
    about = Path(folder, "preprocessor_config.json")
    try:
        if carriers and (carriers[0] is model or len(carriers) == 1):
            from timm.data import create_transform, resolve_model_data_config

            config = resolve_model_data_config(carriers[0])
            size = getattr(getattr(carriers[0], "patch_embed", None), "img_size", None)
            if size:  # of create_model(img_size=160), which resolve_model_data_config ignores
                config["input_size"] = (3, *size)
            return create_transform(**config), "timm's create_transform"
        if folder and about.is_file():
            from transformers import AutoImageProcessor

            return AutoImageProcessor.from_pretrained(folder), f"the image processor of {about}"
    except Exception as error:  # whatever these libraries raise; ImportError: one isn't installed
        reason = f"{type(error).__name__}: {one_line(error)[:150]}"
        print(f"NOTE: {name}: its library's transform can't be made: {reason}", file=sys.stderr)
    return None, ""


def find_in_config(model, name):
    """What the config of a transformers network, or of one inside a module, has by this name."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return next((value for c in configs if (value := getattr(c, name, None))), None)


def is_factory(transform):
    """Whether it makes a transform: a class, or a function that needs no arguments."""
    if not inspect.isroutine(transform) and not isinstance(transform, partial):
        return inspect.isclass(transform)
    try:
        inspect.signature(transform).bind()
    except TypeError:
        return False
    return True


def keeps_size(transform):
    """Whether its result has exactly the picture's size, as without any resize."""
    pictures = np.zeros((64, 48, 3), np.uint8), np.zeros((50, 70, 3), np.uint8)
    return all(run_transform(transform, p).shape[1:] == p.shape[:2] for p in pictures)


def prove(measured, paths):
    """How far get_blob's pictures are from a transform's, from the file on, in grey levels.

    Returns [(mean difference, largest difference, path)], the worst last, of each picture and of
    two parts of it, whose sizes tell a centre that is rounded from one that is floored.
    """
    found, p = [], measured.preprocessing
    for path in paths:
        picture = read_picture(path)[..., ::-1]
        if not np.array_equal(picture, read_pil(path)):
            print(f"{path}: left out, since Pillow reads other pixels than OpenCV")
            continue
        for part in (picture, *get_parts(picture, p.resize, p)):
            pair = measured.get_result(part), run_transform(measured.transform, part)
            difference = np.abs(np.subtract(*map(measured.get_levels, pair)))
            found.append((float(difference.mean()), float(difference.max()), str(path)))
    return sorted(found)


def measure_and_prove(network, size, test_picture):
    """Measure a Network's transform, and print how far get_blob is from it.

    Returns whether a library's can be measured; the Network gets the preprocessing. Raises
    RequestError if the user's can't be, or get_blob is too far from it. size: (width, height), px,
    that pictures are resized to if the transform doesn't resize, or None.
    """
    theirs, name, request = network.transform, network.transform_name, network.request
    paths, mode = sorted(Path(find_bundled(CLS_TEST_DATA_DIR)).glob("*.jpg")), "RGB"

    def transform(picture):
        picture = picture.resize(size, 2) if size else picture  # 2: bilinear
        return theirs(picture.convert(mode))

    def refuse(problem):
        if request.transform:
            raise RequestError(f"--transform {name}: {problem}")
        print(f"NOTE: {name}: {problem}", file=sys.stderr)  # its network is right all the same

    try:
        if not keeps_size(theirs):
            size = None
        elif not size:
            raise ValueError("it doesn't resize, so give the network's size as --frame_size")
        pictures = [np.asarray(read_pil(path)) for path in paths[:3]]
        channels, height, width = run_transform(transform, pictures[0]).shape
        if channels == 3 and request.is_own and takes_grey(network.model, width, height):
            mode = "L"  # as MNIST's pictures are
        measured, _ = measure(transform, pictures)
    except ValueError as reason:
        refuse(reason)
        return False
    p, network.mix, network.transform = measured.preprocessing, measured.mix, transform
    network.preprocessing = p
    if test_picture and not any(path.samefile(test_picture) for path in paths):
        paths.append(test_picture)
    found = prove(measured, paths)
    (mean, _, worst), count = found[-1], len({path for _, _, path in found})
    how = f"mean difference {mean:.3f}, at most {max(d for _, d, _ in found):.0f} grey levels"
    if mean <= MAX_DIFFERENCE:
        swapped = "" if p.rgb else "; it takes pictures in RGB, and makes BGR of them"
        print(f"preprocessing: the same pixels as {name} on {count} pictures ({how}){swapped}")
    else:
        nearest = f"--resize {' '.join(map(str, p.resize))} --interpolation {p.interpolation}"
        nearest += f" --center {p.center}"
        refuse(f"no options do the same: {how}, in {worst}; the nearest: {nearest}")
    return True
