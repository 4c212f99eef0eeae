"""What does a transform do to a picture? Measured from outside, whatever library it comes from.

A transform takes a PIL picture to what a network takes: torchvision's, timm's, transformers' image
processors, your own. Nothing that it declares is read: pictures of one colour give mean, std, the
order of the channels and the blob's size; ramps give the size that it resizes to; and photographs
decide among what is left.
"""

import itertools
from dataclasses import dataclass, replace

import cv2
import numpy as np
from PIL import Image, ImageOps

from classification import INTERPOLATIONS, RequestError, get_blob, one_line
from common import Preprocessing

GREY = np.float32([0.299, 0.587, 0.114])  # of R, G, B: Pillow's, from ITU-R BT.601


@dataclass
class Measured:
    """What a transform does, as get_blob can do it."""

    transform: object
    preprocessing: Preprocessing
    gain: np.ndarray  # of each channel that it makes, per grey level; float32 (channels, 1, 1)
    # Of a transform to grey: the weights for R, G and B, and the bias, of the 1x1 convolution that
    # makes its channels from a blob in 0 to 1; float32 (channels, 4)
    mix: np.ndarray = None

    def get_result(self, picture):
        """What the transform should return for a uint8 RGB picture, by get_blob."""
        blob = get_blob(np.ascontiguousarray(picture[..., ::-1]), self.preprocessing)[0]
        if self.mix is None:
            return blob
        return np.tensordot(self.mix[:, :3], blob, 1) + self.mix[:, 3:, None]

    def compare(self, picture, result):
        """How far that is from what it does return, each value, in grey levels."""
        return np.abs((self.get_result(picture) - result) / self.gain)


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

    pictures: photographs of several sizes, uint8 RGB (height, width, 3). Raises ValueError with the
    reason if get_blob can't do what it does.
    """
    measured = measure_colours(transform)
    p = measured.preprocessing
    widths, heights = measure_sides(measured)
    sizes = [*itertools.product(heights), *itertools.product(widths, heights)]
    ways = [*itertools.product(sizes, INTERPOLATIONS, ("round", "floor"))]
    blob = p.width, p.height
    ways += itertools.product([blob], INTERPOLATIONS, ["first"])

    # a small one first: it is quick, and drops most
    pictures = [cv2.resize(pictures[0], (160, 120)), *pictures]
    for picture, short in zip(itertools.cycle(pictures[1:]), heights, strict=False):
        pictures += get_parts(picture, short, p)
    pairs = [(picture, run_transform(transform, picture)) for picture in pictures]
    best, least = None, np.inf
    for resize, interpolation, center in ways:
        way = {"resize": resize, "interpolation": interpolation, "center": center}
        candidate = replace(measured, preprocessing=replace(p, **way, crop=resize != blob))
        worst = 0.0
        for pair in pairs:
            if worst < least:
                worst = max(worst, float(candidate.compare(*pair).mean()))
        if worst < least:
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
    if {first.shape, get_flat(0, 0, 0, width=300, height=200).shape} != {black.shape}:
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
        raise ValueError("it changes brightness or colours, or normalizes each picture by itself")
    if np.ptp(get_flat(255, 255, 255, width=30, height=20), axis=(1, 2)).max() > limit:
        if np.ptp(get_flat(255, 255, 255, width=3000, height=2000), axis=(1, 2)).max() > limit:
            raise ValueError("it pads pictures that aren't square, as Resize with a max_size does")
        raise ValueError("it cuts a piece out of the picture without resizing it first")

    gain = colours.mean(axis=(2, 3), dtype=np.float64).T / 255  # (its channels, R G B)
    bias = black.mean(axis=(1, 2), dtype=np.float64)
    levels = gain.sum(axis=1)  # of each channel, per grey level
    p = Preprocessing(1 / 255, (0.0,) * 3, (), True, True, *black.shape[:0:-1])
    measured = Measured(transform, p, np.float32(levels)[:, None, None])
    # Pillow rounds grey to a level
    if np.abs(gain - np.outer(levels, GREY)).max() < np.abs(levels).max() / 255:
        mix = np.column_stack([255 * np.outer(levels, GREY), bias])
        return replace(measured, mix=np.float32(mix))
    order = np.abs(gain).argmax(axis=1)
    if len(gain) != 3 or np.abs(gain - levels[:, None] * np.eye(3)[order]).max() > limit / 255:
        raise ValueError("it mixes the channels, and not as greyscale does")
    names = " ".join("RGB"[i] for i in order)
    if names not in ("R G B", "B G R"):
        raise ValueError(f"its channels are in the order {names}: blobs have R G B or B G R")
    scale = 1.0 if np.abs(levels).max() > 0.5 else 1 / 255  # 1: it keeps 0 to 255
    mean, std = np.round(-bias / levels, 4), scale / levels
    mean, std = (tuple(float(f"{v:.6g}") for v in values) for values in (mean + 0.0, std))
    std = () if std == (1.0,) * 3 else std
    p = replace(p, scale=scale, mean=mean, std=std, rgb=names == "R G B")
    return replace(measured, preprocessing=p)


def measure_sides(measured):
    """[widths, heights] that a picture of 640x480 px may be resized to, px, the likely first."""
    found, shape = [], (480, 640)
    # the noise spreads the ramp's rounding, and the mean over the other axis takes it out
    noise = np.random.default_rng(0).random(shape)
    for axis in (1, 0):  # from left to right, from top to bottom
        ramp = np.linspace(0, 254, shape[axis])
        picture = np.floor(np.expand_dims(ramp, 1 - axis) + noise).astype(np.uint8)
        result = run_transform(measured.transform, np.repeat(picture[..., None], 3, axis=2))
        line = (result / measured.gain).mean(axis=(0, 2 - axis))
        line = line[2:-2] if len(line) > 5 else line  # at the edges, filters have less to reach for
        slope = np.polyfit(np.arange(len(line)), line, 1)[0] if len(line) > 1 else 0
        if not slope > 0:
            raise ValueError("it mirrors or turns the picture, makes it one colour, or 1 px small")
        side = round(254 / slope * shape[axis] / (shape[axis] - 1))
        reach = int(1 + 0.002 * side**2 / len(line) ** 1.5)  # how far that may be off
        found.append([side + i for i in sorted(range(-reach, reach + 1), key=abs)])
    return found


def get_parts(picture, short, p):
    """A tall and a wide part of a picture, whose centres differ if rounded or floored.

    That is so if the shorter side is resized to `short`, and 3, 7, 11 ... px are cut off the other.
    """
    side = min(picture.shape[:2]) * 3 // 4
    parts = []
    for axis, blob in enumerate((p.height, p.width)):
        shape, lengths = [side, side], range(side, picture.shape[axis] + 1)
        shape[axis] = next((n for n in lengths if (short * n // side - blob) % 4 == 3), side)
        parts.append(picture[: shape[0], : shape[1]])
    return parts
