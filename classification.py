"""Classify pictures, folders, videos or a camera with an ONNX network, cv2 and NumPy alone.

    python classification.py --input resnet50.onnx cat.jpg --top_k 5
    python classification.py --input resnet50.onnx 0        # camera 0
    python classification.py resnet50 --input cat.jpg       # as models.yml says

Settings are those of NAME or of the model file in models.yml. Without either,
pictures are prepared for torchvision's ImageNet networks: --resize 256, the
centre 224x224; but with --scale, --mean or --std the defaults below apply.

--resize makes the pixels of Pillow 13, except of 16-bit grey, RGBA TIFF and
CMYK JPEG. Pictures are turned as EXIF says; Pillow alone doesn't do that.
"""

import argparse
import contextlib
import functools
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import cv2
import numpy as np

BUNDLED_PICTURE = Path(__file__).resolve().parent / "test_data/cls/red_panda.jpg"

ZOO_NAME = "models.yml"
ZOO_SAMPLE = "classification"  # the `sample` of the entries that are for this program

# What torchvision's ImageNet networks expect: https://docs.pytorch.org/vision/stable/models.html
TORCHVISION = {
    "scale": 1 / 255, "mean": [123.675, 116.28, 103.53], "std": [0.229, 0.224, 0.225],
    "rgb": True, "crop": True, "width": 224, "height": 224,
    "initial_width": None, "initial_height": None,
    "resize": [256], "interpolation": "bilinear", "center": "round",
}  # fmt: skip
BLOBS = ("crop", "initial_width", "initial_height")  # OpenCV's options for the blob's size
PILLOWS = ("resize", "interpolation", "center")  # PyTorch's

# Pillow's filters (its Resample.c): their reach, px, and the weight of a pixel at a distance, px
FILTERS = {
    "bilinear": (1, lambda x: 1 - x),
    "bicubic": (2, lambda x: np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((5 - x) * x - 8) * x / 2 + 2)),  # noqa: E501
    "lanczos": (3, lambda x: np.sinc(x) * np.sinc(x / 3)),
}  # fmt: skip
CV2S = {"cv2-linear": cv2.INTER_LINEAR, "cv2-cubic": cv2.INTER_CUBIC, "cv2-area": cv2.INTER_AREA}
INTERPOLATIONS = (*FILTERS, "nearest", "nearest-exact", *CV2S)  # of Pillow, torch, albumentations
CENTERS = ("round", "floor", "first")

RANDOM, RANDOM_SUFFIX = "random", "-random"  # an entry's `weights`; the end of a file's name
RANDOM_WARNING = "RANDOM WEIGHTS: this answer means nothing"

# What OpenCV's wheels read, 4.10 without .avif and .gif. Not .pfm: its 0 to 1 would be rounded.
PICTURES = (
    ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".hdr", ".j2c", ".j2k", ".jfif", ".jp2",
    ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pam", ".pbm", ".pgm", ".pic", ".png",
    ".pnm", ".ppm", ".pxm", ".ras", ".sr", ".tif", ".tiff", ".webp",
)  # fmt: skip
SAVED_PICTURES = (".png", ".jpg", ".jpeg")  # of results
SAVED_VIDEOS = {".mp4": "mp4v", ".avi": "MJPG"}  # and their codecs

FONT = cv2.FONT_HERSHEY_SIMPLEX
WINDOW = "Classification with OpenCV DNN: q or Esc ends it, any other key continues"


class Terminated(BaseException):
    """kill's SIGTERM. No Exception, so that nobody takes it for a failure of its own."""


class RequestError(Exception):
    """The command can't be carried out. The message is the one line that the user reads."""

    exit_code = 2


class InputError(RequestError):
    """One of several inputs can't be read, or its result not written; the others go on."""


def run(main):
    """Call `main` and exit with its code. An error is one line on stderr."""
    if "OPENCV_LOG_LEVEL" not in os.environ:  # OpenCV's own log of errors that are reported below
        getattr(cv2.utils, "logging", cv2).setLogLevel(0)  # silent; of 5.0, 4.10
        # and FFmpeg, which replaces OpenCV's own MJPEG: that one prints what it can't read
        os.environ |= {"OPENCV_FFMPEG_LOGLEVEL": "-8", "OPENCV_VIDEOIO_PRIORITY_CV_MJPEG": "0"}
    if sys.stdout:  # None if it is closed; names that its encoding lacks are written as \u...
        sys.stdout.reconfigure(errors="backslashreplace")

    def stop(signum, frame):
        raise Terminated  # so that temporary files are removed

    signal.signal(signal.SIGTERM, stop)
    try:
        code = main()
        print(end="", flush=True)  # unlike sys.stdout.flush, also if stdout is closed
    except BrokenPipeError:  # the reader, head for instance, has seen enough: no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # 128 + SIGPIPE, as a shell reports for cat
    except (KeyboardInterrupt, Terminated) as stopped:  # 128 + the signal, as a shell reports
        how, code = ("SIGTERM", 143) if isinstance(stopped, Terminated) else ("Ctrl-C", 130)
        print(f"{Path(sys.argv[0]).name}: stopped by {how}", file=sys.stderr)
    except Exception as error:
        code = report(error)
    sys.exit(code)


def report(error):
    """Print an error as one line on stderr, or its traceback; return the exit code."""
    if isinstance(error, (RequestError, OSError, cv2.error)):
        source = f"OpenCV {cv2.__version__}: " if isinstance(error, cv2.error) else ""
        print(f"{Path(sys.argv[0]).name}: error: {source}{one_line(error)}", file=sys.stderr)
    else:  # of your own code, or a fault of ours
        traceback.print_exception(error)
    return getattr(error, "exit_code", RequestError.exit_code)


def one_line(error):
    """The text of an error in one line; OpenCV's without the place in its code."""
    return " ".join((getattr(error, "err", None) or str(error)).split())


def get_constants(prefix, **names):
    """{name: value} of the constants of cv2.dnn with this prefix. names: others for some."""
    ends = sorted(key.removeprefix(prefix) for key in dir(cv2.dnn) if key.startswith(prefix))
    return {names.get(end, end.lower()): getattr(cv2.dnn, prefix + end) for end in ends[::-1]}


# What this build of OpenCV has, by the names of its samples. OpenCV 4's one engine has none.
ENGINES = {n: v for n, v in get_constants("ENGINE_").items() if n in ("new", "classic")}
BACKENDS = get_constants("DNN_BACKEND_", INFERENCE_ENGINE="openvino")
TARGETS = get_constants("DNN_TARGET_", MYRIAD="ncs2_vpu", HDDL="hddl_vpu")


def make_parser(docstring):
    """An argparse parser with the docstring as its help; without a usage, an error is one line."""
    how = {"usage": argparse.SUPPRESS, "formatter_class": argparse.RawDescriptionHelpFormatter}
    return argparse.ArgumentParser(description=docstring, allow_abbrev=False, **how)


def boolean(text):
    """True or False for what people type; argparse's type=bool would take "False" for True."""
    return ["false", "no", "0", "true", "yes", "1"].index(text.lower()) > 2  # or ValueError


def finite(text):
    """A number that float32 can hold: not nan or inf, which would make every answer nan."""
    if not abs(float(text)) <= float(np.finfo(np.float32).max):
        raise ValueError
    return float(text)


def non_zero(text):
    """A finite number that float32 can divide by."""
    if abs(finite(text)) < np.finfo(np.float32).tiny:
        raise ValueError
    return float(text)


def positive_int(text):
    """A whole number from 1 to 8192: pictures that are larger would fill the memory."""
    if not 0 < int(text) <= 8192:
        raise argparse.ArgumentTypeError(f"must be from 1 to 8192, not {text}")
    return int(text)


def get_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("alias", nargs="?", metavar="NAME", help="entry of models.yml; options win over it")
    add("--zoo", metavar="FILE", help="the file with the entries [models/models.yml or models.yml]")
    add("--input", nargs="+", action="extend", default=[], help="model, pictures, videos, URLs ...")
    add("--model", metavar="FILE", help="the model, if it isn't among --input")
    add("--config", type=check_name, metavar="FILE", help="a Caffe model's .prototxt, in OpenCV 4")
    add("--classes", "--labels", metavar="FILE", help="text file of class names, one per line")
    add("--top_k", type=positive_int, default=1, metavar="K", help="answers per picture [1]")
    add("--output", metavar="PATH", help="file, folder/ or none [results/; shown video: none]")
    add("--show", type=boolean, default=True, metavar="BOOL", help="in a window, if any [True]")
    add("--engine", choices=[*ENGINES, "auto"], help="classic: OpenCV 4's [entry's, or auto]")
    add("--backend", choices=BACKENDS, default="default", help="others: classic engine [default]")
    add("--target", choices=TARGETS, default="cpu", help="others: classic engine [cpu]")
    add = parser.add_argument_group("size, as PyTorch's pipelines make it").add_argument
    size = {"type": positive_int, "metavar": "PX"}
    add("--resize", **size, nargs="+", default=[], help="shorter side, or width and height [none]")
    add("--interpolation", choices=INTERPOLATIONS, default="bilinear", help="[bilinear]")
    add("--center", choices=CENTERS, default="round", help="rounded, floored or cut first [round]")
    add = parser.add_argument_group("preprocessing, of blobFromImage").add_argument
    add("--scale", type=non_zero, default=1.0, help="multiply by this, after the mean [1.0]")
    add("--mean", type=finite, nargs=3, default=[0.0] * 3, help="subtract; R G B if --rgb [0 0 0]")
    add("--std", type=non_zero, nargs=3, help="divide the blob by these [none]")
    switch = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    add("--rgb", **switch, help="swapRB: the network takes RGB, OpenCV reads BGR [False]")
    add("--crop", **switch, help="scale the shorter side to the blob, cut off the rest [False]")
    for side in ("width", "height"):
        add(f"--{side}", **size, default=224, help=f"{side} of the blob [224]")
        add(f"--initial_{side}", **size, help=f"resize the picture to this {side} first [none]")
    return parser


def get_args():
    """The options of the command line, else of the network's entry in models.yml, args.entry."""
    parser = get_parser()
    args = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(TORCHVISION)))
    given = {k: v for k, v in vars(args).items() if v is not None}  # without the defaults
    models = [args.model] if args.model else [f for f in args.input if f.lower().endswith(".onnx")]
    if len(models) > 1 or not (models or args.alias):
        raise RequestError(f"{len(models)} models: name one .onnx file, --input MODEL.onnx PICTURE")
    zoo, name, entry = find_entry(args.alias, args.zoo, *models)
    values = entry or ({} if given.keys() & {"scale", "mean", "std"} else TORCHVISION)
    unwanted = PILLOWS if given.keys() & BLOBS else ()
    values = {k: v for k, v in values.items() if k not in unwanted and v not in (None, [], "")}
    options = [""]  # NAME's place, which the fourth number of a mean would take
    for key, value in sorted(values.items()):  # labels win over classes
        if key in ("mean", "std", "resize") and isinstance(value, list):
            # argparse would take -1e-05 for an option, but nothing that begins with a space
            options += [f"--{key}", *(f" {v}" for v in value)]
        elif key in TORCHVISION:
            options.append(f"--{key}={value}")
        elif key in ("model", "config", "classes", "labels"):
            options.append(f"--{key}={find_file(value, entry, zoo.parent)}")
    parser.prog = f"{zoo}: {name}"  # only its options can still be wrong
    args = parser.parse_args(options)
    size = args.width, args.height
    vars(args).update(given, entry=entry)
    if given.keys() & {"width", "height"} and "resize" not in given:
        args.resize = scale_resize(args.resize, size, (args.width, args.height))
    check_preprocessing(args, given)
    args.input = [item for item in args.input if item not in models] or [str(BUNDLED_PICTURE)]
    args.model = models[0] if models else args.model or f"the model of {name}"
    args.labels = read_lines(find_file(args.classes, entry)) if args.classes else []
    return args


def describe(p):
    """The preprocessing in one line, without what has no effect."""
    unused = BLOBS if p.resize else PILLOWS
    values = ((key, getattr(p, key)) for key in TORCHVISION if key not in unused)
    return ", ".join(f"{k} {list(v) if isinstance(v, tuple) else v}" for k, v in values)


def scale_resize(resize, before, after):
    """--resize for a blob of another size; before, after: (width, height), px."""
    sides = [s * new // old for s, old, new in zip([*resize] * 2, before, after, strict=False)]
    return [max(sides)] if len(resize) == 1 else sides


def check_preprocessing(p, given=()):
    """RequestError for options that would be wrong without a word; given: on the command line."""
    if unused := {*given} & {*(BLOBS if p.resize else PILLOWS)}:
        raise RequestError(f"--{min(unused)} {'excludes' if p.resize else 'needs'} --resize")
    if (p.initial_width is None) != (p.initial_height is None):
        raise RequestError("--initial_width and --initial_height go together")
    if len(p.resize) > 2:
        raise RequestError("--resize takes the shorter side, or a width and a height")
    if p.center == "first" and [*p.resize] != [p.width, p.height]:
        raise RequestError(f"--center first needs --resize {p.width} {p.height}, the blob's size")
    if 0 < max(map(abs, p.mean)) <= 1 and abs(p.scale) < 0.1:
        times_255 = " ".join(f"{255 * value:g}" for value in p.mean)
        problem = f"a mean of 0..1 is subtracted from pixels of 0..255: give --mean {times_255}"
        if "mean" in given:
            raise RequestError(problem)
        print(f"NOTE: {problem}", file=sys.stderr)


def find_entry(alias, zoo, model=None):
    """(models.yml, name, entry) of the alias or model file; (Path(), "", {}) if a file has none."""
    beside = Path(__file__).resolve().parent
    folders = [Path("models"), Path(), beside / "models", beside] if alias else [Path(model).parent]
    paths = [folder / ZOO_NAME for folder in folders if (folder / ZOO_NAME).is_file()]
    wanted, names = alias or Path(model).name, []
    for path in [Path(zoo)] if zoo else paths:
        for name, entry in read_zoo(path).items():
            if wanted == (name if alias else entry.get("model")):
                return path, name, entry
            names.append(name)
    problem = f"no entry '{wanted}' in {zoo or ', '.join(map(str, paths)) or ZOO_NAME}"
    if alias or zoo:
        known = f"only {', '.join(names)}" if names else "convert the network, or set --zoo"
        raise RequestError(f"{problem}: {known} (pictures go after --input)")
    if paths:
        print(f"NOTE: {problem}: assuming the preprocessing below, and no names", file=sys.stderr)
    return Path(), "", {}


def find_file(name, entry, folder=""):
    """Its path in `folder`, in the current one, or where OpenCV's samples/dnn/common.py looks."""
    sha1 = re.findall("[0-9a-f]{40}", str(entry.get("load_info")))
    variables = ("DOWNLOAD_CACHE_DIR", "SAMPLES_DATA_PATH", "DNN_TEST_DATA_PATH", "TEST_DATA_PATH")
    found = [os.environ[f"OPENCV_{v}"] for v in variables if os.environ.get(f"OPENCV_{v}")]
    folders = [folder, "", *(Path(f, end) for f in found for end in (*sha1, "", "dnn"))]
    paths = (os.path.normpath(Path(folder, str(name))) for folder in folders)
    return next(filter(os.path.exists, paths), str(name))


def read_zoo(path):
    """{name: entry} of a models.yml, of the entries for this sample; each is a dictionary."""
    try:
        storage = cv2.FileStorage()  # whose constructor would hide OpenCV's reason
        storage.open(check_name(str(path)), cv2.FILE_STORAGE_READ)
        entries = read_node(storage.root()).items()
    # ValueError: texts that aren't UTF-8; AttributeError: a list, or nothing
    except (cv2.error, ValueError, AttributeError) as error:
        # error.func is "models.yml(4): Tabs are prohibited in YAML!"
        line = re.search(r"\((\d+)\): (.)([^!]*)", getattr(error, "func", ""))
        reason = f"line {line[1]}: {line[2].lower()}{line[3]}:" if line else "missing, or"
        raise RequestError(f"{path}: {reason} not YAML that OpenCV can read") from None
    return {n: e for n, e in entries if isinstance(e, dict) and e.get("sample") == ZOO_SAMPLE}


def read_node(node):
    """The dictionary, list, number or text of a node; `true` is 1 in OpenCV 5.0, "true" in 4."""
    if node.isSeq():
        return [read_node(node.at(i)) for i in range(node.size())]
    if node.isInt() or node.isReal():
        return int(node.real()) if node.isInt() else node.real()
    if node.isString():
        return node.string()
    return {name: read_node(node.getNode(name)) for name in node.keys()}  # noqa: SIM118


def check_name(name):
    """The file name. cv2 5.0.0 crashes on "" and on names that aren't UTF-8: InputError."""
    if not name or name != name.encode(errors="ignore").decode():
        raise InputError(f"{name!r}: OpenCV can't open files of this name; rename it")
    return name


def read_lines(path):
    """The lines of a text file, class names for instance; empty ones at its end don't count."""
    try:
        return Path(path).read_text("utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise RequestError(f"{path}: not a text file in UTF-8") from None


def expand_sources(names):
    """Yield (name, kind) of each input; a folder stands for its pictures, without hidden ones."""
    for name in names:
        files = sorted(map(str, Path(name).glob("[!.]*"))) if os.path.isdir(name) else [name]
        files = [file for file in files if file.lower().endswith(PICTURES) or file == name]
        if not files:
            raise RequestError(f"{name}: no picture in this folder")
        yield from ((file, get_kind(file)) for file in files)


def get_kind(name):
    """Get "picture", "video" for all else that cv2.VideoCapture may open, or "" for neither."""
    if not os.access(name, os.R_OK):  # a camera, a URL, img_%03d.png, or GStreamer's "!"
        return "video" if name.isdecimal() or re.search("://|[%!]", name) else ""
    with contextlib.suppress(InputError, cv2.error):  # OpenCV 4's wheels know OpenEXR, but raise
        if Path(name).is_fifo() or os.path.isfile(name) and cv2.haveImageReader(check_name(name)):
            return "picture"
    return "video"


def read_frames(name, kind):
    """Yield (title, uint8 BGR picture (height, width, 3), frames per second or 0 for a picture)."""
    if kind != "video":
        yield name, read_picture(name), 0  # or the system's reason
        return
    capture = cv2.VideoCapture(int(name) if name.isdecimal() else check_name(name))
    rate, promised = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    # FFmpeg takes a text for a video of its letters
    is_text = capture.get(cv2.CAP_PROP_FOURCC) == cv2.VideoWriter_fourcc(*"ansi")
    number = ms = 0
    while not is_text and (got := capture.read())[0]:
        number += 1
        ms = capture.get(cv2.CAP_PROP_POS_MSEC)  # after the last frame it would be 0
        yield f"{name}, frame {number}", got[1], rate if 0 < rate <= 1000 else 25
    if not number:
        raise InputError(f"{name}: truncated, or not a picture, video or camera OpenCV can read")
    # promised is duration x rate in some files, too many if the rate varies; below 0 in streams
    if number < 0.95 * promised and ms * rate < 950 * promised:
        raise InputError(f"{name}: truncated: {number} of {promised:.0f} frames can be read")


def read_picture(path):
    """The picture as uint8 BGR (height, width, 3), turned as its EXIF says; or RequestError."""
    try:
        data = np.frombuffer(Path(path).read_bytes(), np.uint8)
        # imdecode, because imread fills the missing part of a truncated JPEG with grey
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR)
    except OSError as error:
        raise InputError(one_line(error)) from None
    except cv2.error:  # an empty file, or more than 2**30 pixels
        picture = None
    if picture is None:
        raise InputError(f"{path}: truncated, or not a picture that OpenCV can read as 8 bits")
    return picture


def read_net(args):
    """cv2.dnn.Net of the model file, on the engine, backend and target of options or entry."""
    backend, target = BACKENDS[args.backend], TARGETS[args.target]
    options = f"--target {args.target} on --backend {args.backend}"
    if target not in cv2.dnn.getAvailableTargets(backend):  # OpenCV would silently use the CPU
        raise RequestError(f"this OpenCV has no {options}")
    # only our own: OpenCV's entry of googlenet, for instance, has the hash of an empty file
    if "made_from" in args.entry and get_load_info(args.model) != args.entry.get("load_info"):
        raise RequestError(f"{args.model}: missing, or changed (by its SHA-1); convert it again")
    verified = re.findall(r"\w+", str(args.entry.get("engines", "auto")))
    wanted = [args.engine or args.entry.get("engine", "auto"), *verified]
    hint = "convert it again with this OpenCV"
    if (args.backend, args.target) != ("default", "cpu"):
        wanted, hint = ["classic"], f"{options} needs it; --engine new alone doesn't"
    known = [engine for engine in wanted if engine in (*ENGINES, "auto") or not ENGINES]
    missing = f"this OpenCV has no {wanted[0]} engine for {Path(args.model).name}"
    if not known:
        raise RequestError(f"{missing}: {hint}")
    if known[0] != wanted[0]:
        print(f"NOTE: {missing}: taking {known[0]}", file=sys.stderr)
    engine = [ENGINES[known[0]]] if known[0] in ENGINES else []  # OpenCV's default
    try:
        net = cv2.dnn.readNet(check_name(args.model), args.config or "", "", *engine)
    except cv2.error as error:
        problem = f"no such file, truncated, or not ONNX: {one_line(error)}"
        raise RequestError(f"{args.model}: {problem}") from None
    net.setPreferableBackend(backend)
    net.setPreferableTarget(target)
    return net


def get_load_info(model):
    """{"sha1": a model file's} as in OpenCV's models.yml; "data_sha1" of a large one's .data."""
    files = {"sha1": Path(model), "data_sha1": Path(f"{model}.data")}
    return {k: hashlib.sha1(f.read_bytes()).hexdigest() for k, f in files.items() if f.exists()}


def get_blob(picture, p):
    """float32 blob of shape (1, 3, height, width) from a uint8 BGR picture (height, width, 3).

    (picture - mean) * scale / std; p has the options' names, and p.std and p.resize may be empty.
    """
    # float before cv2's resize: rounding to uint8 after it would shift the logits by about 0.01
    picture = (get_centre(picture, p) if p.resize else picture).astype(np.float32)
    if p.initial_width and not p.resize:
        picture = cv2.resize(picture, (p.initial_width, p.initial_height))
    # the mean is in RGB order if swapRB is set: OpenCV swaps it as well
    blob = cv2.dnn.blobFromImage(picture, p.scale, (p.width, p.height), p.mean, p.rgb, p.crop)
    return blob / np.float32(p.std).reshape(1, 3, 1, 1) if p.std else blob


def get_centre(picture, p):
    """uint8 (p.height, p.width, 3): the centre of the picture resized as Pillow 13 does it."""
    height, width = picture.shape[:2]
    if p.center == "first":
        w, h = min(width, height * p.width // p.height), min(height, width * p.height // p.width)
        top, left = (height - h) // 2, (width - w) // 2
        picture, width, height = picture[top : top + h, left : left + w], w, h
    short, *other = p.resize
    new = p.resize if other else [short * side // min(width, height) for side in (width, height)]
    how = p.interpolation
    if how in CV2S:  # the whole picture; what follows only cuts
        picture = cv2.resize(picture, new, interpolation=CV2S[how])
        (width, height), how = new, "nearest"
    columns, *across = get_taps(width, new[0], p.width, how, p.center)
    rows, *down = get_taps(height, new[1], p.height, how, p.center)
    picture = np.ascontiguousarray(picture[rows, columns])
    # since Pillow 13; in older ones the horizontal pass always comes first
    vertical_first = height - new[1] > max(0, 2 * (width - new[0]))
    picture = resample(picture, *down) if vertical_first else picture
    picture = cv2.transpose(resample(cv2.transpose(picture), *across))
    picture = picture if vertical_first else resample(picture, *down)
    y, x = p.height - picture.shape[0], p.width - picture.shape[1]  # what is too small is padded
    return cv2.copyMakeBorder(picture, y // 2, y - y // 2, x // 2, x - x // 2, cv2.BORDER_CONSTANT)


@functools.lru_cache  # for the frames of a video
def get_taps(old, new, wanted, interpolation, center):
    """How `old` pixels become the middle `wanted` ones of `new`, as Pillow computes them.

    (slice of the old pixels, indices into it (taps, pixels), weights * 2**22 (taps, pixels, 1)).
    """
    half = (new - wanted) / 2
    first = max(0, int(half) if center == "floor" else round(half))
    step, place = old / new, np.arange(first, first + min(new, wanted))
    if interpolation in FILTERS:
        reach, weigh = FILTERS[interpolation]
        zoom = max(step, 1.0)
        middle = (place + 0.5) * step
        low = np.maximum((middle - reach * zoom + 0.5).astype(int), 0)
        high = np.minimum((middle + reach * zoom + 0.5).astype(int), old)
        index = low + np.arange((high - low).max())[:, None]
        distance = np.abs(index - middle + 0.5) * (1 / zoom)
        weights = np.where((distance < reach) & (index < high), weigh(distance), 0)
        weights /= weights.sum(axis=0)
    else:  # Pillow adds the steps up; torch multiplies in float32
        index = np.cumsum([step / 2] + [step] * (new - 1))[place]
        if interpolation == "nearest-exact":
            index = np.float32(place + 0.5) * np.float32(step)
        index, weights = index.astype(int)[None], np.ones((1, len(place)))
    index = np.minimum(index, old - 1)
    needed = slice(index.min(), index.max() + 1)
    weights = np.trunc(weights * 2**22 + np.copysign(0.5, weights)).astype(np.int32)
    return needed, index - needed.start, weights[..., None]


def resample(picture, index, weights):
    """The picture with a row for each column of get_taps's indices and weights."""
    rows = picture.reshape(len(picture), -1)
    result = np.empty((index.shape[1], rows.shape[1]), np.uint8)
    for start in range(0, len(result), 32):  # blocks that stay in the cache: 3 times as fast
        block = slice(start, start + 32)
        total = np.full(result[block].shape, 2**21, np.int32)  # a half, to round it
        for i, weight in zip(index[:, block], weights[:, block], strict=True):
            total += rows[i] * weight
        total >>= 22
        result[block] = np.clip(total, 0, 255, out=total)
    return result.reshape(-1, *picture.shape[1:])


def forward(net, blob):
    """(logits of shape (classes,), ms of the forward pass)."""
    start = time.perf_counter()
    try:
        net.setInput(blob)
        out = net.forward()
    except cv2.error as error:
        hint = f"the network can't take {blob.shape[3]}x{blob.shape[2]}: set --width and --height"
        raise RequestError(f"{hint}: {one_line(error)}") from None
    ms = 1000 * (time.perf_counter() - start)
    outputs = len(net.getUnconnectedOutLayersNames())
    # squeezenet of OpenCV 4.10's models.yml has the shape (1, 1000, 1, 1)
    if outputs != 1 or out is None or out.shape[:2] != (1, out.size) or out.dtype != np.float32:
        raise RequestError("not a classifier: the output isn't one float32 array (1, classes)")
    if not (np.isfinite(blob).all() and np.isfinite(out).all()):
        raise InputError("the answer is nan or inf: check --scale, --mean, --std, or the file")
    return out.ravel(), ms


def get_answers(outputs, names, top_k, activation=None):
    """Yield (text for stdout, text for the picture), best first; activation: None for logits."""
    if len(outputs) == 1:  # a value or probability, which has no classes
        name = names[0] if names else "probability" if activation else "value"
        value = f"{100 * outputs[0]:.1f} %" if activation else f"{outputs[0]:.4f}"
        yield f"{name}: {value}", f"{name}: {value}"
        return
    probabilities = outputs
    if not activation and (outputs.min() < 0 or abs(outputs.sum() - 1) >= 1e-3):  # logits
        exponentials = np.exp(outputs.astype(np.float64) - outputs.max())
        probabilities = exponentials / exponentials.sum()
    for i in np.argsort(-outputs, kind="stable")[:top_k]:
        name = names[i] if names else f"Class #{i}"
        percent = f"{100 * probabilities[i]:.1f} %"
        text = f"class ID: {i}, label: {name}\n* confidence: {outputs[i]:.4f}"
        # in the picture the first synonym: some of ImageNet's names have many
        yield f"{text}\n* probability: {percent}", f"{name.split(',')[0]}: {percent}"


def annotate(picture, lines):
    """Write lines into the top left corner, as many as fit."""
    height, width = picture.shape[:2]
    zoom = max(min(width / 900, height / (34 * len(lines))), 0.45)  # capitals of 9 px or more
    step, thickness = int(34 * zoom), max(1, round(1.5 * zoom))
    for bottom, line in zip(range(step, height + 1, step), lines, strict=False):
        # measured as it is drawn: OpenCV 5.0.0's letters get wider with their thickness
        while (end := cv2.getTextSize(line, FONT, zoom, thickness)[0][0] + step) > width and line:
            line = f"{line[:-4]}..." if len(line) > 4 else ""
        picture[bottom - step : bottom, :end] //= 4  # dark behind the text
        origin = (step // 2, bottom - round(0.28 * step))
        cv2.putText(picture, line, origin, FONT, zoom, (0, 255, 0), thickness, cv2.LINE_AA)


def fit(picture, size, pick):
    """The picture scaled to `size` (width, height); pick: min only shrinks, max only enlarges."""
    height, width = picture.shape[:2]
    zoom = pick(1, min(size[0] / width, size[1] / height))
    new_size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    # INTER_AREA: scaling down in any other way drops lines of pixels, and the text with them
    return cv2.resize(picture, new_size, interpolation=cv2.INTER_AREA)


def get_output_paths(sources, args, window):
    """Yield each result's path; None for one that isn't saved, as a camera's without --output."""
    output = check_name(args.output or "results")
    is_folder = output.endswith(("/", os.sep)) or os.path.isdir(output) or not Path(output).suffix
    taken = {os.path.realpath(name).lower() for name, _ in sources}
    for number, (name, kind) in enumerate(sources, 1):
        path, suffixes = Path(output), SAVED_PICTURES if kind == "picture" else tuple(SAVED_VIDEOS)
        if is_folder:
            suffix = Path(name).suffix if Path(name).suffix.lower() in suffixes else suffixes[0]
            path /= get_result_name(name, f"_{Path(args.model).stem}{suffix}")
        if kind and path.suffix.lower() not in suffixes:
            needed = f"a {kind} needs {' or '.join(suffixes)}, a folder a slash at its end"
            raise RequestError(f"--output {path}: {needed}")
        while os.path.realpath(path).lower() in taken:
            path = path.with_stem(f"{path.stem}_{number}")
        taken.add(os.path.realpath(path).lower())
        is_saved = args.output or kind == "picture" or not (window or name.isdecimal())
        yield path if is_saved and output != "none" else None


def get_result_name(name, end):
    """The name of an input's result, at most 240 bytes; without a stream's query and password."""
    name = re.sub(r"(?s)^.*?://([^/]*@)?([^?#\s]*).*", r"\2", name)
    stem = os.fsencode(Path(name).stem)[: 240 - len(os.fsencode(end))]
    return stem.decode("utf-8", "ignore") + end


def save(frames, path):
    """Yield each (picture, rate) once it is in a hidden file, which is renamed when it is whole."""
    part, writer, number = path.with_name(f".{os.getpid()}{path.suffix}"), None, 0
    try:
        for picture, rate in frames:
            path.parent.mkdir(parents=True, exist_ok=True)
            if rate:
                fourcc = cv2.VideoWriter_fourcc(*SAVED_VIDEOS[path.suffix.lower()])
                writer = writer or cv2.VideoWriter(str(part), fourcc, rate, picture.shape[1::-1])
                if path.is_dir() or not writer.isOpened():
                    raise InputError(f"{path}: OpenCV can't write this video")
                writer.write(picture)
                number += 1
            else:
                encoded, data = cv2.imencode(path.suffix, picture)  # imwrite hides what fails
                if not encoded:
                    raise InputError(f"{path}: OpenCV can't write this picture; try .png")
                part.write_bytes(data)
                os.replace(part, path)
                print(f"* saved: {path}", flush=True)
            yield picture, rate
    finally:  # also after Ctrl-C, or if the input breaks off
        try:
            if number:
                writer.release()
                # on a full disk isOpened stays true, and a short .avi names frames that it lacks
                capture = cv2.VideoCapture(str(part))
                capture.set(cv2.CAP_PROP_POS_FRAMES, number - 1)
                if capture.get(cv2.CAP_PROP_FRAME_COUNT) != number or not capture.grab():
                    raise InputError(f"{path}: can't be written whole: is the disk full?")
                os.replace(part, path)
                print(f"* saved: {path}", flush=True)
        finally:
            part.unlink(missing_ok=True)


def has_display():
    """Whether a window can be shown."""
    has_server = sys.platform != "linux" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}
    # a child process tries: Qt would abort, https://github.com/opencv/opencv/issues/13682
    probe = [sys.executable, "-c", "import cv2; cv2.namedWindow('probe')"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        return has_server and not subprocess.run(probe, capture_output=True, timeout=10).returncode
    return False


def show(picture, seconds):
    """Show a picture for this time, or until a key is pressed; return whether the user quits."""
    cv2.namedWindow(WINDOW, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)
    cv2.imshow(WINDOW, fit(picture, (1280, 720), min))
    end = time.monotonic() + seconds
    while True:
        key = cv2.waitKey(50 if seconds else 1)  # not 0, which would miss Ctrl-C
        visible = 0
        with contextlib.suppress(cv2.error):  # OpenCV 5.0.0's Qt, once its only window is closed
            visible = cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE)
        if visible < 1 or key in (ord("q"), ord("Q"), 27):  # 27: Esc
            return True
        if key >= 0 or time.monotonic() >= end:
            return False


def classify(source, net, args):
    """Yield the annotated picture, or each frame of a video, with its rate; print the answers."""
    last = None
    random = args.entry.get("weights") == RANDOM or Path(args.model).stem.endswith(RANDOM_SUFFIX)
    warning = [RANDOM_WARNING] if random else []
    for title, picture, rate in read_frames(*source):
        outputs, ms = forward(net, get_blob(picture, args))
        if args.classes and len(args.labels) != len(outputs):
            problem = f"{len(args.labels)} lines, but the network has {len(outputs)} outputs"
            raise RequestError(f"{args.classes}: {problem}")
        answers = get_answers(outputs, args.labels, args.top_k, args.entry.get("activation"))
        texts, lines = zip(*answers, strict=True)
        duration = f"inference time: {ms:.1f} ms"
        if outputs.argmax() != last:  # of a video, what changes
            print(f"{title}:", *texts, *warning, duration, sep="\n* ", flush=True)
        last = outputs.argmax()
        picture = picture if rate else fit(picture, (640, 480), max)  # room for the text
        annotate(picture, [*warning, *lines, duration.capitalize()])
        yield picture, rate


def main():
    args = get_args()
    sources, window = list(expand_sources(args.input)), args.show and has_display()
    jobs = list(zip(sources, get_output_paths(sources, args, window), strict=True))
    net = read_net(args)
    print(f"preprocessing: {describe(args)}")
    code, answered = 0, False
    for number, (source, output) in enumerate(jobs, 1):
        seconds = 1 if number < len(jobs) else np.inf  # as in OpenCV 5's sample
        frames = classify(source, net, args)
        try:
            with contextlib.closing(save(frames, output) if output else frames) as frames:
                for picture, rate in frames:
                    answered = True
                    if window and show(picture, 0 if rate else seconds):
                        return min(code, 1)
        except BrokenPipeError:  # of stdout
            raise
        except OSError as error:
            code = report(InputError(f"{output}: can't be written: {error.strerror}"))
        except (InputError, cv2.error) as error:
            code = report(error)
    return min(code, 1) if answered else code


if __name__ == "__main__":
    run(main)
