"""What does a transform do to a picture? Measured from outside, whatever library it comes from.

A transform takes a PIL picture to what a network takes: torchvision's, timm's, transformers' image
processors, your own. Nothing that a library declares is read: `measure` shows the transform
pictures of one colour, which give mean, std, the order of the channels and the blob's size; ramps,
which give the size that it resizes to; and photographs, which decide among what is left.
"""

import itertools
from dataclasses import dataclass, replace

import cv2
import numpy as np
from PIL import Image, ImageOps

from classification import INTERPOLATIONS, RequestError, get_blob, get_centre, one_line
from common import Preprocessing

GREY = np.float32([0.299, 0.587, 0.114])  # of R, G, B: Pillow's, from ITU-R BT.601

RAMP = (480, 640)  # (height, width), px


@dataclass
class Measured:
    """What a transform does, as get_blob can do it."""

    transform: object
    preprocessing: Preprocessing
    # Of a transform to grey: the weights for R, G and B, and the bias, of the 1x1 convolution that
    # makes its channels from a blob in 0 to 1; float32 (channels, 4)
    mix: np.ndarray = None

    def get_levels(self, array):
        """A transform's result (channels, height, width) in grey levels, (height, width, channels).

        0 is black, 255 is white; three channels that aren't grey are R G B.
        """
        if self.mix is not None:
            return 255 * (array.transpose(1, 2, 0) - self.mix[:, 3]) / self.mix[:, :3].sum(axis=1)
        p = self.preprocessing
        levels = array.transpose(1, 2, 0) * np.float32(p.std or 1) / np.float32(p.scale)
        return (levels + np.float32(p.mean))[..., :: 1 if p.rgb else -1]

    def get_centre(self, picture):
        """The same of what get_blob cuts out of a uint8 RGB picture (height, width, 3)."""
        centre = get_centre(picture, self.preprocessing).astype(np.float32)
        return centre if self.mix is None else centre @ GREY[:, None]

    def get_result(self, picture):
        """What the transform should return for a uint8 RGB picture, by get_blob."""
        blob = get_blob(np.ascontiguousarray(picture[..., ::-1]), self.preprocessing)[0]
        if self.mix is None:
            return blob
        return np.tensordot(self.mix[:, :3], blob, 1) + self.mix[:, 3:, None]


def read_pil(path):
    """The picture as PIL reads it, in RGB, turned as its EXIF says, like read_picture's."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except OSError as error:
        raise RequestError(f"Pillow: {one_line(error)}") from None


def run_transform(transform, picture):
    """float32 (1 or 3, height, width): what a transform makes of a PIL or uint8 RGB picture.

    Raises ValueError if it makes anything else, or fails.
    """
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    try:
        result = transform(picture)
        if hasattr(result, "keys") and "pixel_values" in result:  # an image processor's
            result = result["pixel_values"][0]
        array = np.asarray(result, np.float32)
    except Exception as error:  # whatever that code raises
        reason = f"it fails with {type(error).__name__}: {one_line(error)[:150]}"
        if type(transform).__module__.startswith("albumentations"):
            reason += "; wrap it: def NAME(p): return compose(image=numpy.array(p))['image']"
        raise ValueError(reason) from None
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim != 3 or len(array) not in (1, 3):
        kind = f"{type(result).__name__} of shape {array.shape}"
        raise ValueError(f"it returns a {kind}, not a tensor of shape (3, height, width)")
    return array


def measure(transform, pictures):
    """(Measured, the largest of the pictures' mean differences in grey levels) of a transform.

    transform: from a PIL picture to float32 (1 or 3, height, width). pictures: photographs of
    several sizes, uint8 RGB (height, width, 3). Raises ValueError with the reason if get_blob can't
    do what it does.
    """
    measured = measure_colours(transform)
    p = measured.preprocessing
    sides, reach = measure_sides(measured)
    around = sorted(range(-reach, reach + 1), key=abs)  # the likely ones first
    widths, heights = ([side + i for i in around] for side in sides)
    shorts, blob = [(height,) for height in heights], (p.width, p.height)
    pairs = [blob] if sides == [*blob] else [*itertools.product(widths, heights)]
    ways = [*itertools.product(shorts + pairs, INTERPOLATIONS, ("round", "floor"))]
    ways += itertools.product([blob], INTERPOLATIONS, ["first"])

    # a small one first: it is quick, and drops most
    pictures = [cv2.resize(pictures[0], (160, 120)), *pictures]
    for picture, short in zip(itertools.cycle(pictures[1:]), shorts, strict=False):
        pictures += get_parts(picture, short, p)
    wanted = [measured.get_levels(run_transform(transform, picture)) for picture in pictures]
    best, least = None, np.inf
    for resize, interpolation, center in ways:
        way = {"resize": resize, "interpolation": interpolation, "center": center}
        candidate = replace(measured, preprocessing=replace(p, **way, crop=resize != blob))
        worst = 0.0
        for picture, levels in zip(pictures, wanted, strict=True):
            worst = max(worst, float(np.abs(candidate.get_centre(picture) - levels).mean()))
            if worst >= least:
                break
        else:
            best, least = candidate, worst
        if least < 0.01:  # nothing is nearer
            break
    return best, least


def measure_colours(transform):
    """The Measured of a transform without its resize, from pictures of one colour."""

    def get_flat(*rgb, width=500, height=500):
        return run_transform(transform, np.full((height, width, 3), rgb, np.uint8))

    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    first = run_transform(transform, noise)
    # eight calls: a flip changes every second one
    if any(not np.array_equal(first, run_transform(transform, noise), True) for _ in range(8)):
        raise ValueError("it is random: give the validation's transform, not the training's")
    black, grey, white = (get_flat(level, level, level) for level in (0, 102, 255))
    shapes = {black.shape, get_flat(0, 0, 0, width=300, height=200).shape, first.shape}
    if len(shapes) > 1:
        raise ValueError("the size of its result depends on the picture's: add a CenterCrop")
    colours = np.array([get_flat(*rgb) - black for rgb in 255 * np.eye(3, dtype=int)])
    limit = 1e-3 * np.abs(colours).max()
    # not <=, which would let nan pass
    if not np.abs(white - black).max() > limit:
        raise ValueError("white is the same as black: it normalizes each picture by itself")
    if max(np.ptp(each, axis=(1, 2)).max() for each in (black, white, *colours)) > limit:
        raise ValueError("a picture of one colour isn't one any more: it pads, or adds a border")
    errors = white - black - colours.sum(axis=0), 0.4 * (white - black) - (grey - black)
    if np.abs(errors).max() > limit:
        reason = "it changes brightness or colours, or normalizes each picture by itself"
        raise ValueError(f"grey and white aren't what red, green and blue say: {reason}")
    if np.ptp(get_flat(255, 255, 255, width=30, height=20), axis=(1, 2)).max() > limit:
        if np.ptp(get_flat(255, 255, 255, width=3000, height=2000), axis=(1, 2)).max() > limit:
            raise ValueError("it pads pictures that aren't square, as Resize with a max_size does")
        raise ValueError("it cuts a piece out of the picture without resizing it first")

    gain = colours.mean(axis=(2, 3), dtype=np.float64).T / 255  # (its channels, R G B)
    bias = black.mean(axis=(1, 2), dtype=np.float64)
    p = Preprocessing(1 / 255, (0.0,) * 3, (), True, True, *black.shape[:0:-1])
    total = gain.sum(axis=1, keepdims=True)
    if np.abs(gain - total * GREY).max() < np.abs(total).max() / 255:  # grey is rounded to a level
        return Measured(transform, p, np.float32(np.column_stack([255 * total * GREY, bias])))
    order = np.abs(gain).argmax(axis=1)
    levels = gain[range(len(gain)), order]  # per grey level
    if len(gain) != 3 or np.abs(gain - levels[:, None] * np.eye(3)[order]).max() > limit / 255:
        raise ValueError("it mixes the channels, and not as greyscale does")
    if order.tolist() not in ([0, 1, 2], [2, 1, 0]):
        names = " ".join("RGB"[i] for i in order)
        raise ValueError(f"its channels are in the order {names}: blobs have R G B or B G R")
    scale = 1.0 if np.abs(levels).max() > 0.5 else 1 / 255  # 1: it keeps 0 to 255
    mean, std = np.round(-bias / levels, 4), scale / levels
    mean, std = (tuple(float(f"{v:.6g}") for v in values) for values in (mean + 0.0, std))
    std = () if std == (1.0,) * 3 else std
    p = replace(p, scale=scale, mean=mean, std=std, rgb=bool(order[0] == 0))
    return Measured(transform, p)


def measure_sides(measured):
    """([width, height] that a picture of RAMP's size is resized to, how far it may be off), px."""
    sides, reach = [], 1
    # the noise spreads the ramp's rounding, and the mean over the other axis takes it out
    noise = np.random.default_rng(0).random(RAMP)
    for axis in (1, 0):  # from left to right, from top to bottom
        ramp = np.linspace(0, 254, RAMP[axis])
        picture = np.floor(np.expand_dims(ramp, 1 - axis) + noise).astype(np.uint8)
        array = run_transform(measured.transform, np.repeat(picture[..., None], 3, axis=2))
        line = measured.get_levels(array).mean(axis=(1 - axis, 2))
        edge = min(2, (len(line) - 2) // 2)  # where filters have less to reach for
        line = line[edge : len(line) - edge]
        slope = np.polyfit(np.arange(len(line)), line, 1)[0] if len(line) > 1 else 0
        if not slope > 0:
            raise ValueError("it mirrors or turns the picture, makes it one colour, or 1 px small")
        sides.append(round(254 / slope * RAMP[axis] / (RAMP[axis] - 1)))
        reach = max(reach, int(1 + 0.002 * sides[-1] ** 2 / len(line) ** 1.5))
    return sides, reach


def get_parts(picture, resize, p):
    """A wide and a tall part of a picture, whose centres differ if rounded or floored.

    That is so if what is cut off is 3, 7, 11 ... px; two sides in `resize` are the same for all.
    """
    side = min(picture.shape[:2]) * 3 // 4
    parts = []
    for blob, turn in ((p.width, False), (p.height, True)):
        source = cv2.transpose(picture) if turn else picture
        lengths = range(side, source.shape[1] + 1) if len(resize) == 1 else []
        fitting = [n for n in lengths if (resize[0] * n // side - blob) % 4 == 3]
        part = source[:side, : fitting[0] if fitting else side]
        parts.append(np.ascontiguousarray(cv2.transpose(part) if turn else part))
    return parts
