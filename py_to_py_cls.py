"""Convert a PyTorch classifier to ONNX, verify it in OpenCV, test or evaluate it.

Classify one picture; evaluate both networks; only convert and compare:

    python py_to_py_cls.py --model_name resnet50 --test True
    python py_to_py_cls.py --model_name resnet50
    python py_to_py_cls.py --model_name resnet50 --evaluate False

Your own network: weights you trained, or a function that returns any nn.Module:

    python py_to_py_cls.py --model_name resnet50 --weights my.pth --test True
    python py_to_py_cls.py --model_name my_module:build_model --test True

Output goes to models/, results/ and logs/ in the current folder.
"""

import argparse
import dataclasses
import difflib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from common import (
    PICTURE_SUFFIXES,
    NetworksDisagree,
    OneLineParser,
    Preprocessing,
    RequestError,
    add_to_zoo,
    find_bundled,
    fit_labels,
    get_alias,
    get_blob,
    parse_bool,
    positive_int,
    read_config,
    read_lines,
    read_picture,
    run,
    to_options,
)
from conversion import Converted, convert, find_converted, find_network, get_onnx_path
from evaluation import evaluate, get_data, get_rank, in_turn, join_processes
from networks import (
    announce_torch,
    get_torchvision_weights,
    is_own,
    load_network,
    parse_weights,
    scale_frame,
)
from test_config import LOGS_DIR, MODELS_DIR, RESULTS_DIR, TestClsConfig, TestClsModuleConfig
from verify import get_references, verify

# The tutorial's networks, for --help. torchvision's other classifiers work, too.
MODELS = [
    "alexnet", "vgg11", "vgg13", "vgg16", "vgg19",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "squeezenet1_0", "squeezenet1_1",
    "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2",
]  # fmt: skip


# --- the command line -----------------------------------------------------------------------------


def model_name(text):
    """The user's module:function, or torchvision's name in lower case."""
    return text if is_own(text) else text.lower()


def check_model_name(name):
    """Raise RequestError, with similar names, if torchvision has no such classifier."""
    if not is_own(name) and name not in (names := get_torchvision_names()):
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it is one of {', '.join(MODELS)}"
        raise RequestError(
            f"--model_name: unknown network '{name}', {hint}; --list_models shows all of "
            "torchvision's, and MODULE:FUNCTION names your own"
        )


def get_torchvision_names():
    """torchvision's classifiers: 80 in 0.29."""
    announce_torch()
    from torchvision import models

    return models.list_models(module=models)


def non_empty(text):
    """Reject an empty option value."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


# fmt: off
def get_parser():
    parser = OneLineParser(__doc__, "--model_name NAME [--test BOOL] [options]")
    add = parser.add_argument
    yes_no = {"type": parse_bool, "metavar": "BOOL"}
    add("--model_name", type=model_name, metavar="NAME",
        help=f"the network: {', '.join(MODELS)}; any other of --list_models; or MODULE:FUNCTION, "
        "a function that returns an nn.Module, in a file in the current folder or an installed "
        "package")
    add("--list_models", action="store_true",
        help="print torchvision's classifiers, their input size and their published accuracy")
    add("--test", default=False, **yes_no,
        help="test mode: run classification.py on the converted network and one picture")
    add("--evaluate", **yes_no,
        help="evaluation mode: accuracy, inference time and L1 of both networks over labelled "
        "pictures, the bundled ones if you have no others (default: True, but False with --test "
        "True)")
    add("--weights", metavar="W",
        help="the name of torchvision's weights (IMAGENET1K_V1, DEFAULT ...), a checkpoint file "
        "with any number of classes, or 'random' (default: torchvision's first for the network, "
        "IMAGENET1K_V1 for almost all; for MODULE:FUNCTION, the ones it returns)")
    add("--weights_key", metavar="KEY",
        help="which of several state dicts in a checkpoint file, model_ema for instance (default: "
        "the first that fits)")
    add("--default_img_preprocess", default=True, **yes_no,
        help="test mode: prepare the picture as the network wants it (True), or as "
        "TestClsModuleConfig says (False); options win over both (default: True)")
    add("--preprocess", choices=["tutorial", "torchvision"], default="tutorial",
        help="evaluation mode: the centre of the resized picture, or torchvision's transforms of "
        "the weights, which its published accuracy was measured with (default: tutorial)")
    add("--engine", choices=["auto", "new", "classic"], default="auto",
        help="evaluation mode: OpenCV's inference engine; auto takes the fastest correct one "
        "(default: auto)")
    add("--resume", default=True, **yes_no,
        help="evaluation mode: resume where the same command was interrupted (default: True)")
    add_config(parser, TestClsConfig, "evaluation mode: TestClsConfig in test_config.py")
    add_config(parser, TestClsModuleConfig, "test mode: TestClsModuleConfig in test_config.py",
        "These defaults apply with --default_img_preprocess False. Evaluation mode\n"
        "takes --scale, --mean, --std and --rsz_* as well.")
    return parser
# fmt: on


def add_config(parser, config_class, title, description=None):
    """Add an option for each field of the dataclass, with its name and type."""
    group = parser.add_argument_group(title, description)
    types = {int: positive_int, bool: parse_bool}
    for field in dataclasses.fields(config_class):
        default = getattr(config_class(), field.name)
        shown = " ".join(default) if isinstance(default, list) else default
        group.add_argument(
            f"--{field.name}",
            type=types.get(field.type, non_empty),
            nargs="+" if isinstance(default, list) else None,
            metavar={int: "N", bool: "BOOL"}.get(field.type, "V"),
            help=f"{field.metadata['help']} (default: {'none' if shown == '' else shown})",
        )


def fill_config(config_class, args):
    """The dataclass with the options of the command line."""
    names = [field.name for field in dataclasses.fields(config_class)]
    return config_class(**{n: getattr(args, n) for n in names if getattr(args, n) is not None})


def get_module_config(args):
    """The TestClsModuleConfig of the command line; its default files work from any folder."""
    config = fill_config(TestClsModuleConfig, args)
    for name in ("input_img", "classes", "test_module_path"):
        if getattr(args, name) is not None:
            continue
        path = getattr(config, name)
        if args.cls_test_data_dir and name != "test_module_path":
            path = os.path.join(args.cls_test_data_dir, os.path.basename(path))
        setattr(config, name, find_bundled(path))
    return config


def check_request(args, config, module_config):
    """Raise RequestError for a bad request, before torch is imported.

    Returns (the test picture, the Data of an evaluation or None).
    """
    given = read_config(vars(args))
    if args.evaluate and given.get("width") != given.get("height"):
        raise RequestError(
            "an evaluation takes square frames: give --frame_size, not --frame_width and "
            "--frame_height"
        )
    torchvisions = args.preprocess == "torchvision"
    unused = ["bgr_to_rgb"] if torchvisions and args.evaluate else []
    if args.evaluate and not args.test:  # test mode takes these
        unused += ["crop", "rgb"]
        unused += ["scale", "mean", "std", "rsz_width", "rsz_height"] if torchvisions else []
    for name in unused:
        if getattr(args, name) is not None:
            raise RequestError(
                f"--{name} has no effect on an evaluation with --preprocess {args.preprocess}; "
                "leave it out"
            )
    read_lines(module_config.classes)
    if args.test and not Path(module_config.test_module_path).is_file():
        raise RequestError(f"--test_module_path {module_config.test_module_path}: no such file")
    picture = read_picture(module_config.input_img)
    if not args.evaluate:
        return picture, None
    data = get_data(config, args.img_root_dir is not None, args.img_cls_file is not None)
    Path(LOGS_DIR).mkdir(exist_ok=True)
    return picture, data


def get_args():
    """The command line; --evaluate is the opposite of --test if it isn't given."""
    parser = get_parser()
    args = parser.parse_args()
    if args.model_name is None and not args.list_models:
        parser.error("the following arguments are required: --model_name")
    if args.evaluate is None:
        args.evaluate = not args.test
    return args


def list_models():
    """Print torchvision's classifiers; the accuracies are those of their default weights."""
    print(f"{'network':20}{'resize':>8}{'input':>7}{'top-1':>9}{'top-5':>9}  weights")
    for name in get_torchvision_names():
        entry = next(iter(get_torchvision_weights(name).values()))
        transforms, accuracy = entry.transforms(), entry.meta["_metrics"]["ImageNet-1K"]
        print(
            f"{name:20}{transforms.resize_size[0]:8}{transforms.crop_size[0]:7}"
            f"{accuracy['acc@1']:7.2f} %{accuracy['acc@5']:7.2f} %  {entry.name}"
        )
    return 0


# --- network, conversion, test --------------------------------------------------------------------


def get_network(args, or_random):
    """The Network of the command line; without its model if a converted file makes it superfluous.

    or_random: whether random weights may stand in for a failed download. Not on the user's own
    pictures: figures of random weights mean nothing there.
    """
    weights = parse_weights(args.model_name, args.weights, args.weights_key)
    network = None if args.evaluate else find_network(args.model_name, weights, MODELS_DIR)
    if network is None:
        check_model_name(args.model_name)
        network = load_network(args.model_name, weights, args.frame_size, or_random)
    return network


def get_preprocessings(network, module_config, args):
    """The Preprocessing of (test mode, evaluation mode): options win over the defaults."""
    given = read_config(vars(args))
    if network.assumed and not given.keys() & {"scale", "mean", "std"}:
        print(
            f"NOTE: {network.name} declares no preprocessing: assuming torchvision's "
            "ImageNet preprocessing; --frame_size, --scale, --mean, --std and --rsz_* change it",
            file=sys.stderr,
        )
    wanted = replace(scale_frame(network.preprocessing, args.frame_size), **given)
    evaluated = wanted
    if not args.default_img_preprocess:
        frame = {"frame_width": str(wanted.width), "frame_height": str(wanted.height)}
        wanted = Preprocessing(**read_config(vars(module_config) | frame))
    return wanted, evaluated


def get_converted(network, module_config, picture, preprocessing, args):
    """(Converted, the file of the class names or None): reused, or converted now."""
    path = Path(module_config.model or get_onnx_path(network.name, network.weights, MODELS_DIR))
    blob = get_blob(picture, preprocessing)
    converted = find_converted(network, path, blob.shape)
    references = None
    if converted is None:
        if network.model is None:
            network = load_network(network.name, network.weights, args.frame_size)
        references = get_references(network.model, blob)
    count = converted.classes if converted else references[0].logits.shape[1]
    labels = fit_labels(read_lines(module_config.classes), args.classes, count)
    assumed = labels and not args.classes and network.weights.kind in ("file", "own")
    if assumed and converted is None:
        print(f"NOTE: assuming that the {count} classes are ImageNet's; --classes names others")
    if converted is None and module_config.model:
        try:
            converted = Converted(path, verify(path, references), count)
        except NetworksDisagree as error:
            raise NetworksDisagree(f"{path}: {error}; was it made from these --weights?") from None
        print(f"{path}: verified; taking the {converted.engines[0]} engine")
    converted = converted or convert(network, path, references)
    return converted, module_config.classes if labels else None


def test(converted, module_config, preprocessing, classes):
    """Run classification.py on the converted network; return its exit code."""
    picture = Path(module_config.input_img)
    suffix = picture.suffix if picture.suffix.lower() in PICTURE_SUFFIXES else ".png"
    result = f"{picture.stem}_{converted.path.stem}_{module_config.test_module_name}{suffix}"
    command = [sys.executable, module_config.test_module_path, "--model", str(converted.path)]
    command += ["--input", module_config.input_img, "--output", os.path.join(RESULTS_DIR, result)]
    command += ["--engine", converted.engines[0], *to_options(preprocessing)]
    command += ["--classes", classes] if classes else []
    code = subprocess.run(command).returncode
    if code < 0:
        raise RequestError(f"{module_config.test_module_path} was killed by signal {-code}")
    return code


test.__test__ = False  # keep pytest from collecting it


def main():
    args = get_args()
    if args.list_models:
        return list_models()
    config, module_config = fill_config(TestClsConfig, args), get_module_config(args)
    picture, data = check_request(args, config, module_config)
    join_processes()  # torchrun's; in_turn lets the first convert for all
    network = in_turn(lambda: get_network(args, data is None or data.bundled))
    preprocessing, evaluated = get_preprocessings(network, module_config, args)
    converted, classes = in_turn(
        lambda: get_converted(network, module_config, picture, preprocessing, args)
    )
    if get_rank() == 0 and not module_config.model:
        add_to_zoo(get_alias(network.name), converted, preprocessing, classes)
    code = 0
    if args.test and get_rank() == 0:
        code = test(converted, module_config, preprocessing, classes)
    if args.evaluate:
        evaluate(network, converted, evaluated, data, config, args)
    return code


if __name__ == "__main__":
    run(main)
