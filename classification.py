"""Classify pictures, folders of pictures, videos or a camera with a converted network.

Nothing but cv2 and NumPy is needed, so this file can be copied anywhere by itself:

    python classification.py --input resnet50.onnx cat.jpg
    python classification.py --model resnet50.onnx --input cat.jpg --top_k 5
    python classification.py --input resnet50.onnx 0                # camera 0
    python classification.py resnet50 --input cat.jpg               # as models.yml says

A name is looked up in models.yml, which says what the network needs; so is the model's file in a
models.yml beside it. Without an entry, pictures are prepared as torchvision's ImageNet networks
expect them. With --scale, --mean or --std and no name, what is left out is what it is in OpenCV's
samples: scale 1, mean 0 0 0, no std, no crop, BGR, no initial resize.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

# What torchvision's ImageNet networks expect. This file travels alone, so the numbers stand
# here as well as in default_preprocess_config.py; a test holds the two together.
TORCHVISION_PREPROCESSING = {
    "scale": 1 / 255,
    "mean": [123.675, 116.28, 103.53],
    "std": [0.229, 0.224, 0.225],
    "crop": True,
    "rgb": True,
    "initial_width": 256,
    "initial_height": 256,
}
# What OpenCV's samples do where an option is left out.
PLAIN_PREPROCESSING = {
    "scale": 1.0,
    "mean": [0.0, 0.0, 0.0],
    "std": [],
    "crop": False,
    "rgb": False,
    "initial_width": None,
    "initial_height": None,
}
FRAME_SIZE = 224

# Beside this file in the project it comes from; elsewhere they are missing and not needed.
BUNDLED_DATA = Path(__file__).resolve().parent / "test_data" / "cls"
BUNDLED_PICTURE = BUNDLED_DATA / "red_panda.jpg"
BUNDLED_LABELS = BUNDLED_DATA / "imagenet_classes.txt"

# Where the entries of converted networks are, seen from the current folder or from this file's.
ZOO_NAME = "models.yml"
ZOO_PATHS = (os.path.join("models", ZOO_NAME), ZOO_NAME)
ZOO_SAMPLE = "classification"  # as the samples of OpenCV call the entries that are for this one
# What an entry may say besides model and classes, by the names of the options.
ZOO_OPTIONS = (
    "mean", "std", "scale", "width", "height", "rgb", "crop", "initial_width", "initial_height"
)  # fmt: skip

RESULTS_DIR = "results"
# A model file whose name ends so holds random weights, whose answers are marked as worthless; the
# metadata of the file says it as well.
RANDOM_SUFFIX = "-random"
RANDOM_WARNING = "RANDOM WEIGHTS: this answer means nothing"

WINDOW = "Classification with OpenCV DNN"
# The first is taken where a source has none of these itself.
SUFFIXES = {
    "picture": (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"),
    "video": (".mp4", ".avi", ".mkv", ".mov"),
    "camera": (".mp4", ".avi", ".mkv", ".mov"),
}
MIN_RESULT_WIDTH = 320  # px: narrower pictures are enlarged, there is no room for text on them
MAX_WINDOW_SIZE = (1280, 720)  # px

# The names that OpenCV's samples give to the constants of cv2.dnn.
ENGINES = {"auto": "ENGINE_AUTO", "new": "ENGINE_NEW", "classic": "ENGINE_CLASSIC"}
BACKENDS = {
    "default": "DNN_BACKEND_DEFAULT",
    "opencv": "DNN_BACKEND_OPENCV",
    "openvino": "DNN_BACKEND_INFERENCE_ENGINE",
    "vkcom": "DNN_BACKEND_VKCOM",
    "cuda": "DNN_BACKEND_CUDA",
}
TARGETS = {
    "cpu": "DNN_TARGET_CPU",
    "opencl": "DNN_TARGET_OPENCL",
    "opencl_fp16": "DNN_TARGET_OPENCL_FP16",
    "ncs2_vpu": "DNN_TARGET_MYRIAD",
    "hddl_vpu": "DNN_TARGET_HDDL",
    "vulkan": "DNN_TARGET_VULKAN",
    "cuda": "DNN_TARGET_CUDA",
    "cuda_fp16": "DNN_TARGET_CUDA_FP16",
}


class RequestError(Exception):
    """The request can't be met: the message is the one line that the user reads."""

    exit_code = 2


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose help shows the docstring as it stands."""

    def __init__(self, docstring):
        super().__init__(
            description=docstring,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        self.exit(RequestError.exit_code, f"{self.prog}: error: {message} (see --help)\n")


def run(main):
    """Call `main` and end the process with its exit code; an error is one line on stderr."""
    script = Path(sys.argv[0]).name
    if "OPENCV_LOG_LEVEL" not in os.environ:  # what goes wrong is said here, in one line
        set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # 4, 5
        set_log_level(0)  # silent
    # kill, or a terminal that closes, ends the process by an exception, so that no half-written
    # file is left
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup ignores it
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda signum, frame: sys.exit(128 + signum))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # of names that the terminal can't show
    try:
        sys.exit(main())
    except RequestError as error:
        message, code = str(error), error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message, code = f"{where}{error.strerror or error}", RequestError.exit_code
    except cv2.error as error:
        message, code = f"OpenCV {cv2.__version__}: {one_line(error)}", RequestError.exit_code
    except KeyboardInterrupt:
        print(f"{script}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)  # as shells report it: 128 + SIGINT
    print(f"{script}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(code)


# --- the command line -----------------------------------------------------------------------------


def parse_bool(text):
    """True or False for what people type; argparse's type=bool would take "False" for True."""
    value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in value:
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return value[text.lower()]


def finite(text):
    """A number that float32 can hold: neither nan nor inf, which would make every answer nan."""
    try:
        number = float(text)
    except ValueError:
        number = np.nan
    if not abs(number) <= np.finfo(np.float32).max:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return number


def non_zero(text):
    """A finite number that one can divide by, or scale with and still see something."""
    number = finite(text)
    if abs(number) < np.finfo(np.float32).tiny:
        raise argparse.ArgumentTypeError("0 is not possible here")
    return number


def positive_int(text):
    if not (text.isascii() and text.isdecimal() and 0 < len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def available(names):
    """The entries of `names` whose constants this version of OpenCV has."""
    return {name: getattr(cv2.dnn, c) for name, c in names.items() if hasattr(cv2.dnn, c)}


# An option is a paragraph here, not an argument a line.
# fmt: off
def get_parser():
    parser = OneLineParser(__doc__)
    add = parser.add_argument
    add("alias", nargs="?", metavar="NAME",
        help="the entry of models.yml that names the model and its preprocessing; options given "
        "here win over it")
    add("--zoo", metavar="FILE",
        help=f"the file of the entries (default: {' or '.join(ZOO_PATHS)}, in the current folder "
        "or beside this script)")
    add("--input", nargs="+", default=[], metavar="FILE",
        help="the converted model (.onnx) and, in any order, the pictures, folders of pictures or "
        "videos to classify, or the number of a camera; with a model alone, the bundled picture")
    add("--model", metavar="FILE", help="the converted model, where it isn't among --input")
    add("--classes", metavar="FILE", help="text file of class names, one per line")
    add("--top_k", type=positive_int, default=1, metavar="K",
        help="answers per picture, each with its logit as confidence (default: 1)")
    add("--output", metavar="PATH",
        help="where the annotated picture or video is saved: a file, or without a suffix a folder "
        f"(default: {RESULTS_DIR}; a video that is shown, or a camera, is saved only where "
        "--output is given)")

    number = {"type": positive_int, "metavar": "PX"}
    yes_no = {"type": parse_bool, "metavar": "BOOL", "nargs": "?", "const": True}
    channels = {"nargs": 3, "metavar": ("R", "G", "B")}
    add = parser.add_argument_group(
        "preprocessing: the parameters of blobFromImage",
        "As the entry in models.yml says; without one as torchvision's ImageNet networks expect "
        "it: --scale 0.0039216 --mean 123.675 116.28 103.53 --std 0.229 0.224 0.225 --crop --rgb "
        "--initial_width 256 --initial_height 256. With --scale, --mean or --std and no NAME, as "
        "in OpenCV's samples: what is left out is what stands in brackets.",
    ).add_argument
    add("--scale", type=non_zero, metavar="S",
        help="scalefactor: multiply each value, after the mean is subtracted [1.0]")
    add("--mean", type=finite, **channels,
        help="mean: subtract these from the channels, in the order R G B with --rgb, else B G R "
        "[0 0 0]")
    add("--std", type=non_zero, **channels,
        help="divide the channels of the finished blob by these [no division]")
    add("--width", **number, help=f"size: the width of the blob (default: {FRAME_SIZE})")
    add("--height", **number, help=f"size: the height of the blob (default: {FRAME_SIZE})")
    add("--crop", **yes_no,
        help="crop: keep the aspect ratio, scale until the shorter side fits and cut the centre "
        "[False: stretch to the size]")
    add("--rgb", **yes_no, help="swapRB: the network takes RGB, OpenCV reads BGR [False]")
    add("--initial_width", **number,
        help="resize the picture to this width before the blob is made [no resize]")
    add("--initial_height", **number,
        help="resize the picture to this height before the blob is made [no resize]")

    add = parser.add_argument_group("inference").add_argument
    if available(ENGINES):  # OpenCV 5 has two; OpenCV 4 has one and no name for it
        add("--engine", choices=list(available(ENGINES)),
            help="OpenCV's inference engine: new is OpenCV 5's own, classic is OpenCV 4's, auto "
            "tries new first (default: the one that was right and faster when the model was "
            "converted, if the file says it, else auto)")
    add("--backend", choices=list(available(BACKENDS)), default="default",
        help="computation backend (default: default)")
    add("--target", choices=list(available(TARGETS)), default="cpu",
        help="computation device (default: cpu)")
    return parser
# fmt: on


def parse_args(argv=None):
    """The command line, with what it leaves out filled in.

    From the entry of models.yml that is named. Without a name, where the pixel values are given,
    from OpenCV's own sample, so that a command line written for it means the same here; else from
    the entry of the model's file, if there is a models.yml beside it, or with torchvision's
    preprocessing.
    """
    parser = get_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    defaults = TORCHVISION_PREPROCESSING
    entry = None
    if args.alias is not None:
        entry = find_entry(args)
    elif not (args.scale is None and args.mean is None and args.std is None):
        defaults = PLAIN_PREPROCESSING
    else:
        entry = find_entry_of_file(args)
    if entry is not None:
        args = parser.parse_args([*get_options(*entry, args), *argv])
        defaults = PLAIN_PREPROCESSING
    if (args.initial_width is None) != (args.initial_height is None):
        parser.error("--initial_width and --initial_height go together")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.width = args.width or FRAME_SIZE
    args.height = args.height or FRAME_SIZE
    return args


def find_entry(args):
    """(path of the models.yml, the entry args.alias in it)."""
    folders = (Path(), Path(__file__).resolve().parent)
    paths = [Path(args.zoo)] if args.zoo else [f / path for f in folders for path in ZOO_PATHS]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise RequestError(
            f"no {paths[0]} with an entry '{args.alias}': convert the network, or name another "
            "file with --zoo; pictures and models go after --input"
        )
    entries = {
        name: entry
        for name, entry in read_zoo(path).items()
        if isinstance(entry, dict) and entry.get("sample") == ZOO_SAMPLE
    }
    if args.alias not in entries:
        names = ", ".join(entries) or "none"
        raise RequestError(
            f"{path}: no entry '{args.alias}' for classification, but {names}; pictures and models "
            "go after --input"
        )
    return path, entries[args.alias]


def find_entry_of_file(args):
    """The same of the model that is given as a file; None where models.yml beside it has none."""
    models = [item for item in (*args.input, args.model or "") if is_model(item)]
    path = Path(models[0]).with_name(ZOO_NAME) if len(models) == 1 else None
    if path is None or not path.is_file():
        return None
    try:
        entry = read_zoo(path).get(Path(models[0]).stem)
    except RequestError:  # another program's
        return None
    known = isinstance(entry, dict) and entry.get("model") == Path(models[0]).name
    return (path, entry) if known else None


def get_options(path, entry, args):
    """An entry of the models.yml at `path` as a command line: what the user gives after it wins."""
    options = []
    if "model" in entry and not args.model and not any(is_model(item) for item in args.input):
        options += ["--model", find_beside(path, entry["model"])]
    if "classes" in entry:
        options += ["--classes", find_beside(path, entry["classes"])]
    for name in ZOO_OPTIONS:
        value = entry.get(name)
        if value not in (None, []):
            # argparse takes -1e-05 for an option
            values = value if isinstance(value, list) else [value]
            values = [np.format_float_positional(v) if isinstance(v, float) else v for v in values]
            options += [f"--{name}", *map(str, values)]
    return options


def find_beside(zoo_path, name):
    """A file that models.yml names: beside it, or else as seen from the current folder."""
    beside = os.path.normpath(zoo_path.parent / str(name))
    return beside if os.path.exists(beside) else str(name)


def read_zoo(path):
    """{name: entry} of a models.yml; an entry is a dictionary as well."""
    try:
        storage = cv2.FileStorage(check_name(str(path)), cv2.FILE_STORAGE_READ)
        entries = read_node(storage.root())
    except (cv2.error, SystemError):  # SystemError: the constructor's, in OpenCV 4.10 to 5.0
        entries = None
    if not isinstance(entries, dict):
        raise RequestError(f"{path}: no YAML of entries that cv2.FileStorage can read")
    return entries


def read_node(node):
    """The dictionary, list, number or text that a cv2.FileNode holds.

    `true` is 1 in OpenCV 5.0 and "true" in OpenCV 4; parse_bool takes both.
    """
    if node.isSeq():
        return [read_node(node.at(i)) for i in range(node.size())]
    if node.isInt():
        return int(node.real())
    if node.isReal():
        return node.real()
    if node.isString():
        return node.string()
    keys = node.keys()  # a cv2.FileNode isn't a dictionary: it can't be iterated over
    return {name: read_node(node.getNode(name)) for name in keys}


def describe_preprocessing(args):
    """The preprocessing in one line, since a wrong one gives wrong answers without an error."""

    def numbers(values):
        return " ".join(f"{v:g}" for v in values) or "none"

    resize = f"{args.initial_width}x{args.initial_height} -> " if args.initial_width else ""
    return (
        f"preprocessing: scale {args.scale:g}, mean {numbers(args.mean)}, "
        f"std {numbers(args.std)}, rgb {args.rgb}, crop {args.crop}, "
        f"size {resize}{args.width}x{args.height}"
    )


# --- reading --------------------------------------------------------------------------------------


def split_inputs(inputs, model=None):
    """Tell the model from what it shall classify: (model, sources)."""
    models = [item for item in inputs if is_model(item)]
    sources = [item for item in inputs if item not in models]
    if model is not None:
        models.append(model)
    if len(models) != 1:
        found = "no model" if not models else "more than one model"
        raise RequestError(f"{found} given: name one .onnx file, --input MODEL.onnx PICTURE")
    if not sources:
        if not BUNDLED_PICTURE.is_file():
            raise RequestError("no picture given: add one after --input")
        sources = [str(BUNDLED_PICTURE)]
    return models[0], sources


def is_model(name):
    return name.lower().endswith(".onnx")


def expand_sources(sources):
    """(kind, path) for each source, kind being "picture", "video" or "camera".

    A folder stands for the pictures in it, by name. Kinds are told by content.
    """
    found = []
    for source in sources:
        path = Path(check_name(source))
        if path.is_dir():
            pictures = [p for p in sorted(path.iterdir()) if is_picture(p)]
            if not pictures:
                raise RequestError(f"{source}: no picture in this folder")
            found += [("picture", str(p)) for p in pictures]
        elif source.isdecimal() and not path.exists():
            found.append(("camera", source))
        elif not path.is_file():
            reason = "no file" if path.exists() else "no such file or folder"
            raise RequestError(f"{source}: {reason}; give an existing picture")
        elif path.stat().st_size == 0:
            raise RequestError(f"{source}: the file is empty; give a picture or a video")
        elif is_picture(path) or path.suffix.lower() in SUFFIXES["picture"]:
            found.append(("picture", source))
        elif cv2.VideoCapture(source).isOpened():
            found.append(("video", source))
        else:
            raise RequestError(f"{source}: neither a picture nor a video that OpenCV can read")
    return found


def check_name(name):
    """The file name; cv2 5.0.0 dies on one that is empty or no UTF-8, so RequestError is raised."""
    try:
        if name.encode():
            return name
    except UnicodeEncodeError:
        pass
    raise RequestError(f"{name!r}: no file name for OpenCV; rename the file")


def is_picture(path):
    return path.is_file() and cv2.haveImageReader(check_name(str(path)))


def read_picture(path):
    """The picture at `path` as uint8 BGR, shape (height, width, 3), turned as its EXIF says.

    Raises RequestError where it is missing, empty, cut short or no picture at all.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}; give an existing picture") from None
    if not data:
        raise RequestError(f"{path}: the file is empty; give a picture")
    # libpng reports a file cut short on stderr by itself: ask before it does.
    cut_png = data.startswith(b"\x89PNG") and b"IEND" not in data
    try:
        # imdecode, because imread returns what it has got of a JPEG cut short, grey below.
        picture = None if cut_png else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # more than 2**30 pixels, say
        picture = None
    if picture is None:
        raise RequestError(f"{path}: cut short, or no picture that OpenCV can read")
    return picture


def read_lines(path, advice):
    """The lines of a text file; RequestError, with the advice, where it can't be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise RequestError(f"{path}: {reason}; {advice}") from None


def read_labels(path):
    """The class names, one per line of the file."""
    return read_lines(path, "--classes takes class names, one per line")


def get_labels(classes_file):
    """The class names of --classes, or ImageNet's where the project's files are; else []."""
    if classes_file is None and not BUNDLED_LABELS.is_file():
        return []
    return read_labels(classes_file or BUNDLED_LABELS)


def read_net(args, model):
    """cv2.dnn.Net of an ONNX file, with the engine, backend and target of the command line."""
    check_model(model)
    backend = available(BACKENDS)[args.backend]
    target = available(TARGETS)[args.target]
    # OpenCV would go on with the CPU and say so only in its log.
    if target not in cv2.dnn.getAvailableTargets(backend):
        raise RequestError(
            f"this OpenCV has no --target {args.target} on --backend {args.backend}; "
            "leave both out for the CPU"
        )
    engines = available(ENGINES)
    engine = getattr(args, "engine", None)
    if (args.backend, args.target) == ("default", "cpu"):
        known = (name for name in engines if has_metadata(model, "engine", name))
        return read_onnx(model, engines.get(engine or next(known, "auto")))
    if engine == "new":
        raise RequestError("--engine new runs on the CPU alone: leave out --backend, --target")
    # only the classic engine of OpenCV 5.0 knows backends and targets
    net = read_onnx(model, engines.get("classic"))
    net.setPreferableBackend(backend)
    net.setPreferableTarget(target)
    return net


def check_model(path):
    """Raise RequestError where there is no such file."""
    if not Path(check_name(str(path))).is_file():
        raise RequestError(f"{path}: no such file; give a converted model (.onnx)")


def read_onnx(path, engine=None):
    """cv2.dnn.Net of an ONNX file; engine: a cv2.dnn.ENGINE_ constant, or None for OpenCV's choice.

    Raises RequestError where the file is missing, cut short or not for OpenCV.
    """
    check_model(path)
    engines = [] if engine is None else [engine]
    try:
        return cv2.dnn.readNetFromONNX(str(path), *engines)
    except cv2.error as error:
        raise RequestError(
            f"{path}: OpenCV {cv2.__version__} can't read this as ONNX, it may be cut short: "
            + one_line(error)
        ) from None


def one_line(error):
    """OpenCV's own words of a cv2.error: without file, function and line breaks."""
    return " ".join((getattr(error, "err", None) or str(error)).split())


# --- one picture: blob, forward pass, answer ------------------------------------------------------


def get_blob(picture, args):
    """float32 blob, shape (1, 3, args.height, args.width), of a BGR picture (height, width, 3).

    (picture - mean) * scale / std. crop=True is OpenCV's: it scales the shorter side to the
    blob first, so of a square picture nothing is cut.
    """
    # float before the resize: rounding to uint8 after it would shift the logits by about 0.01
    picture = picture.astype(np.float32)
    if args.initial_width:
        picture = cv2.resize(picture, (args.initial_width, args.initial_height))
    blob = cv2.dnn.blobFromImage(
        picture,
        scalefactor=args.scale,
        size=(args.width, args.height),
        mean=args.mean,  # in RGB order where swapRB is set: OpenCV swaps these as well
        swapRB=args.rgb,
        crop=args.crop,
    )
    if args.std:
        blob /= np.asarray(args.std, np.float32).reshape(1, 3, 1, 1)
    return blob


def forward(net, blob):
    """(logits of shape (classes,), seconds of the forward pass)."""
    start = time.perf_counter()
    try:
        net.setInput(blob)
        out = net.forward()
    except cv2.error as error:
        size = f"{blob.shape[3]}x{blob.shape[2]}"
        raise RequestError(
            f"the network can't take a {size} picture; set --width and --height to the size it "
            "was converted with: " + one_line(error)
        ) from None
    seconds = time.perf_counter() - start
    outputs = len(net.getUnconnectedOutLayersNames())
    if outputs != 1 or out is None or out.ndim != 2 or len(out) != 1 or out.dtype != np.float32:
        raise RequestError("not a classifier: its output is not one of shape (1, classes), float32")
    if not np.isfinite(out).all():
        raise RequestError(
            "the network answers nan or inf: check --scale, --mean and --std, or convert it again"
        )
    return out[0], seconds


@dataclass
class Answer:
    best: list  # (class ID, label, logit), the highest logit first
    seconds: float  # of the forward pass
    random: bool  # of a network with random weights
    fps: float | None = None  # of the video so far: frames per second


def get_answer(logits, seconds, labels, args, random):
    """The args.top_k best classes of logits (classes,)."""
    best = np.argsort(-logits, kind="stable")[: args.top_k]
    names = fit_labels(labels, args.classes, len(logits))
    return Answer(
        best=[(int(i), names[i] if names else f"Class #{i}", float(logits[i])) for i in best],
        seconds=seconds,
        random=random,
    )


def is_random(model):
    """Whether the file's name or its metadata say that its weights are random."""
    return Path(model).stem.endswith(RANDOM_SUFFIX) or has_metadata(model, "weights", "random")


def has_metadata(model, key, value):
    """Whether a converted file says this of itself: ONNX metadata, at the end of the file."""
    with open(model, "rb") as file:
        file.seek(max(0, os.path.getsize(model) - 4096))
        # as protobuf writes it: a tag, the length, the text
        pair = b"\n%c%b\x12%c%b" % (len(key), key.encode(), len(value), value.encode())
        return pair in file.read()


def fit_labels(labels, classes_file, classes):
    """`labels` if there is one for each class, None if not; RequestError if they were asked for."""
    if len(labels) == classes:
        return labels
    if classes_file is None:
        return None
    raise RequestError(
        f"{classes_file}: {len(labels)} lines, but the network has {classes} outputs; "
        "--classes takes a line for each"
    )


def print_answer(name, answer):
    print(f"{name}:")
    for class_id, label, logit in answer.best:
        print(f"* class ID: {class_id}, label: {label}")
        print(f"* confidence: {logit:.4f}")
    if answer.random:
        print(f"* {RANDOM_WARNING}")
    print(f"* inference time: {answer.seconds * 1000:.1f} ms", flush=True)


# --- the annotated picture ------------------------------------------------------------------------


def annotate(picture, answer, grow=True):
    """Write the answer into the top left corner of `picture`, in lines wrapped to its width.

    Returns the picture, or a larger copy of one that has no room for the text. With grow=False
    it keeps its size, and the text is cut off.
    """
    lines = [f"{label}: {logit:.4f}" for _, label, logit in answer.best]
    lines.append(f"Inference time: {answer.seconds * 1000:.1f} ms")
    if answer.fps is not None:
        lines.append(f"{answer.fps:.1f} frames per second")
    if answer.random:
        lines.append(RANDOM_WARNING)

    height, width = picture.shape[:2]
    if grow and width < MIN_RESULT_WIDTH:
        zoom = min(MIN_RESULT_WIDTH / width, max(1, MAX_WINDOW_SIZE[1] / height))
        picture = cv2.resize(picture, (round(width * zoom), max(1, round(height * zoom))))
        right = max(0, MIN_RESULT_WIDTH - picture.shape[1])  # of a thin picture
        picture = cv2.copyMakeBorder(picture, 0, 0, 0, right, cv2.BORDER_CONSTANT)
        height, width = picture.shape[:2]

    font = cv2.FONT_HERSHEY_SIMPLEX
    text_height = max(12, width // 45)  # px of a capital letter
    scale = text_height / cv2.getTextSize("A", font, 1.0, 1)[0][1]
    thickness = max(1, round(scale * 1.5))
    margin = text_height // 2
    step = 2 * text_height

    def text_width(text):
        return cv2.getTextSize(text, font, scale, thickness)[0][0]

    rows = []
    for line in lines:
        rows.append("")
        for word in line.split():
            longer = f"{rows[-1]} {word}".strip()
            if rows[-1] and text_width(longer) > width - 2 * margin:
                rows.append(word)
            else:
                rows[-1] = longer

    box_height = len(rows) * step + margin
    box_width = min(width, max(map(text_width, rows)) + 2 * margin)
    if grow and box_height > height:  # a flat picture gets a black strip for the text
        below = box_height - height
        picture = cv2.copyMakeBorder(picture, 0, below, 0, 0, cv2.BORDER_CONSTANT)
    picture[:box_height, :box_width] //= 4  # darkened, so that text is legible on any picture
    for number, row in enumerate(rows):
        origin = (margin, number * step + margin + text_height)
        cv2.putText(picture, row, origin, font, scale, (0, 255, 0), thickness, cv2.LINE_AA)
    return picture


# --- saving and showing ---------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`, which becomes `path` once the block is done.

    Whatever breaks the block off leaves nothing behind. Folders are made as needed. Raises
    RequestError where the file can't be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        yield part
        os.replace(part, path)
    except OSError as error:
        raise RequestError(f"{path}: can't be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_picture(path, picture):
    """Write `picture` (height, width, 3), in the format of the suffix of `path`."""
    with whole_file(path) as part:
        # imencode, because imwrite doesn't say that the disk is full
        encoded, data = cv2.imencode(Path(path).suffix, picture)
        if not encoded:
            raise RequestError(f"{path}: OpenCV can't write this picture so; try --output X.png")
        part.write_bytes(data)


def get_output_paths(sources, model, output):
    """Where each annotated source would go: `output` if it has a suffix, else in that folder."""
    if output and Path(output).suffix and not Path(output).is_dir():
        if len(sources) > 1:
            raise RequestError(
                f"--output {output} is a file, for {len(sources)} inputs; name a folder"
            )
        paths = [Path(output)]
    else:
        folder = Path(output or RESULTS_DIR)
        paths = []
        for kind, source in sources:
            path = Path(source)
            suffix = path.suffix if path.suffix.lower() in SUFFIXES[kind] else SUFFIXES[kind][0]
            stem = f"camera{source}" if kind == "camera" else path.stem
            paths.append(folder / f"{stem}_{Path(model).stem}{suffix}")
    for (kind, _), path in zip(sources, paths, strict=True):
        if path.suffix.lower() not in SUFFIXES[kind]:
            raise RequestError(
                f"--output {path}: a {kind} is saved as {' '.join(SUFFIXES[kind])}; a folder with "
                "a dot in its name must be there already"
            )
        if paths.count(path) > 1:
            raise RequestError(f"two results would be saved as {path}; classify them one by one")
        if path.exists() and any(path.samefile(s) for _, s in sources if Path(s).exists()):
            raise RequestError(f"--output {path} is an input; name another file")
    return [Path(check_name(str(path))) for path in paths]


def has_display():
    """Whether a window can be shown.

    Without a display, opencv-python's Qt doesn't raise: it aborts the whole process (seen with
    OpenCV 5.0.0, exit 134; https://github.com/opencv/opencv/issues/13682). So a child process
    tries first. Once cv2.namedWindow raises, a try/except will do.
    """
    on_linux = sys.platform.startswith("linux")
    if on_linux and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    probe = [sys.executable, "-c", "import cv2; cv2.namedWindow('probe')"]
    try:
        return subprocess.run(probe, capture_output=True, timeout=10).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def show(picture):
    """Show `picture` in the window, made to fit the screen."""
    height, width = picture.shape[:2]
    zoom = min(1, MAX_WINDOW_SIZE[0] / width, MAX_WINDOW_SIZE[1] / height)
    if zoom < 1:  # a window that scales drops lines of pixels, and the text with them
        size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    cv2.namedWindow(WINDOW, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)
    cv2.imshow(WINDOW, picture)


def window_closed(milliseconds):
    """Wait so long for a key; True where one was pressed or the window was closed."""
    if cv2.waitKey(milliseconds) >= 0:
        return True
    return cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) < 1


# --- the two kinds of source ----------------------------------------------------------------------


def classify_picture(path, prepare, ask, output, window):
    """Classify one picture, print the answer, save the annotated picture, show it."""
    picture = read_picture(path)
    answer = ask(prepare(picture))
    print_answer(path, answer)
    result = annotate(picture, answer)
    write_picture(output, result)
    print(f"* saved: {output}", flush=True)
    if window:
        show(result)
        # waitKey(0) would see neither Ctrl-C nor a window closed with the mouse
        while not window_closed(50):
            pass
        cv2.destroyAllWindows()


def classify_video(kind, source, prepare, ask, output, window):
    """Classify each frame of a video or camera; print each change of the first answer.

    `output` None: nothing is saved. A key, or Ctrl-C, ends it; what is saved until then is whole.
    """
    capture = cv2.VideoCapture(int(source) if kind == "camera" else source)
    capture_frames = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    read, frame = capture.read()
    if not read:
        hint = "is it connected?" if kind == "camera" else "the file may be cut short"
        raise RequestError(f"{kind} {source}: no frame can be read; {hint}")
    with whole_file(output) if output else contextlib.nullcontext() as part:
        writer = open_video(part, output, capture, frame) if part else None

        def finish(frame, answer):
            result = annotate(frame, answer, grow=False)
            if writer is not None:
                writer.write(result)
            return result

        last, frames, interrupted = None, 0, False
        start = time.perf_counter()
        # A frame is annotated and written while the next one is decoded and made into a blob; a
        # forward pass has all cores to itself, or it would wait for the core that has other work.
        with ThreadPoolExecutor(1) as thread:
            finished = thread.submit(lambda: None)
            try:
                while read:
                    blob = prepare(frame)
                    finished.result()
                    answer = ask(blob)
                    frames += 1
                    answer.fps = frames / (time.perf_counter() - start)
                    if answer.best[0][0] != last:
                        last = answer.best[0][0]
                        print_answer(f"{source}, frame {frames}", answer)
                    finished = thread.submit(finish, frame, answer)
                    if window:
                        show(finished.result())
                        if window_closed(1):
                            break
                    read, frame = capture.read()
                finished.result()
            except KeyboardInterrupt:
                interrupted = True
        fps = frames / (time.perf_counter() - start)
        capture.release()
        if writer is not None:
            writer.release()
        # VideoWriter doesn't say that the disk is full
        if part and cv2.VideoCapture(str(part)).get(cv2.CAP_PROP_FRAME_COUNT) != frames:
            raise RequestError(f"{output}: can't be written whole; is the disk full?")
    promised = int(capture_frames) if capture_frames > frames else frames
    print(f"{source}: {frames} of {promised} frames, {fps:.1f} frames per second")
    if output:
        print(f"* saved: {output}")
    if interrupted:
        raise KeyboardInterrupt


def open_video(part, output, capture, frame):
    """cv2.VideoWriter of frames like `frame`, at the rate of `capture`."""
    fourcc = "MJPG" if output.suffix.lower() == ".avi" else "mp4v"
    rate = capture.get(cv2.CAP_PROP_FPS)
    rate = rate if 0 < rate <= 1000 else 25  # some cameras and files don't say
    size = (frame.shape[1], frame.shape[0])
    writer = cv2.VideoWriter(str(part), cv2.VideoWriter_fourcc(*fourcc), rate, size)
    if not writer.isOpened():
        raise RequestError(f"{output}: OpenCV can't write this video; try a .mp4 in another folder")
    return writer


def main():
    args = parse_args()
    model, sources = split_inputs(args.input, args.model)
    sources = expand_sources(sources)
    outputs = get_output_paths(sources, model, args.output)
    labels = get_labels(args.classes)
    net = read_net(args, model)
    random = is_random(model)
    window = has_display()
    print(describe_preprocessing(args))

    def prepare(picture):
        return get_blob(picture, args)

    def ask(blob):
        """The network's Answer for the blob of a picture."""
        logits, seconds = forward(net, blob)
        return get_answer(logits, seconds, labels, args, random)

    for (kind, source), output in zip(sources, outputs, strict=True):
        if kind == "picture":
            classify_picture(source, prepare, ask, output, window)
        else:
            keep = args.output or (kind == "video" and not window)
            classify_video(kind, source, prepare, ask, output if keep else None, window)
    return 0


if __name__ == "__main__":
    run(main)
