"""Convert a PyTorch classifier to ONNX, prove it in OpenCV, then test or evaluate it.

    python py_to_py_cls.py --model_name resnet50 --test True         # classify one picture
    python py_to_py_cls.py --model_name resnet50                     # evaluate both networks
    python py_to_py_cls.py --model_name resnet50 --evaluate False    # only convert and compare
    torchrun --nproc-per-node 2 py_to_py_cls.py --model_name resnet50    # evaluate, two processes
    python py_to_py_cls.py --list_models                             # torchvision's 80 classifiers

A network of your own: weights that you trained, or a function that returns any nn.Module:

    python py_to_py_cls.py --model_name resnet50 --weights my.pth --classes my.txt --test True
    python py_to_py_cls.py --model_name my_module:build_model --weights my.pth --test True

What is written goes to models/, results/ and logs/ in the current folder.
"""

import argparse
import dataclasses
import difflib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import classification
from classification import (
    OneLineParser,
    RequestError,
    parse_bool,
    positive_int,
    read_labels,
    read_picture,
    run,
)
from common import (
    RANDOM,
    add_to_zoo,
    convert,
    find_bundled,
    find_verified,
    get_alias,
    get_conversion_key,
    get_onnx_path,
    get_weights,
    is_own,
    load_network,
)
from default_preprocess_config import pytorch_resize_input_blob
from evaluation import (
    check_frame_size,
    check_transforms,
    evaluate,
    get_blob_function,
    get_evaluation_key,
    get_labelled_pictures,
    in_turn,
    join_processes,
)
from test_config import (
    IMAGENET_VAL_DIR,
    LOGS_DIR,
    MODELS_DIR,
    RESULTS_DIR,
    TestClsConfig,
    TestClsModuleConfig,
)
from verify import NetworksDisagree, get_references, run_pytorch, verify

# The tutorial's, whose names and preprocessing are known without importing torchvision, which
# takes seconds. All others of torchvision's classifiers are taken as well.
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


# --- the command line -----------------------------------------------------------------------------


def model_name(text):
    """One of torchvision's classifiers, whatever its case, or the user's module:function."""
    name = text.lower()
    if is_own(text) or name in MODELS:
        return text if is_own(text) else name
    names = get_torchvision_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it is one of {', '.join(MODELS)}"
        raise argparse.ArgumentTypeError(
            f"unknown network '{text}', {hint}; --list_models shows all of torchvision's, and "
            "MODULE:FUNCTION names your own"
        )
    return name


def get_torchvision_names():
    """torchvision's classifiers: 80 in 0.29."""
    from torchvision import models

    return models.list_models(module=models)


def get_parser():
    parser = OneLineParser(__doc__)
    add = parser.add_argument
    add(
        "--model_name",
        type=model_name,
        metavar="NAME",
        help=f"the network: {', '.join(MODELS)}; any other of --list_models; or "
        "MODULE:FUNCTION, a function that returns an nn.Module, from a file in the current folder "
        "or an installed package",
    )
    add(
        "--list_models",
        action="store_true",
        help="print torchvision's classifiers, their input size and their published accuracy",
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
        "pictures, the bundled ones where there are no others (default: True, but False with "
        "--test True)",
    )
    add(
        "--default_img_preprocess",
        type=parse_bool,
        default=True,
        metavar="BOOL",
        help="test mode: prepare the picture as the network's weights want it "
        "(pytorch_resize_input_blob of default_preprocess_config.py, with the sizes, mean and std "
        "that torchvision gives for them), not as TestClsModuleConfig says; options given here "
        "win over both (default: True)",
    )
    add(
        "--weights",
        help="torchvision's name of the weights (IMAGENET1K_V1, DEFAULT ...), a checkpoint file "
        "with any number of classes, or 'random' (default: torchvision's first for the network, "
        "IMAGENET1K_V1 for almost all; MODULE:FUNCTION as it is returned)",
    )
    add(
        "--preprocess",
        choices=["tutorial", "torchvision"],
        default="tutorial",
        help="evaluation mode: the centre of the resized picture, or the transforms of "
        "the weights, whose accuracy is the published one (default: tutorial)",
    )
    add(
        "--engine",
        choices=["auto", "new", "classic"],
        default="auto",
        help="evaluation mode: OpenCV's inference engine; auto takes the faster of those that "
        "are right (default: auto)",
    )
    add(
        "--resume",
        type=parse_bool,
        default=True,
        metavar="BOOL",
        help="evaluation mode: go on where the same command was stopped (default: True)",
    )
    add_config(parser, TestClsConfig, "evaluation mode (TestClsConfig in test_config.py)")
    add_config(
        parser,
        TestClsModuleConfig,
        "test mode (TestClsModuleConfig in test_config.py)",
        "scale, mean, std, crop, rgb and rsz_* have these defaults with --default_img_preprocess "
        "False, else torchvision's; evaluation mode takes scale, mean, std and rsz_* where given",
    )
    return parser


def non_empty(text):
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def add_config(parser, config_class, title, description=None):
    """An option for each field of the dataclass, of its name and type."""
    group = parser.add_argument_group(title, description)
    types = {int: positive_int, bool: parse_bool}
    for config_field in dataclasses.fields(config_class):
        default = getattr(config_class(), config_field.name)
        shown = " ".join(default) if isinstance(default, list) else default
        group.add_argument(
            f"--{config_field.name}",
            type=types.get(config_field.type, non_empty),
            nargs=3 if isinstance(default, list) else None,
            metavar="BOOL" if config_field.type is bool else None,
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


def get_preset(model_name, weights, frame_size):
    """(frame size, {field: text} of PREPROCESSING) that a network wants by default.

    As torchvision says for its weights; the user's own weights count as its default ones. For the
    user's own architecture the tutorial's, for a frame of `frame_size` if that is given.
    """
    size, preset = TestClsConfig().frame_size, pytorch_resize_input_blob
    if is_own(model_name):
        resize = int(preset["rsz_width"]) * (frame_size or size) // size
        return size, preset | {"rsz_width": str(resize), "rsz_height": str(resize)}
    first = weights is None or weights.lower() == RANDOM or Path(weights).is_file()
    if model_name in MODELS and first:  # known without torchvision: a test compares
        return size, preset
    transforms = get_transforms(model_name, weights)
    resize = str(transforms.resize_size[0])
    return transforms.crop_size[0], preset | {
        "mean": [f"{255 * value:g}" for value in transforms.mean],
        "std": [f"{value:g}" for value in transforms.std],
        "rsz_width": resize,
        "rsz_height": resize,
    }


def get_transforms(model_name, weights):
    """torchvision's transforms of these weights, or of the network's first where they have none."""
    known = get_weights(model_name)
    return known.get((weights or "").upper(), next(iter(known.values()))).transforms()


def get_preprocessing(default_img_preprocess, config, given, preset):
    """{field: text} of PREPROCESSING: the preset's or the config's, and what is given wins."""
    own = {name: getattr(config, name) for name in PREPROCESSING}
    if not default_img_preprocess:
        return own
    return preset | {name: own[name] for name in PREPROCESSING if name in given}


def get_preprocessing_options(preprocessing, config):
    """The same as a command line for classification.py."""
    options = ["--width", config.frame_width, "--height", config.frame_height]
    for name, option in PREPROCESSING.items():
        value = preprocessing[name]
        if value:
            options += [option, *value] if isinstance(value, list) else [option, value]
    return options


# --- the list of networks -------------------------------------------------------------------------


def list_models():
    """Print torchvision's classifiers; their accuracies are of their default weights."""
    print(f"{'network':20}{'resize':>8}{'input':>7}{'top-1':>9}{'top-5':>9}  weights")
    for name in get_torchvision_names():
        entry = next(iter(get_weights(name).values()))
        transforms, accuracy = entry.transforms(), entry.meta["_metrics"]["ImageNet-1K"]
        print(
            f"{name:20}{transforms.resize_size[0]:8}{transforms.crop_size[0]:7}"
            f"{accuracy['acc@1']:7.2f} %{accuracy['acc@5']:7.2f} %  {entry.name}"
        )
    return 0


# --- test mode ------------------------------------------------------------------------------------


def test(network, config, options):
    """Run classification.py on the converted network; return its exit code."""
    picture = Path(config.input_img)
    known = picture.suffix.lower() in classification.SUFFIXES["picture"]
    result = f"{picture.stem}_{network.onnx_path.stem}_{config.test_module_name}"
    result += picture.suffix if known else ".png"
    command = [sys.executable, config.test_module_path, "--model", str(network.onnx_path)]
    command += ["--input", config.input_img, "--output", os.path.join(RESULTS_DIR, result)]
    command += ["--engine", network.engines[0], *options]
    command += ["--classes", network.classes] if network.classes else []
    code = subprocess.run(command).returncode
    if code < 0:
        raise RequestError(f"{config.test_module_path} was ended by signal {-code}")
    return code


test.__test__ = False  # for pytest


# --- the run --------------------------------------------------------------------------------------


@dataclass
class Network:
    """A network in PyTorch and its verified file for OpenCV."""

    model: object  # torch.nn.Module, in eval mode
    origin: str  # of its weights
    onnx_path: Path
    engines: list  # OpenCV's that are right with the file
    classes: str | None  # the file of the class names, if it is of as many as the network has


def get_network(args, config, sample_blob, given, or_random):
    """The Network of the command line, converted if need be."""
    frame_size = sample_blob.shape[3]
    model, origin = load_network(args.model_name, args.weights, or_random, frame_size)
    count = run_pytorch(model, sample_blob).shape[1]
    # class names that were given must fit; the default ones are left out if they don't
    fit = classification.fit_labels(read_labels(config.classes), given.get("classes"), count)
    if config.model:
        onnx_path = Path(config.model)
        key = get_conversion_key(model, origin, sample_blob.shape)
        engines = None if is_own(args.model_name) else find_verified(onnx_path, key)
        if not engines:
            try:
                engines = verify(onnx_path, get_references(model, sample_blob))
            except NetworksDisagree as error:
                raise NetworksDisagree(f"{onnx_path}: {error}; is it of these --weights?") from None
            print(f"{onnx_path}: verified")
    else:
        onnx_path = get_onnx_path(args.model_name, origin, MODELS_DIR)
        # what a function of the user's computes is not told by its weights
        use_cached = not is_own(args.model_name)
        engines = convert(model, origin, onnx_path, sample_blob, use_cached)
    return Network(model, origin, onnx_path, engines, config.classes if fit else None)


def main():
    parser = get_parser()
    args = parser.parse_args()
    if args.list_models:
        return list_models()
    if args.model_name is None:
        parser.error("the following arguments are required: --model_name")
    given = {name: value for name, value in vars(args).items() if value is not None}
    do_evaluate = not args.test if args.evaluate is None else args.evaluate

    # All that can be wrong with the request is told before torch is imported.
    frame_size, preset = get_preset(args.model_name, args.weights, args.frame_size)
    given.setdefault("frame_size", frame_size)
    config = get_config(TestClsConfig, given)
    module_config = get_config(TestClsModuleConfig, given)
    test_preprocessing = get_preprocessing(
        args.default_img_preprocess, module_config, given, preset
    )
    options = get_preprocessing_options(test_preprocessing, module_config)
    blob_args = classification.parse_args(options)
    sample_blob = classification.get_blob(read_picture(module_config.input_img), blob_args)
    read_labels(module_config.classes)
    if args.test and not Path(module_config.test_module_path).is_file():
        raise RequestError(f"--test_module_path {module_config.test_module_path}: no such file")
    bundled = True
    if do_evaluate:
        preprocessing = get_preprocessing(True, module_config, given, preset)
        check_frame_size(config, module_config, preprocessing)
        if args.preprocess == "torchvision":
            if is_own(args.model_name):
                raise RequestError(
                    "--preprocess torchvision is for torchvision's networks: leave it out, and "
                    "give the preprocessing options"
                )
            preprocessing = get_transforms(args.model_name, args.weights)
            check_transforms(preprocessing, config.frame_size)
        pictures, root, bundled = get_labelled_pictures(config, given)
        Path(LOGS_DIR).mkdir(exist_ok=True)

    rank, processes = join_processes()
    if do_evaluate and bundled:
        print(f"no {IMAGENET_VAL_DIR} here: evaluating on the {len(pictures)} bundled pictures")
    network = in_turn(
        rank, processes, lambda: get_network(args, module_config, sample_blob, given, bundled)
    )
    if rank == 0 and not module_config.model:
        alias = get_alias(args.model_name)
        add_to_zoo(alias, network.onnx_path, blob_args, network.classes)
    code = test(network, module_config, options) if args.test and rank == 0 else 0
    if do_evaluate:
        get_blob = get_blob_function(preprocessing, config)
        key = get_conversion_key(network.model, network.origin, sample_blob.shape)
        key |= get_evaluation_key(args, config, preprocessing, network.onnx_path, pictures, root)
        evaluate(network, pictures, get_blob, sample_blob, key, args, rank, processes)
    return code


if __name__ == "__main__":
    run(main)
