"""Classify pictures, folders, videos or a camera with a converted network.

It needs nothing but cv2 and NumPy, so you can copy it anywhere by itself:

    python classification.py --input resnet50.onnx cat.jpg
    python classification.py --input resnet50.onnx cat.jpg --top_k 5
    python classification.py --input resnet50.onnx 0        # camera 0
    python classification.py resnet50 --input cat.jpg       # as models.yml says

models.yml says what each network needs; its entry is found by NAME or by the
model file. Without an entry, pictures are prepared as torchvision's ImageNet
networks expect them; or, if you give --scale, --mean or --std, with the
defaults of OpenCV's samples for everything you leave out.
"""

import argparse
import dataclasses
import hashlib
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

# Beside this file in the project it comes from. Elsewhere they are missing, and not needed.
BUNDLED_DATA = Path(__file__).resolve().parent / "test_data" / "cls"
BUNDLED_PICTURE = BUNDLED_DATA / "red_panda.jpg"
BUNDLED_LABELS = BUNDLED_DATA / "imagenet_classes.txt"

# The converted networks, relative to the current folder or to the folder of this file.
ZOO_NAME = "models.yml"
ZOO_PATHS = (os.path.join("models", ZOO_NAME), ZOO_NAME)
ZOO_SAMPLE = "classification"  # what OpenCV's samples call the entries that are for this one

RESULTS_DIR = "results"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov")

# Model files with this suffix hold random weights; an entry says it as `weights: random`.
RANDOM = "random"
RANDOM_SUFFIX = f"-{RANDOM}"
RANDOM_WARNING = "RANDOM WEIGHTS: this answer means nothing"

WINDOW = "Classification with OpenCV DNN"
MIN_RESULT_SIZE = (640, 480)  # px: on a smaller picture nobody could read the text
MAX_WINDOW_SIZE = (1280, 720)  # px

# What OpenCV's samples call the constants of cv2.dnn.
ENGINES = {"auto": "ENGINE_AUTO", "new": "ENGINE_NEW", "classic": "ENGINE_CLASSIC"}
BACKENDS = {
    "default": "DNN_BACKEND_DEFAULT", "opencv": "DNN_BACKEND_OPENCV",
    "openvino": "DNN_BACKEND_INFERENCE_ENGINE", "vkcom": "DNN_BACKEND_VKCOM",
    "cuda": "DNN_BACKEND_CUDA",
}  # fmt: skip
TARGETS = {
    "cpu": "DNN_TARGET_CPU", "opencl": "DNN_TARGET_OPENCL",
    "opencl_fp16": "DNN_TARGET_OPENCL_FP16", "ncs2_vpu": "DNN_TARGET_MYRIAD",
    "hddl_vpu": "DNN_TARGET_HDDL", "vulkan": "DNN_TARGET_VULKAN",
    "cuda": "DNN_TARGET_CUDA", "cuda_fp16": "DNN_TARGET_CUDA_FP16",
}  # fmt: skip


class RequestError(Exception):
    """The request can't be met. The message is the one line that the user reads."""

    exit_code = 2


class OneLineParser(argparse.ArgumentParser):
    """argparse with one-line errors, a short usage line, and the docstring as its help."""

    def __init__(self, docstring, usage):
        super().__init__(
            description=docstring,
            usage=f"%(prog)s {usage}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        self.exit(RequestError.exit_code, f"{self.prog}: error: {message} (see --help)\n")


def run(main):
    """Call `main` and exit with its code. An error is one line on stderr."""
    if "OPENCV_LOG_LEVEL" not in os.environ:  # errors are reported below, in one line
        set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # 4, 5
        set_log_level(0)  # silent
    # Let kill, or a terminal that closes, raise SystemExit, so that temporary files are removed.
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup ignores it
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda signum, frame: sys.exit(128 + signum))
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, by >&- for instance
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the process ends)
        getattr(sys, name).reconfigure(errors="backslashreplace")  # names the terminal can't show
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, head for instance, has seen enough: no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # 128 + SIGPIPE, what a shell reports for cat
    except (RequestError, OSError, cv2.error) as error:
        report(error)
        code = getattr(error, "exit_code", RequestError.exit_code)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped by Ctrl-C", file=sys.stderr)
        code = 130  # 128 + SIGINT, what a shell reports
    sys.exit(code)


def report(error):
    """Print an error as one line on stderr."""
    source = f"OpenCV {cv2.__version__}: " if isinstance(error, cv2.error) else ""
    print(f"{Path(sys.argv[0]).name}: error: {source}{one_line(error)}", file=sys.stderr)


def one_line(error):
    """The text of an error: OSError's with the file, OpenCV's without its source file."""
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, cv2.error):
        text = error.err or text
    return " ".join(text.split())


# --- preprocessing --------------------------------------------------------------------------------


def parse_bool(text):
    """True or False for what people type; argparse's type=bool would take "False" for True."""
    value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in value:
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return value[text.lower()]


def finite(text):
    """A number that float32 can hold; with nan or inf every answer would be nan."""
    try:
        number = float(text)
    except ValueError:
        number = np.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return number


def non_zero(text):
    """A finite number that float32 can divide by."""
    if abs(finite(text)) < np.finfo(np.float32).tiny:
        raise argparse.ArgumentTypeError("0 is not possible here")
    return finite(text)


def positive_int(text):
    """A whole number from 1 to 999999999."""
    if not (text.isascii() and text.isdecimal() and 0 < len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def setting(default, parse, text, **how):
    """A field of Preprocessing: default, parser of one value, help, and more for argparse."""
    how = {"metavar": "V", **how, "help": text}
    return dataclasses.field(default=default, metadata={"parse": parse, "how": how})


# fmt: off
@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a blob. The defaults are those of OpenCV's samples.

    Each field is an option of this script and a key of models.yml.
    """

    scale: float = setting(1.0, non_zero,
        "scalefactor: multiply by this, after subtracting the mean [1.0]")
    mean: tuple = setting((0.0, 0.0, 0.0), finite,
        "subtract these; in the order R G B with --rgb, else B G R [0 0 0]", nargs="+")
    std: tuple = setting((), non_zero,
        "divide the channels of the finished blob by these [none]", nargs="+")
    rgb: bool = setting(False, parse_bool,
        "swapRB: the network takes RGB, OpenCV reads BGR [False]", nargs="?", const="True")
    crop: bool = setting(False, parse_bool,
        "blobFromImage's crop: scale the shorter side to the blob and cut off the rest "
        "[False: stretch]", nargs="?", const="True")
    width: int = setting(224, positive_int, "width of the blob, px [224]")
    height: int = setting(224, positive_int, "height of the blob, px [224]")
    initial_width: int | None = setting(None, positive_int,
        "resize the picture to this width first, px [no resize]")
    initial_height: int | None = setting(None, positive_int,
        "resize the picture to this height first, px [no resize]")
    # fmt: on

    def __str__(self):
        """One line, always printed: a wrong preprocessing gives wrong answers without an error."""
        mean, std = (" ".join(f"{v:g}" for v in c) or "none" for c in (self.mean, self.std))
        resize = f"{self.initial_width}x{self.initial_height} -> " if self.initial_width else ""
        return (
            f"preprocessing: scale {self.scale:g}, mean {mean}, std {std}, rgb {self.rgb}, "
            f"crop {self.crop}, size {resize}{self.width}x{self.height}"
        )


# What torchvision's ImageNet networks expect, with pixel values from 0 to 255:
# https://docs.pytorch.org/vision/stable/models.html. This file travels alone, so the numbers are
# here as well as in default_preprocess_config.py; a test compares them.
MEAN, STD = (123.675, 116.28, 103.53), (0.229, 0.224, 0.225)
TORCHVISION_PREPROCESSING = Preprocessing(1 / 255, MEAN, STD, True, True, 224, 224, 256, 256)


def parse_preprocessing(found, source, names=None):
    """{field: value} of Preprocessing from {name: text, number or list}; None and "" are left out.

    source: where they are from, for the RequestError; names: {field: name} of those with others.
    """
    values, names = {}, names or {}
    for field in dataclasses.fields(Preprocessing):
        name = names.get(field.name, field.name)
        if (value := found.get(name)) in (None, "", []):
            continue
        texts = " ".join(map(str, value if isinstance(value, list) else [value])).split()
        try:
            parsed = tuple(map(field.metadata["parse"], texts))
        except argparse.ArgumentTypeError as error:
            raise RequestError(f"{source}{name}: {error}") from None
        count = 3 if isinstance(field.default, tuple) else 1
        if len(parsed) != count:
            raise RequestError(f"{source}{name}: takes {count} values, not {len(parsed)}")
        values[field.name] = parsed if count == 3 else parsed[0]
    if ("initial_width" in values) != ("initial_height" in values):
        pair = [source + names.get(name, name) for name in ("initial_width", "initial_height")]
        raise RequestError(f"{pair[0]} and {pair[1]} go together")
    return values


def get_preprocessing(args, zoo, entry):
    """The Preprocessing of the command line: an option wins over the entry, field by field."""
    given = parse_preprocessing(vars(args), "--")
    if entry:
        source = f"{zoo}: {args.alias or entry['model']}: "
        return Preprocessing(**parse_preprocessing(entry, source) | given)
    base = Preprocessing() if given.keys() & {"scale", "mean", "std"} else TORCHVISION_PREPROCESSING
    return dataclasses.replace(base, **given)


def get_blob(picture, preprocessing):
    """float32 blob of shape (1, 3, height, width) from a BGR picture (height, width, 3).

    (picture - mean) * scale / std. blobFromImage's crop scales the shorter side of the picture to
    the blob first, so nothing is cut off a square picture.
    """
    p = preprocessing
    # float before the resize: rounding to uint8 after it would shift the logits by about 0.01
    picture = picture.astype(np.float32)
    if p.initial_width:
        picture = cv2.resize(picture, (p.initial_width, p.initial_height))
    # the mean is in RGB order if swapRB is set: OpenCV swaps it as well
    blob = cv2.dnn.blobFromImage(picture, p.scale, (p.width, p.height), p.mean, p.rgb, p.crop)
    return blob / np.float32(p.std).reshape(1, 3, 1, 1) if p.std else blob


# --- the command line -----------------------------------------------------------------------------


def available(names):
    """{name: constant} of those that this version of OpenCV has."""
    return {name: getattr(cv2.dnn, c) for name, c in names.items() if hasattr(cv2.dnn, c)}


# fmt: off
def get_parser():
    parser = OneLineParser(__doc__, "[NAME] [--input FILE ...] [options]")
    add = parser.add_argument
    add("alias", nargs="?", metavar="NAME",
        help="the entry of models.yml with the model and its preprocessing; options win over it")
    add("--zoo", metavar="FILE",
        help=f"the file with the entries (default: {' or '.join(ZOO_PATHS)}, in the current folder "
        "or beside this script)")
    add("--input", nargs="+", default=[], metavar="FILE",
        help="the model (.onnx) and, in any order, pictures, folders of pictures, videos, or the "
        "number of a camera; with a model alone, the bundled picture")
    add("--model", metavar="FILE", help="the model, if it isn't among --input")
    add("--classes", "--labels", metavar="FILE", help="text file of class names, one per line")
    add("--top_k", type=positive_int, default=1, metavar="K",
        help="answers per picture, each with its logit as confidence (default: 1)")
    add("--output", metavar="PATH",
        help="save the annotated picture or video here: a file, or a folder if it has no suffix "
        f"(default: {RESULTS_DIR}; a camera, or a video that is shown, is saved only if you give "
        "--output)")

    add = parser.add_argument_group(
        "preprocessing: the parameters of blobFromImage",
        "Default: what the entry in models.yml says. Without an entry, torchvision's\n"
        "ImageNet preprocessing; but if you give --scale, --mean or --std, the defaults\n"
        "in brackets, which are those of OpenCV's samples.",
    ).add_argument
    for field in dataclasses.fields(Preprocessing):
        add(f"--{field.name}", **field.metadata["how"])

    add = parser.add_argument_group("inference").add_argument
    if available(ENGINES):  # OpenCV 5 has two; OpenCV 4 has one and no name for it
        add("--engine", choices=list(available(ENGINES)),
            help="OpenCV's inference engine: new is OpenCV 5's own, classic is OpenCV 4's, auto "
            "tries new first (default: what the entry says, else auto)")
    add("--backend", choices=list(available(BACKENDS)), default="default",
        help="computation backend (default: default)")
    add("--target", choices=list(available(TARGETS)), default="cpu",
        help="computation device (default: cpu)")
    return parser
# fmt: on


def split_inputs(args):
    """(model or None, sources) of --input and --model."""
    models = [item for item in args.input if item.lower().endswith(".onnx")]
    sources = [item for item in args.input if item not in models]
    models += [args.model] if args.model else []
    if len(models) > 1:
        raise RequestError(f"more than one model: {' '.join(models)}; name one .onnx file")
    if not models and args.alias is None:
        raise RequestError("no model: name one .onnx file, --input MODEL.onnx PICTURE")
    if not sources and not BUNDLED_PICTURE.is_file():
        raise RequestError("no picture: add one after --input")
    return (models or [None])[0], sources or [str(BUNDLED_PICTURE)]


# --- models.yml -----------------------------------------------------------------------------------


def find_entry(args, model):
    """(path of the models.yml, the entry) of args.alias, else of the model file.

    (None, {}) if a model file has no entry. Raises RequestError if a name has none.
    """
    if args.alias is None:
        path = Path(args.zoo or Path(model).with_name(ZOO_NAME))
        entry = read_zoo(path).get(Path(model).stem) if path.is_file() else None
        known = isinstance(entry, dict) and entry.get("model") == Path(model).name
        return (path, entry) if known else (None, {})
    folders = (Path(), Path(__file__).resolve().parent)
    paths = [Path(args.zoo)] if args.zoo else [f / path for f in folders for path in ZOO_PATHS]
    for path in paths:
        entry = read_zoo(path).get(args.alias) if path.is_file() else None
        if isinstance(entry, dict) and entry.get("sample") == ZOO_SAMPLE:
            return path, entry
    searched = ", ".join(dict.fromkeys(os.path.normpath(path) for path in paths))
    raise RequestError(
        f"no entry '{args.alias}' for classification in {searched}: convert the network, or name "
        "another file with --zoo; pictures and models go after --input"
    )


def find_file(zoo, entry, name):
    """A file that an entry names: beside the models.yml, in the current folder, or where OpenCV's
    samples look: https://github.com/opencv/opencv/blob/5.x/samples/dnn/common.py
    """
    folders = [zoo.parent, Path()]
    if cache := os.environ.get("OPENCV_DOWNLOAD_CACHE_DIR"):
        sha1 = get_expected(entry).get("sha1", "")
        folders += [Path(cache, str(sha1)), Path(cache)]
    if data := os.environ.get("OPENCV_SAMPLES_DATA_PATH"):
        folders += [Path(data), Path(data, "dnn")]
    paths = [os.path.normpath(folder / str(name)) for folder in folders]
    return next(filter(os.path.exists, paths), str(name))


def read_zoo(path):
    """{name: entry} of a models.yml; an entry is a dictionary as well."""
    try:
        storage = cv2.FileStorage(check_name(str(path)), cv2.FILE_STORAGE_READ)
        entries = read_node(storage.root())
    # SystemError: from the constructor, in OpenCV 4.10 to 5.0; ValueError: texts that aren't UTF-8
    except (cv2.error, SystemError, ValueError):
        entries = None
    if not isinstance(entries, dict):
        raise RequestError(
            f"{path}: OpenCV can't read this as YAML; repair it, or delete it and convert again"
        )
    return entries


def read_node(node):
    """The dictionary, list, number or text of a cv2.FileNode.

    `true` is 1 in OpenCV 5.0 and "true" in OpenCV 4; parse_bool takes both.
    """
    if node.isSeq():
        return [read_node(node.at(i)) for i in range(node.size())]
    if node.isInt() or node.isReal():
        return int(node.real()) if node.isInt() else node.real()
    if node.isString():
        return node.string()
    return {name: read_node(node.getNode(name)) for name in node.keys()}  # noqa: SIM118


# --- reading --------------------------------------------------------------------------------------


def expand_sources(sources):
    """[(kind, path)], the kind being "picture", "video" or "camera", recognized by content.

    A folder stands for the pictures in it, sorted by name.
    """
    found = []
    for source in sources:
        path = Path(check_name(source))
        if path.is_dir():
            pictures = [("picture", str(p)) for p in sorted(path.iterdir()) if is_picture(p)]
            if not pictures:
                raise RequestError(f"{source}: no picture in this folder")
            found += pictures
        elif source.isdecimal() and not path.exists():
            found.append(("camera", source))
        elif not path.is_file():
            raise RequestError(f"{source}: no such file or folder; give an existing picture")
        else:
            video = not is_picture(path) and cv2.VideoCapture(source).isOpened()
            found.append(("video" if video else "picture", source))
    return found


def check_name(name):
    """The file name. cv2 5.0.0 crashes on "" and on names that aren't UTF-8: RequestError."""
    try:
        if name.encode():
            return name
    except UnicodeEncodeError:
        pass
    raise RequestError(f"{name!r}: OpenCV can't open files of this name; rename it")


def is_picture(path):
    """Whether it is a file with a picture's suffix, or that OpenCV recognizes as a picture."""
    known = path.suffix.lower() in PICTURE_SUFFIXES
    return path.is_file() and (known or cv2.haveImageReader(check_name(str(path))))


def read_picture(path):
    """The picture as uint8 BGR (height, width, 3), turned as its EXIF says; or RequestError."""
    try:
        data = np.frombuffer(Path(path).read_bytes(), np.uint8)
        # imdecode, because imread fills the missing part of a truncated JPEG with grey
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR)
    except OSError as error:
        raise RequestError(one_line(error)) from None
    except cv2.error:  # an empty file, or more than 2**30 pixels
        picture = None
    if picture is None:
        raise RequestError(f"{path}: truncated, or not a picture that OpenCV can read")
    return picture


def read_lines(path):
    """The lines of a text file, class names for instance."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise RequestError(f"{path}: not a text file") from None


def fit_labels(labels, path, classes):
    """`labels` if there is one per class; else [] for the default ones (path None), or an error."""
    if len(labels) == classes or path is None:
        return labels if len(labels) == classes else []
    raise RequestError(
        f"{path}: {len(labels)} lines, but the network has {classes} outputs; --classes takes one "
        "line for each"
    )


def read_net(model, entry, args):
    """cv2.dnn.Net of the model file on the engine, backend and target of the command line.

    While OpenCV reads the file, a thread compares its SHA-1 with the entry's.
    """
    backend, target = available(BACKENDS)[args.backend], available(TARGETS)[args.target]
    if target not in cv2.dnn.getAvailableTargets(backend):  # OpenCV would silently use the CPU
        raise RequestError(
            f"this OpenCV has no --target {args.target} on --backend {args.backend}; leave both "
            "out for the CPU"
        )
    engine = getattr(args, "engine", None)  # OpenCV 4 has no such option
    on_cpu = (args.backend, args.target) == ("default", "cpu")
    if not on_cpu and engine == "new":
        raise RequestError("--engine new runs on the CPU only: leave out --backend and --target")
    if engine is None:  # backends and targets are for the classic engine only (OpenCV 5.0)
        engine = entry.get("engine", "auto") if on_cpu else "classic"
    check_model(model)
    with ThreadPoolExecutor(1) as thread:
        check = thread.submit(check_load_info, model, entry)
        try:
            net = read_onnx(model, engine)
        finally:
            check.result()  # raises, and says more than OpenCV about a file that it can't read
    if not on_cpu:
        net.setPreferableBackend(backend)
        net.setPreferableTarget(target)
    return net


def get_digest(path, algorithm):
    """The "sha1" or "sha256" of a file, in hexadecimal."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def get_load_info(model):
    """{"sha1": of a model file} as in OpenCV's models.yml, and of the .data beside a large one."""
    files = {"sha1": Path(model), "data_sha1": Path(f"{model}.data")}
    return {key: get_digest(path, "sha1") for key, path in files.items() if path.exists()}


def get_expected(entry):
    """The hashes in an entry's load_info, like get_load_info's; {} if it has none."""
    expected = entry.get("load_info")
    return expected if isinstance(expected, dict) else {}


def check_load_info(model, entry):
    """Raise RequestError if the model file isn't the one that its entry was written for."""
    expected = get_expected(entry)
    found = get_load_info(model) if expected else {}
    if any(expected.get(key, digest) != digest for key, digest in found.items()):
        raise RequestError(
            f"{model}: not the file that was converted: its SHA-1 isn't the one in {ZOO_NAME}; "
            "convert it again"
        )


def check_model(path):
    """Raise RequestError if there is no such file."""
    if not Path(check_name(str(path))).is_file():
        raise RequestError(f"{path}: no such file; give a converted model (.onnx)")


def read_onnx(path, engine):
    """cv2.dnn.Net of an ONNX file on one of ENGINES; RequestError if OpenCV can't read it."""
    engines = available(ENGINES)
    if engines and engine not in engines:
        raise RequestError(f"unknown engine '{engine}': it is one of {', '.join(engines)}")
    try:
        return cv2.dnn.readNetFromONNX(str(path), *([engines[engine]] if engines else []))
    except cv2.error as error:
        raise RequestError(
            f"{path}: OpenCV {cv2.__version__} can't read this as ONNX, it may be truncated: "
            + one_line(error)
        ) from None


# --- the answer -----------------------------------------------------------------------------------


@dataclass
class Classifier:
    """A network with what it needs to answer."""

    net: cv2.dnn.Net
    preprocessing: Preprocessing
    labels: list  # class names
    classes: str | None  # the file that they must come from; None: ImageNet's, if they fit
    top_k: int
    random: bool  # whether it has random weights

    def __call__(self, picture):
        """([(class ID, label, logit)], best first, ms of the forward pass) for a BGR picture."""
        logits, ms = forward(self.net, get_blob(picture, self.preprocessing))
        names = fit_labels(self.labels, self.classes, len(logits))
        best = np.argsort(-logits, kind="stable")[: self.top_k]
        return [(int(i), names[i] if names else f"Class #{i}", logits[i]) for i in best], ms


def get_classifier(args, model, zoo, entry):
    """The Classifier of the command line and the entry."""
    classes = args.classes
    if classes is None and (name := entry.get("labels", entry.get("classes"))):
        classes = find_file(zoo, entry, name)
    labels = read_lines(classes or BUNDLED_LABELS) if classes or BUNDLED_LABELS.is_file() else []
    if labels and not classes:
        print(f"class names: ImageNet's, if there are {len(labels)}; --classes names others")
    preprocessing = get_preprocessing(args, zoo, entry)
    random = entry.get("weights") == RANDOM or Path(model).stem.endswith(RANDOM_SUFFIX)
    net = read_net(model, entry, args)
    return Classifier(net, preprocessing, labels, classes, args.top_k, random)


def forward(net, blob):
    """(logits of shape (classes,), ms of the forward pass)."""
    start = time.perf_counter()
    try:
        net.setInput(blob)
        out = net.forward()
    except cv2.error as error:
        raise RequestError(
            f"the network can't take a {blob.shape[3]}x{blob.shape[2]} picture; set --width and "
            f"--height to the size it was converted for: {one_line(error)}"
        ) from None
    ms = 1000 * (time.perf_counter() - start)
    outputs = len(net.getUnconnectedOutLayersNames())
    if outputs != 1 or out is None or out.ndim != 2 or len(out) != 1 or out.dtype != np.float32:
        raise RequestError("not a classifier: the output isn't one float32 array (1, classes)")
    if not np.isfinite(out).all():
        raise RequestError(
            "the network answers nan or inf: check --scale, --mean and --std, or convert it again"
        )
    return out[0], ms


def print_answer(title, best, ms, random):
    print(f"{title}:")
    for class_id, label, logit in best:
        print(f"* class ID: {class_id}, label: {label}\n* confidence: {logit:.4f}")
    if random:
        print(f"* {RANDOM_WARNING}")
    print(f"* inference time: {ms:.1f} ms", flush=True)


# --- the annotated picture ------------------------------------------------------------------------


def annotate(picture, lines):
    """Write the lines into the top left corner, in letters small enough to fit the picture."""
    height, width = picture.shape[:2]
    font, unit = cv2.FONT_HERSHEY_SIMPLEX, 30  # px from line to line, at a font scale of 1
    # thickness 2: OpenCV 5.0.0 writes bold letters, 5 % wider, from there on
    longest = max(cv2.getTextSize(line, font, 1, 2)[0][0] for line in lines) + unit
    zoom = min(width / longest, height / (unit * (len(lines) + 1)), width / 800 + 0.3)
    step, thickness = round(unit * zoom), max(1, round(1.5 * zoom))
    picture[: len(lines) * step + step // 2, : round(longest * zoom)] //= 4  # dark behind the text
    for row, line in enumerate(lines, 1):
        origin = (step // 2, row * step)
        cv2.putText(picture, line, origin, font, zoom, (0, 255, 0), thickness, cv2.LINE_AA)
    return picture


def fit(picture, size, least=0.0, most=1.0):
    """The picture, scaled to fit into `size` (width, height), by a factor of `least` to `most`."""
    height, width = picture.shape[:2]
    zoom = np.clip(min(size[0] / width, size[1] / height), least, most)
    new_size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    # INTER_AREA: scaling down in any other way drops lines of pixels, and the text with them
    return cv2.resize(picture, new_size, interpolation=cv2.INTER_AREA)


def get_lines(best, ms, random):
    """What `annotate` writes for an answer."""
    lines = [f"{label}: {logit:.4f}" for _, label, logit in best]
    return [*lines, f"Inference time: {ms:.1f} ms"] + ([RANDOM_WARNING] if random else [])


# --- saving and showing ---------------------------------------------------------------------------


def get_output_paths(sources, model, output):
    """The path of each annotated source: `output` if it has a suffix, else in that folder."""
    paths = []
    for kind, source in sources:
        path = Path(f"camera{source}" if kind == "camera" else source)
        suffixes = PICTURE_SUFFIXES if kind == "picture" else VIDEO_SUFFIXES
        suffix = path.suffix if path.suffix.lower() in suffixes else suffixes[0]
        suffix = suffixes[0] if suffix.lower() == ".pgm" else suffix  # grey only
        paths.append(Path(output or RESULTS_DIR) / f"{path.stem}_{Path(model).stem}{suffix}")
    if output and Path(output).suffix and not Path(output).is_dir():
        if len(sources) > 1:
            raise RequestError(
                f"--output {output} is a file, but there are {len(sources)} inputs; name a folder"
            )
        paths = [Path(check_name(output))]
    for path in paths:
        if path.exists() and any(path.samefile(s) for _, s in sources if Path(s).exists()):
            raise RequestError(f"--output {path} is an input; name another file")
    return paths


def has_display():
    """Whether a window can be shown.

    Without a display, opencv-python's Qt aborts the whole process instead of raising (seen with
    OpenCV 5.0.0, exit 134; https://github.com/opencv/opencv/issues/13682), so a child process
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
    """Show `picture` in the window, scaled to fit the screen."""
    cv2.namedWindow(WINDOW, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)
    cv2.imshow(WINDOW, fit(picture, MAX_WINDOW_SIZE))


def window_closed(milliseconds):
    """Wait this many milliseconds for a key; True if one was pressed or the window was closed."""
    return cv2.waitKey(milliseconds) >= 0 or cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) < 1


# --- pictures and videos --------------------------------------------------------------------------


def classify_picture(path, classify, output, window):
    """Classify one picture, print the answer, save the annotated picture, show it."""
    picture = read_picture(path)
    best, ms = classify(picture)
    print_answer(path, best, ms, classify.random)
    picture = fit(picture, MIN_RESULT_SIZE, least=1.0, most=20.0)
    result = annotate(picture, get_lines(best, ms, classify.random))
    output.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.haveImageWriter(str(output)):
        raise RequestError(f"{output}: OpenCV can't write a picture in this format; try .png")
    if not cv2.imwrite(str(output), result):
        raise RequestError(f"{output}: can't be written; is the disk full?")
    print(f"* saved: {output}", flush=True)
    if window:
        show(result)
        while not window_closed(50):  # waitKey(0) would miss Ctrl-C, and a window that is closed
            pass
        cv2.destroyAllWindows()


def classify_video(kind, source, classify, output, window):
    """Classify each frame of a video or camera, and print each change of the top answer.

    output: None if nothing is to be saved. A key or Ctrl-C ends it; what is saved is whole.
    """
    capture = cv2.VideoCapture(int(source) if kind == "camera" else source)
    read, frame = capture.read()
    if not read:
        hint = "is it connected?" if kind == "camera" else "the file may be truncated"
        raise RequestError(f"{kind} {source}: no frame can be read; {hint}")
    writer = open_video(output, capture, frame) if output else None
    last, frames, interrupted = None, 0, False
    start = time.perf_counter()
    try:
        while read:
            best, ms = classify(frame)
            lines = get_lines(best, ms, classify.random)
            fps = (frames + 1) / (time.perf_counter() - start)
            result = annotate(frame, [*lines, f"{fps:.1f} frames per second"])
            if writer is not None:
                writer.write(result)
            frames += 1
            if best[0][0] != last:
                last = best[0][0]
                print_answer(f"{source}, frame {frames}", best, ms, classify.random)
            if window:
                show(result)
                if window_closed(1):
                    break
            read, frame = capture.read()
    except KeyboardInterrupt:
        interrupted = True
    fps = frames / (time.perf_counter() - start)
    promised = max(frames, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    print(f"{source}: {frames} of {promised} frames, {fps:.1f} frames per second")
    if writer is not None:
        writer.release()
        # VideoWriter doesn't report a full disk. Ctrl-C may come between a write and its count.
        saved = cv2.VideoCapture(str(output)).get(cv2.CAP_PROP_FRAME_COUNT)
        if not frames <= saved <= frames + interrupted:
            output.unlink(missing_ok=True)
            raise RequestError(f"{output}: can't be written; is the disk full?")
        print(f"* saved: {output}")
    if interrupted:
        raise KeyboardInterrupt


def open_video(output, capture, frame):
    """cv2.VideoWriter for frames like `frame`, at the rate of `capture`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    fourcc = cv2.VideoWriter_fourcc(*("MJPG" if output.suffix.lower() == ".avi" else "mp4v"))
    rate = capture.get(cv2.CAP_PROP_FPS)
    rate = rate if 0 < rate <= 1000 else 25  # some cameras and files don't say
    writer = cv2.VideoWriter(str(output), fourcc, rate, frame.shape[1::-1])
    if not writer.isOpened():
        raise RequestError(
            f"{output}: OpenCV can't write this video; name a {' or '.join(VIDEO_SUFFIXES)} file"
        )
    return writer


def main():
    args = get_parser().parse_args()
    model, sources = split_inputs(args)
    zoo, entry = find_entry(args, model)
    model = model or find_file(zoo, entry, entry.get("model", ""))
    sources = expand_sources(sources)
    outputs = get_output_paths(sources, model, args.output)
    classify = get_classifier(args, model, zoo, entry)
    window = has_display()
    print(classify.preprocessing)
    failed = 0
    for (kind, source), output in zip(sources, outputs, strict=True):
        try:
            if kind == "picture":
                classify_picture(source, classify, output, window)
            else:
                keep = args.output or (kind == "video" and not window)
                classify_video(kind, source, classify, output if keep else None, window)
        except RequestError as error:
            if len(sources) == 1:
                raise
            report(error)
            failed = 1
    return failed


if __name__ == "__main__":
    run(main)
