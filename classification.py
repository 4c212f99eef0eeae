"""Classify pictures, folders, videos or a camera with a converted network.

It needs nothing but cv2 and NumPy, so you can copy it anywhere by itself:

    python classification.py --input resnet50.onnx cat.jpg --top_k 5
    python classification.py --input resnet50.onnx 0        # camera 0
    python classification.py resnet50 --input cat.jpg       # as models.yml says

models.yml says what each network needs; its entry is found by NAME or by the
model file. Without an entry, pictures are prepared as torchvision's ImageNet
networks expect them; or, if you give --scale, --mean or --std, with the
defaults of OpenCV's samples for everything you leave out.
"""

import argparse
import difflib
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

# Beside this file in the project it comes from. Elsewhere they are missing, and not needed.
BUNDLED_PICTURE = Path(__file__).resolve().parent / "test_data" / "cls" / "red_panda.jpg"
BUNDLED_LABELS = BUNDLED_PICTURE.with_name("imagenet_classes.txt")

# The converted networks, relative to the current folder or to the folder of this file.
ZOO_NAME = "models.yml"
ZOO_PATHS = (os.path.join("models", ZOO_NAME), ZOO_NAME)
ZOO_SAMPLE = "classification"  # what OpenCV's samples call the entries that are for this one

# What torchvision's ImageNet networks expect, with pixel values from 0 to 255:
# https://docs.pytorch.org/vision/stable/models.html. This file travels alone, so the numbers are
# here as well as in default_preprocess_config.py; a test compares them.
TORCHVISION = {
    "scale": 1 / 255, "mean": [123.675, 116.28, 103.53], "std": [0.229, 0.224, 0.225],
    "rgb": True, "crop": True, "width": 224, "height": 224,
    "initial_width": 256, "initial_height": 256,
}  # fmt: skip

# Model files with this suffix hold random weights; an entry says it as `weights: random`.
RANDOM = "random"
RANDOM_SUFFIX = f"-{RANDOM}"
RANDOM_WARNING = "RANDOM WEIGHTS: this answer means nothing"

PICTURE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif",
)  # fmt: skip
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".webm")
SAVED_PICTURES, SAVED_VIDEOS = (".png", ".jpg", ".jpeg"), (".mp4", ".avi")  # of results
RESULTS_DIR = "results"

FONT = cv2.FONT_HERSHEY_SIMPLEX
LEAST_ZOOM = 0.45  # the font scale at which capitals are 9 px high: nobody can read smaller ones
WINDOW = "Classification with OpenCV DNN"
KEYS = "keys in the window: q or Esc ends the program, space pauses, any other key goes on"
QUIT, SPACE = (ord("q"), ord("Q"), 27), ord(" ")
# OpenCV 5.0.0's Qt returns these, too, if they are pressed alone, and has X11's codes for them:
# Shift, Control, Caps Lock, Alt and the like; AltGr; Num Lock.
MODIFIERS = (*range(0xFFE1, 0xFFEF), 0xFE03, 0xFF7F)

# What OpenCV's samples call the constants of cv2.dnn.
ENGINES = {name: f"ENGINE_{name.upper()}" for name in ("auto", "new", "classic", "ort")}
BACKENDS = {name: f"DNN_BACKEND_{name.upper()}" for name in ("default", "opencv", "vkcom", "cuda")}
BACKENDS["openvino"] = "DNN_BACKEND_INFERENCE_ENGINE"
TARGETS = {
    name: f"DNN_TARGET_{name.upper()}"
    for name in ("cpu", "opencl", "opencl_fp16", "vulkan", "cuda", "cuda_fp16")
}
TARGETS |= {"ncs2_vpu": "DNN_TARGET_MYRIAD", "hddl_vpu": "DNN_TARGET_HDDL"}


class RequestError(Exception):
    """The request can't be met. The message is the one line that the user reads."""

    exit_code = 2


class OneLineParser(argparse.ArgumentParser):
    """argparse with one-line errors, a short usage line, and the docstring as its help."""

    def __init__(self, docstring, usage):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=docstring, formatter_class=formatter, allow_abbrev=False)
        self.usage = f"%(prog)s {usage}"

    def error(self, message):
        raise RequestError(f"{message} (see --help)")


def run(main):
    """Call `main` and exit with its code. An error is one line on stderr."""
    if "OPENCV_LOG_LEVEL" not in os.environ:  # errors are reported below, in one line
        set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # 4, 5
        set_log_level(0)  # silent
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # the same
    # kill raises SystemExit, so that temporary files are removed
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, head for instance, has seen enough: no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # 128 + SIGPIPE, what a shell reports for cat
    except (RequestError, OSError, cv2.error) as error:
        report(error)
        code = getattr(error, "exit_code", RequestError.exit_code)
    except Exception:  # of your own code, or a fault of ours; 1 would say that networks disagree
        traceback.print_exc()
        code = RequestError.exit_code
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped by Ctrl-C", file=sys.stderr)
        code = 130  # 128 + SIGINT, what a shell reports
    sys.exit(code)


def report(error):
    """Print an error as one line on stderr, below the traceback of your own code if that raised."""
    if error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
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


def parse_bool(text):
    """True or False for what people type; argparse's type=bool would take "False" for True."""
    if text.lower() not in ("true", "yes", "1", "false", "no", "0"):
        raise ValueError
    return text.lower() in ("true", "yes", "1")


def finite(text):
    """A number that float32 can hold; with nan or inf every answer would be nan."""
    if not abs(float(text)) <= np.finfo(np.float32).max:
        raise ValueError
    return float(text)


def non_zero(text):
    """A finite number that float32 can divide by."""
    if abs(finite(text)) < np.finfo(np.float32).tiny:
        raise ValueError
    return float(text)


def positive_int(text):
    """A whole number from 1 to 999999999."""
    if not 0 < int(text) < 10**9:
        raise ValueError
    return int(text)


def available(names):
    """{name: constant} of those that this build of OpenCV has."""
    found = {name: getattr(cv2.dnn, c) for name, c in names.items() if hasattr(cv2.dnn, c)}
    # OpenCV 5.0.0 names ENGINE_ORT in every build; without ONNX Runtime it warns and takes auto
    if not re.search("ONNX Runtime: +YES", cv2.getBuildInformation()):
        found.pop("ort", None)
    return found


# fmt: off
def get_parser():
    parser = OneLineParser(__doc__, "[NAME] [--input FILE ...] [options]")
    add = parser.add_argument
    add("alias", nargs="?", metavar="NAME", help="entry of models.yml; options win over it")
    add("--zoo", metavar="FILE",
        help=f"the file with the entries [{' or '.join(ZOO_PATHS)}, here or beside this script]")
    add("--input", nargs="+", default=[], metavar="FILE",
        help="the model (.onnx) and, in any order, pictures, folders of pictures, videos, or the "
        "number of a camera [the bundled picture]")
    add("--model", metavar="FILE", help="the model, if it isn't among --input")
    add("--classes", "--labels", metavar="FILE", help="text file of class names, one per line")
    add("--top_k", type=positive_int, default=1, metavar="K", help="answers per picture [1]")
    add("--output", metavar="PATH",
        help="annotated picture or video: a file, or a folder if it has no suffix "
        f"[{RESULTS_DIR}; a camera, or a video that is shown, isn't saved]")
    add = parser.add_argument_group("preprocessing, of blobFromImage").add_argument
    add("--scale", type=non_zero, metavar="V", help="multiply by this, after the mean [1.0]")
    add("--mean", type=finite, nargs=3, metavar="V",
        help="subtract these; in the order R G B with --rgb, else B G R [0 0 0]")
    add("--std", type=non_zero, nargs=3, metavar="V", help="divide the blob by these [none]")
    switch = {"type": parse_bool, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    add("--rgb", **switch, help="swapRB: the network takes RGB, OpenCV reads BGR [False]")
    add("--crop", **switch, help="scale the shorter side to the blob, cut off the rest [False]")
    size = {"type": positive_int, "metavar": "PX"}
    add("--width", **size, default=224, help="width of the blob [224]")
    add("--height", **size, default=224, help="height of the blob [224]")
    add("--initial_width", **size, help="resize the picture to this width first [no resize]")
    add("--initial_height", **size, help="resize the picture to this height first [no resize]")
    add = parser.add_argument_group("inference").add_argument
    if available(ENGINES):  # OpenCV 4 has one, and no name for it
        add("--engine", choices=list(available(ENGINES)),
            help="new is OpenCV 5's own, classic OpenCV 4's, ort ONNX Runtime, auto new or classic "
            "[what the entry says, else auto]")
    add("--backend", choices=list(available(BACKENDS)), default="default",
        help="another one than the default runs on the classic engine")
    add("--target", choices=list(available(TARGETS)), default="cpu", help="the same [cpu]")
    return parser
# fmt: on


def get_args():
    """(the options, the entry of models.yml or {}).

    An entry changes the defaults of the options, as in OpenCV's samples: the command line is
    parsed once to find the entry, and again with its values. Then args.model is the model's file,
    and args.input what to classify.
    """
    parser = get_parser()
    args = parse(parser)
    models = [item for item in args.input if item.lower().endswith(".onnx")]
    sources = [item for item in args.input if item not in models] or [str(BUNDLED_PICTURE)]
    models += [args.model] if args.model else []
    if len(models) > 1:
        raise RequestError(f"more than one model: {' '.join(models)}; name one .onnx file")
    if not models and args.alias is None:
        raise RequestError("no model: name one .onnx file, --input MODEL.onnx PICTURE")
    zoo, name, entry = find_entry(args, *models)
    defaults = {} if entry or args.scale or args.mean or args.std else TORCHVISION
    try:
        defaults = defaults | parse_entry(parser, entry, args)
    except RequestError as error:
        raise RequestError(f"{zoo}: {name}: {error}") from None
    if classes := entry.get("labels", entry.get("classes")):
        defaults["classes"] = find_file(classes, entry, zoo.parent)
    parser.set_defaults(**{"scale": 1.0, "mean": [0.0, 0.0, 0.0]} | defaults)
    args = parser.parse_args()
    args.input, args.classes = sources, args.classes and find_file(args.classes, entry, Path())
    args.model = models[0] if models else find_file(entry.get("model", ""), entry, zoo.parent)
    return args, entry


def parse(parser, texts=None):
    """The options in `texts`, or of the command line."""
    args = parser.parse_args(texts)
    if (args.initial_width is None) != (args.initial_height is None):
        parser.error("--initial_width and --initial_height go together")
    return args


def parse_entry(parser, entry, args):
    """{option: value} of an entry's preprocessing and engine, checked as if they were typed."""
    found, texts = [], ["NAME"]
    for key in (*TORCHVISION, "engine"):
        values = entry.get(key, [])
        values = values if isinstance(values, list) else [values]
        if values not in ([], [""]) and hasattr(args, key):  # OpenCV 4 has no --engine
            found.append(key)
            # argparse would take -1e-05 for an option, but nothing that begins with a space
            texts += [f"--{key}", *(f" {v}" if str(v)[:1] == "-" else str(v) for v in values)]
    parsed = vars(parse(parser, texts))
    return {key: parsed[key] for key in found}


def find_entry(args, model=None):
    """(path of the models.yml, name, entry) of args.alias, else of the model file.

    (None, None, {}) if a model file has no entry. Raises RequestError if a name has none.
    """
    name = args.alias or Path(model).stem
    folders = (Path(), Path(__file__).resolve().parent)
    paths = [folder / path for folder in folders for path in ZOO_PATHS]
    if args.zoo or args.alias is None:
        paths = [Path(args.zoo or Path(model).with_name(ZOO_NAME))]
    names = []
    for path in filter(Path.is_file, paths):
        entries = [(key, entry) for key, entry in read_zoo(path).items() if isinstance(entry, dict)]
        entries = {key: entry for key, entry in entries if entry.get("sample") == ZOO_SAMPLE}
        if name in entries and (args.alias or entries[name].get("model") == Path(model).name):
            return path, name, entries[name]
        names += entries
    if args.alias is None:
        return None, None, {}
    near = " or ".join(difflib.get_close_matches(name, names, cutoff=0.5))
    hint = f"did you mean {near}?" if near else "convert the network, or set --zoo"
    searched = ", ".join(dict.fromkeys(os.path.normpath(path) for path in paths))
    raise RequestError(f"no entry '{name}' in {searched}: {hint} (pictures go after --input)")


def find_file(name, entry, folder):
    """The path of a file in `folder`, in the current one, or where OpenCV's samples look for it.

    https://github.com/opencv/opencv/blob/5.x/samples/dnn/common.py
    """
    folders = [folder, Path()]
    if cache := os.environ.get("OPENCV_DOWNLOAD_CACHE_DIR"):
        info = entry.get("load_info")
        sha1 = info.get("sha1", "") if isinstance(info, dict) else ""
        folders += [Path(cache, str(sha1)), Path(cache)]
    for variable in ("SAMPLES_DATA_PATH", "DNN_TEST_DATA_PATH", "TEST_DATA_PATH"):
        if data := os.environ.get(f"OPENCV_{variable}"):
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
        raise RequestError(f"{path}: OpenCV can't read this as YAML; repair or delete it")
    return entries


def read_node(node):
    """The dictionary, list, number or text of a cv2.FileNode; true is 1 (5.0) or "true" (4)."""
    if node.isSeq():
        return [read_node(node.at(i)) for i in range(node.size())]
    if node.isInt() or node.isReal():
        return int(node.real()) if node.isInt() else node.real()
    if node.isString():
        return node.string()
    return {name: read_node(node.getNode(name)) for name in node.keys()}  # noqa: SIM118


def expand_sources(sources):
    """The pictures, videos and numbers of cameras; a folder stands for its pictures, by name."""
    found = []
    for source in sources:
        if os.path.isdir(source):
            files = [str(path) for path in sorted(Path(source).iterdir())]
            pictures = [file for file in files if Path(file).suffix.lower() in PICTURE_SUFFIXES]
            if not pictures:
                raise RequestError(f"{source}: no picture in this folder")
            found += pictures
        elif os.path.isfile(source) or (source.isdecimal() and not os.path.exists(source)):
            found.append(source)
        else:
            problem = "a pipe: save it as a file" if os.path.exists(source) else "no such file"
            raise RequestError(f"{source}: {problem}; give a picture, a video or a folder")
    return found


def check_name(name):
    """The file name. cv2 5.0.0 crashes on "" and on names that aren't UTF-8: RequestError."""
    if not name or name != name.encode(errors="ignore").decode():
        raise RequestError(f"{name!r}: OpenCV can't open files of this name; rename it")
    return name


def is_video(source):
    """Whether it is the number of a camera, or a file whose suffix is a video's."""
    return not os.path.exists(source) or Path(source).suffix.lower() in VIDEO_SUFFIXES


def read_frames(source):
    """Yield (title, picture, rate) of a picture, or of each frame of a video or camera.

    picture: uint8 BGR (height, width, 3); rate: frames per second, 0 for a picture.
    """
    check_name(source)
    if not is_video(source):
        yield source, read_picture(source), 0
        return
    capture = cv2.VideoCapture(source if os.path.exists(source) else int(source))
    rate = capture.get(cv2.CAP_PROP_FPS)
    rate = rate if 0 < rate <= 1000 else 25  # some cameras and files don't say
    number = 0
    while (got := capture.read())[0]:
        number += 1
        yield f"{source}, frame {number}", got[1], rate
    if not number:
        name = source if os.path.exists(source) else f"camera {source}"
        raise RequestError(f"{name}: no frame can be read; is it truncated, or not connected?")
    promised = capture.get(cv2.CAP_PROP_FRAME_COUNT)  # of some files, an estimate
    if number < 0.99 * promised - 1:
        error = RequestError(f"{source}: truncated: {number} of {promised:.0f} frames can be read")
        error.exit_code = 1
        raise error


def read_picture(path):
    """The picture as uint8 BGR (height, width, 3), turned as its EXIF says; or RequestError."""
    try:
        data = np.frombuffer(Path(path).read_bytes(), np.uint8)
        # imdecode, because imread fills the missing part of a truncated JPEG with grey
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR)
        if picture is None and cv2.imdecode(data, cv2.IMREAD_UNCHANGED) is not None:
            raise RequestError(f"{path}: pixels of an unusual type, float32 for one; use 8 bits")
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
    if len(labels) != classes and path is not None:
        raise RequestError(f"{path}: {len(labels)} lines, but the network has {classes} outputs")
    return labels if len(labels) == classes else []


def read_net(args, entry):
    """cv2.dnn.Net of the model file, on the engine, backend and target of the command line."""
    backend, target = available(BACKENDS)[args.backend], available(TARGETS)[args.target]
    if target not in cv2.dnn.getAvailableTargets(backend):  # OpenCV would silently use the CPU
        raise RequestError(f"this OpenCV has no --target {args.target} on --backend {args.backend}")
    check_model(args.model)
    # only our own: OpenCV's entry of googlenet, for instance, has the hash of an empty file
    if "made_from" in entry and get_load_info(args.model) != entry.get("load_info"):
        raise RequestError(f"{args.model}: its SHA-1 isn't the one in {ZOO_NAME}; convert it again")
    on_cpu = (args.backend, args.target) == ("default", "cpu")
    if config := entry.get("config"):  # of Caffe, in OpenCV 4.10's models.yml
        net = cv2.dnn.readNet(args.model, find_file(config, entry, Path(args.model).parent))
    else:
        engine = getattr(args, "engine", None) or "auto"  # OpenCV 4 has no such option
        net = read_onnx(args.model, engine if on_cpu else "classic")
    if not on_cpu:
        net.setPreferableBackend(backend)
        net.setPreferableTarget(target)
    return net


def get_digest(path, algorithm):
    """The "sha1" or "sha256" of a file, in hexadecimal."""
    return hashlib.new(algorithm, Path(path).read_bytes()).hexdigest()


def get_load_info(model):
    """{"sha1": of a model file} as in OpenCV's models.yml, and of the .data beside a large one."""
    files = {"sha1": Path(model), "data_sha1": Path(f"{model}.data")}
    return {key: get_digest(path, "sha1") for key, path in files.items() if path.exists()}


def check_model(path):
    """Raise RequestError if there is no such file."""
    if not Path(check_name(str(path))).is_file():
        raise RequestError(f"{path}: no such file; give a converted model (.onnx)")


def read_onnx(path, engine):
    """cv2.dnn.Net of an ONNX file on one of ENGINES; RequestError if OpenCV can't read it."""
    engines = available(ENGINES)  # none in OpenCV 4
    try:
        return cv2.dnn.readNetFromONNX(str(path), *([engines[engine]] if engines else []))
    except cv2.error as error:
        problem = f"OpenCV {cv2.__version__} can't read this as ONNX, it may be truncated"
        raise RequestError(f"{path}: {problem}: {one_line(error)}") from None


def get_blob(picture, p):
    """float32 blob of shape (1, 3, height, width) from a BGR picture (height, width, 3).

    (picture - mean) * scale / std, with p.mean, p.scale and so on: p has the attributes of the
    options; p.std may be empty. blobFromImage's crop scales the shorter side of the picture to the
    blob first, so nothing is cut off a square picture.
    """
    # float before the resize: rounding to uint8 after it would shift the logits by about 0.01
    picture = picture.astype(np.float32)
    if p.initial_width:
        picture = cv2.resize(picture, (p.initial_width, p.initial_height))
    # the mean is in RGB order if swapRB is set: OpenCV swaps it as well
    blob = cv2.dnn.blobFromImage(picture, p.scale, (p.width, p.height), p.mean, p.rgb, p.crop)
    return blob / np.float32(p.std).reshape(1, 3, 1, 1) if p.std else blob


def describe(p):
    """The preprocessing in one line, always printed: a wrong one gives wrong answers, no error."""
    mean, std = (" ".join(f"{v:g}" for v in values or []) or "none" for values in (p.mean, p.std))
    resize = f"{p.initial_width}x{p.initial_height} -> " if p.initial_width else ""
    return (
        f"preprocessing: scale {p.scale:g}, mean {mean}, std {std}, rgb {p.rgb}, crop {p.crop}, "
        f"size {resize}{p.width}x{p.height}"
    )


def forward(net, blob):
    """(logits of shape (classes,), ms of the forward pass)."""
    start = time.perf_counter()
    try:
        net.setInput(blob)
        out = net.forward()
    except cv2.error as error:
        size, text = f"{blob.shape[3]}x{blob.shape[2]}", one_line(error)
        raise RequestError(f"it can't take {size}: set --width and --height: {text}") from None
    ms = 1000 * (time.perf_counter() - start)
    outputs = len(net.getUnconnectedOutLayersNames())
    # squeezenet of OpenCV 4.10's models.yml has the shape (1, 1000, 1, 1)
    if outputs != 1 or out is None or out.shape[:2] != (1, out.size) or out.dtype != np.float32:
        raise RequestError("not a classifier: the output isn't one float32 array (1, classes)")
    if not np.isfinite(out).all():
        raise RequestError("the answer is nan or inf: check --scale, --mean, --std, or the file")
    return out.ravel(), ms


def get_answers(logits, names, top_k):
    """[(text for stdout, text for the picture)], best first. names: of the classes, or empty."""
    if len(logits) == 1:  # a value, which has no classes
        text = f"{names[0] if names else 'value'}: {logits[0]:.4f}"
        return [(f"* {text}", text)]
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    if logits.min() >= 0 and abs(logits.sum() - 1) < 1e-3:  # the network ends in a softmax
        probabilities = logits
    answers = []
    for i in np.argsort(-logits, kind="stable")[:top_k]:
        name = names[i] if names else f"Class #{i}"
        percent = f"{100 * probabilities[i] / probabilities.sum():.1f} %"
        text = f"* class ID: {i}, label: {name}\n* confidence: {logits[i]:.4f}"
        # some of ImageNet's names have many synonyms
        answers.append((f"{text}\n* probability: {percent}", f"{name.split(',')[0]}: {percent}"))
    return answers


def annotate(picture, lines):
    """Write lines into the top left corner, as large as fits, but not too small to be read.

    If there are too many, the last, the inference time, goes first; the others are counted.
    """
    height, width = picture.shape[:2]
    room = int(height / int(30 * LEAST_ZOOM) - 0.5)
    if len(lines) > room:
        kept = max(1, room - 1)
        lines = [*lines[:kept], f"... and {len(lines) - 1 - kept} more"][:room]
    if not lines:
        return picture
    zoom = min(width / 800 + 0.3, height / (30 * (len(lines) + 0.5)))
    while True:
        zoom = max(zoom, LEAST_ZOOM)
        step, thickness = int(30 * zoom), max(1, round(1.5 * zoom))
        # OpenCV 5.0's letters get wider with their thickness: measured as they are drawn
        longest = max(cv2.getTextSize(line, FONT, zoom, thickness)[0][0] for line in lines)
        if zoom == LEAST_ZOOM or longest + step <= width:
            break
        zoom *= 0.95
    picture[: len(lines) * step + step // 2, : longest + step] //= 4  # dark behind the text
    for row, line in enumerate(lines, 1):
        while line and cv2.getTextSize(line, FONT, zoom, thickness)[0][0] + step > width:
            line = f"{line[:-4]}..." if len(line) > 4 else ""
        origin = (step // 2, row * step)
        cv2.putText(picture, line, origin, FONT, zoom, (0, 255, 0), thickness, cv2.LINE_AA)
    return picture


def fit(picture, size, limit):
    """The picture scaled to `size` (width, height); limit: min, only if larger, or max, smaller."""
    height, width = picture.shape[:2]
    zoom = limit(1, min(size[0] / width, size[1] / height))
    new_size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    # INTER_AREA: scaling down in any other way drops lines of pixels, and the text with them
    return cv2.resize(picture, new_size, interpolation=cv2.INTER_AREA)


def get_output_paths(sources, args):
    """The path of each annotated source: --output, or a name of its own in that folder."""
    output = check_name(args.output or RESULTS_DIR)
    is_folder = output.endswith(("/", os.sep)) or os.path.isdir(output) or not Path(output).suffix
    if not is_folder and len(sources) > 1:
        raise RequestError(f"--output {output}: {len(sources)} inputs need a folder, not a file")
    paths, taken = [], {os.path.realpath(source).lower() for source in sources}
    for number, source in enumerate(sources, 1):
        suffixes = SAVED_VIDEOS if is_video(source) else SAVED_PICTURES
        suffix = Path(source).suffix if Path(source).suffix.lower() in suffixes else suffixes[0]
        stem = f"{Path(source).stem}_{Path(args.model).stem}"
        path = Path(output, f"{stem}{suffix}") if is_folder else Path(output)
        if is_folder and os.path.realpath(path).lower() in taken:
            path = Path(output, f"{stem}_{number}{suffix}")
        if os.path.realpath(path).lower() in taken:
            raise RequestError(f"--output {path} is an input or a result already; name another")
        if is_video(source) and path.suffix.lower() not in suffixes:
            raise RequestError(f"--output {path}: a video needs {' or '.join(suffixes)}")
        taken.add(os.path.realpath(path).lower())
        paths.append(path)
    return paths


def save_picture(path, picture):
    """Write a picture in the format of the path's suffix; not imwrite, which hides what fails."""
    try:
        encoded, data = cv2.imencode(path.suffix, picture)
    except cv2.error:
        encoded = False
    if not encoded:
        raise RequestError(f"{path}: OpenCV can't write this picture in this format; try .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    print(f"* saved: {path}", flush=True)


def open_video(path, frame, rate):
    """cv2.VideoWriter for frames like `frame`, `rate` a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fourcc = cv2.VideoWriter_fourcc(*("MJPG" if path.suffix.lower() == ".avi" else "mp4v"))
    writer = cv2.VideoWriter(str(path), fourcc, rate, frame.shape[1::-1])
    if not writer.isOpened():
        raise RequestError(f"{path}: OpenCV can't write this video")
    return writer


def has_display():
    """Whether a window can be shown. A child process tries, because without a display Qt aborts it
    (OpenCV 5.0.0, exit 134; https://github.com/opencv/opencv/issues/13682) instead of raising.
    """
    displays = os.environ.get("DISPLAY"), os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not any(displays):
        return False
    probe = [sys.executable, "-c", "import cv2; cv2.namedWindow('probe')"]
    try:
        return subprocess.run(probe, capture_output=True, timeout=10).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def show(picture, seconds):
    """Show a picture for this time, or until a key is pressed. Whether the user ends the program.

    By q, Esc, or the window's close button. Space pauses, unless seconds is infinite anyway.
    """
    cv2.namedWindow(WINDOW, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)
    cv2.imshow(WINDOW, fit(picture, (1280, 720), min))
    end = time.monotonic() + seconds
    while True:
        key = cv2.waitKeyEx(50 if seconds else 1)  # not 0, which would miss Ctrl-C
        code = key & 0xFFFF  # GTK adds the state of Shift, Num Lock and the like
        try:
            closed = cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) < 1
        except cv2.error:  # OpenCV 5.0.0's Qt, once its only window is closed
            closed = True
        if closed or code in QUIT:
            return True
        if code == SPACE and end < np.inf:
            end, seconds = np.inf, np.inf
        elif (key >= 0 and code not in MODIFIERS) or time.monotonic() >= end:
            return False


def classify(source, output, net, args, window, seconds):
    """Classify a picture, or each frame of a video: print, annotate, save, show.

    Of a video, each change of the answer is printed. output: None, if nothing is to be saved;
    seconds: how long to show a picture. Returns whether the user ends the program.
    """
    last, writer = None, None
    try:
        for title, picture, rate in read_frames(source):
            logits, ms = forward(net, get_blob(picture, args))
            names = fit_labels(args.labels, args.classes, len(logits))
            answers = get_answers(logits, names, args.top_k)
            warning = [RANDOM_WARNING] if args.random else []
            if last != logits.argmax():
                texts = [text for text, _ in answers] + [f"* {text}" for text in warning]
                print(f"{title}:", *texts, f"* inference time: {ms:.1f} ms", sep="\n", flush=True)
            last = logits.argmax()
            if not rate:  # room for the text
                picture = fit(picture, (640, 480), max)
            lines = [*warning, *(text for _, text in answers), f"Inference time: {ms:.1f} ms"]
            annotate(picture, lines)
            if output and not rate:
                save_picture(output, picture)
            elif output:
                writer = open_video(output, picture, rate) if writer is None else writer
                writer.write(picture)
            if window and show(picture, 0 if rate else seconds):
                return True
    finally:  # also after Ctrl-C
        if writer is not None:
            writer.release()
            print(f"* saved: {output}", flush=True)
    return False


def main():
    args, entry = get_args()
    sources = expand_sources(args.input)
    outputs = get_output_paths(sources, args)
    labels = args.classes or (BUNDLED_LABELS if BUNDLED_LABELS.is_file() else None)
    args.labels = read_lines(labels) if labels else []
    if args.labels and not args.classes:
        print(f"class names: ImageNet's, if there are {len(args.labels)}; --classes names others")
    args.random = entry.get("weights") == RANDOM or Path(args.model).stem.endswith(RANDOM_SUFFIX)
    net = read_net(args, entry)
    window = has_display()
    print(describe(args), *([KEYS] if window else []), sep="\n")
    failed = 0
    for number, (source, output) in enumerate(zip(sources, outputs, strict=True), 1):
        saved = args.output or not (is_video(source) and (window or not os.path.exists(source)))
        seconds = 1 if number < len(sources) else np.inf  # as OpenCV 5's sample
        try:
            if classify(source, output if saved else None, net, args, window, seconds):
                break
        except RequestError as error:
            if len(sources) == 1:
                raise
            report(error)
            failed = 1
    return failed


if __name__ == "__main__":
    run(main)
