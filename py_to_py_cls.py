"""Convert a torchvision classifier to ONNX, prove it in OpenCV, then test or evaluate it.

python py_to_py_cls.py --model_name resnet50 --test True    # classify one picture
python py_to_py_cls.py --model_name resnet50                # evaluate both networks
python py_to_py_cls.py --model_name resnet50 --evaluate False    # only convert and compare
"""

import argparse
import dataclasses
import difflib
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

import classification
from classification import (
    OneLineParser,
    RequestError,
    parse_bool,
    positive_int,
    read_onnx,
    read_picture,
    run,
    whole_file,
)
from common import (
    DEFAULT_WEIGHTS,
    RANDOM,
    Difference,
    NetworksDisagree,
    compare,
    convert,
    find_bundled,
    get_onnx_path,
    load_network,
    run_opencv,
    run_pytorch,
    verify,
)
from default_preprocess_config import pytorch_resize_input_blob
from test_config import (
    CLS_TEST_DATA_DIR,
    IMAGENET_VAL_DIR,
    LOGS_DIR,
    MODELS_DIR,
    RESULTS_DIR,
    TestClsConfig,
    TestClsModuleConfig,
)

# torchvision's names; a line added here adds a network.
MODELS = [
    "alexnet",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "squeezenet1_0",
    "squeezenet1_1",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

# The fields of TestClsModuleConfig that say how a picture is prepared, and their options in
# classification.py.
PREPROCESSING = {
    "scale": "--scale",
    "mean": "--mean",
    "std": "--std",
    "crop": "--crop",
    "rgb": "--rgb",
    "rsz_height": "--initial_height",
    "rsz_width": "--initial_width",
}


# --- the command line -----------------------------------------------------------------------


def model_name(text):
    """One of MODELS, whatever its case."""
    name = text.lower()
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it is one of {', '.join(MODELS)}"
        raise argparse.ArgumentTypeError(f"unknown network '{text}', {hint}")
    return name


def get_parser():
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model_name",
        type=model_name,
        required=True,
        metavar="NAME",
        help=f"the network: {', '.join(MODELS)}",
    )
    add(
        "--test",
        type=parse_bool,
        default=False,
        metavar="BOOL",
        help="test mode: run classification.py on the converted network and one picture",
    )
    add(
        "--evaluate",
        type=parse_bool,
        metavar="BOOL",
        help="evaluation mode: accuracy, inference time and L1 of both networks over labelled "
        "pictures (default: True, but False with --test True)",
    )
    add(
        "--default_img_preprocess",
        type=parse_bool,
        default=True,
        metavar="BOOL",
        help="test mode: prepare the picture as torchvision does (pytorch_resize_input_blob of "
        "default_preprocess_config.py), not as TestClsModuleConfig says; options given here win "
        "over both (default: True)",
    )
    add(
        "--weights",
        default=DEFAULT_WEIGHTS,
        help="torchvision's name of the weights (IMAGENET1K_V1, DEFAULT ...), a state-dict file, "
        "or 'random' (default: %(default)s)",
    )
    add_config(parser, TestClsConfig, "evaluation mode (TestClsConfig in test_config.py)")
    add_config(parser, TestClsModuleConfig, "test mode (TestClsModuleConfig in test_config.py)")
    return parser


def add_config(parser, config_class, title):
    """An option for each field of the dataclass, of its name and type."""
    group = parser.add_argument_group(title)
    types = {int: positive_int, bool: parse_bool}
    for config_field in dataclasses.fields(config_class):
        default = getattr(config_class(), config_field.name)
        shown = " ".join(default) if isinstance(default, list) else default
        group.add_argument(
            f"--{config_field.name}",
            type=types.get(config_field.type, str),
            nargs="+" if isinstance(default, list) else None,
            metavar=config_field.type.__name__.upper() if config_field.type in types else "TEXT",
            help=f"{config_field.metadata['help']} (default: {'none' if shown == '' else shown})",
        )


def get_config(config_class, given):
    """The dataclass with what the command line gives; its default paths are found from anywhere.

    Defaults that follow from another field follow it here too.
    """
    config = config_class()
    names = [config_field.name for config_field in dataclasses.fields(config)]
    values = {name: given[name] for name in names if name in given}
    for name in ("input_img", "classes", "test_module_path"):
        if name in names and name not in given:
            values[name] = find_bundled(getattr(config, name))
    if "cls_test_data_dir" in values:
        for name in {"input_img", "classes"} - given.keys():
            values[name] = os.path.join(given["cls_test_data_dir"], os.path.basename(values[name]))
    if "frame_size" in given:
        for name in {"frame_height", "frame_width"} & set(names) - given.keys():
            values[name] = str(given["frame_size"])
    return dataclasses.replace(config, **values)


def get_preprocessing(default_img_preprocess, config, given):
    """{field: text} of PREPROCESSING: the preset's or the config's, and what is given wins."""
    own = {name: getattr(config, name) for name in PREPROCESSING}
    if not default_img_preprocess:
        return own
    return pytorch_resize_input_blob | {name: own[name] for name in PREPROCESSING if name in given}


def get_preprocessing_options(preprocessing, config):
    """The same as a command line for classification.py."""
    options = ["--width", config.frame_width, "--height", config.frame_height]
    for name, option in PREPROCESSING.items():
        value = preprocessing[name]
        if value:
            options += [option, *value] if isinstance(value, list) else [option, value]
    return options


# --- test mode --------------------------------------------------------------------------------


def test(onnx_path, config, options):
    """Run classification.py on the converted network; return its exit code."""
    picture = Path(config.input_img)
    suffix = picture.suffix if cv2.haveImageWriter(str(picture)) else ".png"
    result = f"{picture.stem}_{onnx_path.stem}_{config.test_module_name}{suffix}"
    command = [sys.executable, config.test_module_path, "--model", str(onnx_path)]
    command += ["--input", config.input_img, "--classes", config.classes]
    command += ["--output", os.path.join(RESULTS_DIR, result), *options]
    code = subprocess.run(command).returncode
    if code < 0:
        raise RequestError(f"{config.test_module_path} was ended by signal {-code}")
    return code


test.__test__ = False  # for pytest


# --- evaluation mode ----------------------------------------------------------------------------


def get_labelled_pictures(config, given):
    """[(path, class ID)] of the evaluation, and whether they are the bundled ones.

    The bundled pictures stand in only for the tutorial's own folder, and only where nobody
    named another.
    """
    named = {"img_root_dir", "img_cls_file"} & given.keys()
    root, labels = config.img_root_dir, config.img_cls_file
    bundled = not named and root == IMAGENET_VAL_DIR and not Path(root).exists()
    if bundled:
        root = find_bundled(CLS_TEST_DATA_DIR)
        labels = os.path.join(root, "val.txt")
    if not Path(root).is_dir():
        raise RequestError(
            f"{root}: no such folder; --img_root_dir takes the folder of the pictures"
        )
    pictures = read_val_file(labels, root)
    missing = [path for path, _ in pictures if not os.path.isfile(path)]
    if missing:
        raise RequestError(
            f"{missing[0]}: no such file, but {labels} names it "
            f"({len(missing)} of {len(pictures)} are missing); check --img_root_dir"
        )
    return pictures, bundled


def read_val_file(path, root):
    """[(path of the picture, class ID)] from a file like ImageNet's val.txt: lines of "name ID"."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise RequestError(
            f"{path}: {reason}; --img_cls_file takes lines of 'name class-ID'"
        ) from None
    pictures = []
    for number, line in enumerate(lines, 1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            raise RequestError(f"{path}, line {number}: '{line[:60]}' is not 'name class-ID'")
        pictures.append((os.path.join(root, name.strip()), int(label)))
    if not pictures:
        raise RequestError(f"{path}: no pictures in it; it takes lines of 'name class-ID'")
    return pictures


def check_frame_size(config, preprocessing):
    for name in ("rsz_width", "rsz_height"):
        if int(preprocessing[name]) < config.frame_size:
            raise RequestError(
                f"--{name} {preprocessing[name]} is less than --frame_size {config.frame_size}, "
                "which is cut out of the resized picture"
            )


def check_class_ids(pictures, classes):
    """Raise RequestError where a label is none of the network's `classes`."""
    for path, class_id in pictures:
        if class_id >= classes:
            raise RequestError(
                f"{path} has class ID {class_id}, but the network's {classes} classes are "
                f"0 to {classes - 1}; check --img_cls_file"
            )


def get_evaluation_blob(path, preprocessing, config):
    """(1, 3, frame_size, frame_size): the centre of the resized picture, as torchvision cuts it.

    blobFromImage's crop would shrink the picture to the frame and cut nothing.
    """
    size = config.frame_size
    rsz_height = int(preprocessing["rsz_height"])
    rsz_width = int(preprocessing["rsz_width"])
    picture = cv2.resize(read_picture(path).astype(np.float32), (rsz_width, rsz_height))
    top, left = (rsz_height - size) // 2, (rsz_width - size) // 2
    return cv2.dnn.blobFromImage(
        picture[top : top + size, left : left + size],
        scalefactor=float(preprocessing["scale"]),
        mean=[float(value) for value in preprocessing["mean"]],
        swapRB=config.bgr_to_rgb,
    ) / np.array(preprocessing["std"], np.float32).reshape(1, 3, 1, 1)


def get_batch(pictures, preprocessing, config):
    """(batch, 3, frame_size, frame_size) of [(path, class ID)]."""
    return np.concatenate([get_evaluation_blob(p, preprocessing, config) for p, _ in pictures])


def count_correct(logits, labels, k):
    """How many rows of `logits` have their label among the k highest."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return int((best == np.array(labels)[:, None]).any(axis=1).sum())


def evaluate(model, origin, onnx_path, pictures, preprocessing, config):
    """Run both networks over the pictures; write the log and the chart, print the summary.

    Raises NetworksDisagree at the end where they do.
    """
    title = f"{onnx_path.stem}, {'RANDOM' if origin == RANDOM else origin} weights"
    log_path = Path(LOGS_DIR) / f"{onnx_path.stem}_log.txt"
    chart_path = Path(LOGS_DIR) / f"{onnx_path.stem}_time.png"
    net = read_onnx(onnx_path)
    networks = {
        "PyTorch": lambda blob: run_pytorch(model, blob),
        f"OpenCV {cv2.__version__} DNN": lambda blob: run_opencv(net, blob),
    }
    correct = {network: [0, 0] for network in networks}  # top-1, top-5
    times = {network: [] for network in networks}  # ms a picture, for each batch
    differences, done = [], 0

    # The first pass of a network allocates: it is not timed, and tells the number of classes.
    warm_up = get_batch(pictures[: config.batch_size], preprocessing, config)
    classes = {forward(warm_up).shape[1] for forward in networks.values()}
    check_class_ids(pictures, min(classes))

    with whole_file(log_path) as part, open(part, "w", encoding="utf-8") as log:
        print(f"{title}: {len(pictures)} pictures, batch size {config.batch_size}", file=log)
        bar = tqdm(total=len(pictures), unit="picture", disable=None)
        for start in range(0, len(pictures), config.batch_size):
            batch = pictures[start : start + config.batch_size]
            blob = get_batch(batch, preprocessing, config)
            labels = [label for _, label in batch]
            done += len(batch)
            outputs = []
            for network, forward in networks.items():
                begin = time.perf_counter()
                logits = forward(blob)
                times[network].append((time.perf_counter() - begin) * 1000 / len(batch))
                outputs.append(logits)
                for i, k in enumerate((1, 5)):
                    correct[network][i] += count_correct(logits, labels, k)
                top1, top5 = (100 * c / done for c in correct[network])
                print(
                    f"{done} Accuracy for {network}: top-1 {top1:.2f}, top-5 {top5:.2f}", file=log
                )
                print(f"{done} Inference time, ms {network}: {times[network][-1]:.2f}", file=log)
            differences.append(compare(*outputs))
            print(f"{done} PyTorch vs OpenCV: {differences[-1]}", file=log)
            bar.update(len(batch))
        bar.close()
        total = combine(differences)
        for line in get_summary(title, correct, times, total):
            print(line)
            print(line, file=log)
    draw_times(times, f"{title}: inference time on {done} pictures", chart_path)
    print(f"log: {log_path}")
    print(f"chart: {chart_path}", flush=True)
    if not total.agree:
        raise NetworksDisagree(f"PyTorch and OpenCV disagree on these pictures: {total}")


def combine(differences):
    """One Difference of all the batches': L1 is the mean over all pictures."""
    pictures = sum(d.pictures for d in differences)
    return Difference(
        l1=sum(d.l1 * d.pictures for d in differences) / pictures,
        l_inf=max(d.l_inf for d in differences),
        relative=float(np.max([d.relative for d in differences])),  # np: nan wins
        same_class=sum(d.same_class for d in differences),
        pictures=pictures,
    )


def get_summary(title, correct, times, difference):
    """The lines that end the log and the output."""
    lines = [f"{title}, {difference.pictures} pictures:"]
    for network, ms in times.items():
        top1, top5 = (100 * c / difference.pictures for c in correct[network])
        lines.append(f"{network}:")
        lines.append(f"* accuracy: top-1 {top1:.2f} %, top-5 {top5:.2f} %")
        lines.append(f"* inference time: median {np.median(ms):.2f} ms a picture")
    lines.append(f"PyTorch vs OpenCV: {difference}")
    return lines


def draw_times(times, title, path):
    """Draw the inference time of each batch, and its median, as a PNG."""
    # Figure, not pyplot: it needs no display and no choice of a backend
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="batch", ylabel="ms a picture", title=title)
    for number, (network, ms) in enumerate(times.items()):
        median = np.median(ms)
        batches = np.arange(1, len(ms) + 1)
        axes.plot(batches, ms, "o-", color=f"C{number}", label=f"{network}: median {median:.1f} ms")
        axes.axhline(median, color=f"C{number}", linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0, top=1.15 * max(map(max, times.values())))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    with whole_file(path) as part:
        figure.savefig(part, dpi=120, format="png")


def main():
    args = get_parser().parse_args()
    given = {name: value for name, value in vars(args).items() if value is not None}
    config = get_config(TestClsConfig, given)
    module_config = get_config(TestClsModuleConfig, given)
    do_evaluate = not args.test if args.evaluate is None else args.evaluate

    # All that can be wrong with the request is told before torch is imported.
    test_preprocessing = get_preprocessing(args.default_img_preprocess, module_config, given)
    options = get_preprocessing_options(test_preprocessing, module_config)
    blob_args = classification.parse_args(options)
    sample_blob = classification.get_blob(read_picture(module_config.input_img), blob_args)
    bundled = True
    if do_evaluate:
        preprocessing = get_preprocessing(True, module_config, given)
        check_frame_size(config, preprocessing)
        pictures, bundled = get_labelled_pictures(config, given)
        if bundled:
            print(f"no {IMAGENET_VAL_DIR} here: evaluating on the {len(pictures)} bundled pictures")

    model, origin = load_network(args.model_name, args.weights, or_random=bundled)
    if module_config.model:
        onnx_path = Path(module_config.model)
        verify(model, read_onnx(onnx_path), sample_blob)
    else:
        onnx_path = get_onnx_path(args.model_name, origin, MODELS_DIR)
        convert(model, onnx_path, sample_blob)

    code = 0
    if args.test:
        code = test(onnx_path, module_config, options)
    if do_evaluate:
        evaluate(model, origin, onnx_path, pictures, preprocessing, config)
    return code


if __name__ == "__main__":
    run(main)
