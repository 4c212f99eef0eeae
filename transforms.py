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
from preprocessing import get_parts, measure, run_transform
from test_config import CLS_TEST_DATA_DIR

# In grey levels, the mean over a picture. For scale: transforms of tensors, which round elsewhere,
# are up to 0.31 from Pillow's; Lanczos for bicubic is 1.4, a crop that is a pixel further 9.7.
MAX_DIFFERENCE = 0.5


def find_transform(name, model):
    """(the transform of PIL pictures that a network comes with, its name); (None, "") if with none.

    That is timm's create_transform for a module with a dictionary `pretrained_cfg`, and the image
    processor of a folder from which transformers has loaded the network.
    """
    modules = list(model.modules())
    carriers = [m for m in modules if isinstance(getattr(m, "pretrained_cfg", None), dict)]
    configs = [m.config for m in modules if getattr(m, "config", None) is not None]
    folder = next((c._name_or_path for c in configs if getattr(c, "_name_or_path", "")), "")
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


def get_own_size(model):
    """(width, height) that a transformers network's config says, px; None if none does."""
    configs = [m.config for m in model.modules() if getattr(m, "config", None) is not None]
    size = next((c.image_size for c in configs if getattr(c, "image_size", None)), None)
    return (size, size) if isinstance(size, int) else size and tuple(size)[::-1]


def is_factory(transform):
    """Whether it makes a transform: a class, or a function that needs no arguments."""
    if not inspect.isroutine(transform) and not isinstance(transform, partial):
        return inspect.isclass(transform)
    try:
        inspect.signature(transform).bind()
    except TypeError:
        return False
    return True


def read_pil(path):
    """The picture as PIL reads it, in RGB, turned as its EXIF says, like read_picture's."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except OSError as error:
        raise RequestError(f"Pillow: {one_line(error)}") from None


def keeps_size(transform):
    """Whether its result has exactly the picture's size, as without any resize."""
    shapes = (64, 48), (50, 70)
    pictures = [np.zeros((*shape, 3), np.uint8) for shape in shapes]
    return all(run_transform(transform, p).shape[1:] == p.shape[:2] for p in pictures)


def prove(transform, measured, paths):
    """How far get_blob's pictures are from the transform's, from the file on, in grey levels.

    Returns [(mean difference, largest difference, path)], the worst last. Parts of the pictures
    count as well, whose sizes tell a centre that is rounded from one that is floored.
    """
    found, p = [], measured.preprocessing
    for path in paths:
        picture = read_picture(path)[..., ::-1]
        if not np.array_equal(picture, read_pil(path)):
            print(f"{path}: left out, since Pillow reads other pixels than OpenCV")
            continue
        differences = []
        for part in (picture, *get_parts(picture, p.resize, p)):
            pair = measured.get_result(part), run_transform(transform, part)
            differences.append(np.abs(np.subtract(*map(measured.get_levels, pair))))
        means = [float(difference.mean()) for difference in differences]
        found.append((max(means), float(np.max([d.max() for d in differences])), path))
    return sorted(found, key=lambda row: row[:2])  # a path is no tie-break: some are str


def measure_and_prove(transform, name, is_users, size=None, test_picture=None, is_grey=None):
    """(Measured, the transform as it was measured); None, None for a library's that can't be.

    size: (width, height), px, that pictures are resized to if the transform doesn't resize.
    is_grey: tells of a width and height whether the network takes one channel. Prints how far
    get_blob is from it. Raises RequestError if a user's can't be measured, or get_blob is too far.
    """
    theirs, paths = transform, sorted(Path(find_bundled(CLS_TEST_DATA_DIR)).glob("*.jpg"))
    try:
        if keeps_size(transform):
            if not size:
                raise ValueError("it doesn't resize, so give the network's size as --frame_size")
            transform = lambda picture: theirs(picture.resize(size, 2))  # noqa: E731 (2: bilinear)
        pictures = [np.asarray(read_pil(path)) for path in paths[:3]]
        channels, height, width = run_transform(transform, pictures[0]).shape
        if channels == 3 and is_grey and is_grey(width, height):
            in_colour = transform  # MNIST's, for instance, is for pictures of mode L
            transform = lambda picture: in_colour(picture.convert("L"))  # noqa: E731
        measured, _ = measure(transform, pictures)
    except ValueError as reason:
        if is_users:
            raise RequestError(f"--transform {name}: {reason}") from None
        print(f"NOTE: {name} can't be reproduced: {reason}", file=sys.stderr)
        return None, None
    if test_picture and not any(path.samefile(test_picture) for path in paths):
        paths.append(test_picture)
    found, p = prove(transform, measured, paths), measured.preprocessing
    mean, _, worst = found[-1]
    how = f"mean difference {mean:.3f}, at most {max(d for _, d, _ in found):.0f} grey levels"
    if mean <= MAX_DIFFERENCE:
        swapped = "" if p.rgb else "; it takes pictures in RGB, and makes BGR of them"
        print(f"preprocessing: the same pixels as {name} on {len(found)} pictures ({how}){swapped}")
        return measured, transform
    nearest = f"--resize {' '.join(map(str, p.resize))} --interpolation {p.interpolation}"
    problem = f"no options do the same: {how}, in {worst}; the nearest: {nearest}"
    if is_users:
        raise RequestError(f"--transform {name}: {problem} --center {p.center}")
    print(f"NOTE: {name}: {problem} --center {p.center}", file=sys.stderr)
    return measured, transform
