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

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import classification
from classification import RequestError, boolean, make_parser, read_lines, read_picture, run
from common import Request, find_bundled, read_fields
from entries import find_converted, write_entry
from evaluation import evaluate, make_plan
from labelled_pictures import get_data
from processes import LOCAL_RANK, RANK, first_process_first, join_processes
from test_config import CLS_TEST_DATA_DIR, RESULTS_DIR, TestClsConfig, TestClsModuleConfig
from verify import EACH_ENGINE, get_references

NUMBERS = {"scale", "mean", "std"}  # of which OpenCV has defaults


def model_name(text):
    """torchvision's name in lower case, or your "module:function", also as ./module.py:function."""
    module, colon, function = text.partition(":")
    if not colon:
        return text.lower()
    return f"{module.removeprefix('./').removesuffix('.py').replace('/', '.')}:{function}"


# fmt: off
def get_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    yes_no = {"type": boolean, "metavar": "BOOL"}
    add("--model_name", type=model_name, metavar="NAME",
        help="one of --list_models; or MODULE:FUNCTION, which returns an nn.Module of yours")
    add("--list_models", action="store_true", help="torchvision's classifiers and their accuracies")
    add("--test", default=False, **yes_no, help="test mode: classification.py with one picture")
    add("--evaluate", **yes_no, help="evaluation mode: labelled pictures (default: unless --test)")
    add("--weights", default="", metavar="W",
        help="IMAGENET1K_V1 ..., a checkpoint file, or 'random' (default: the network's own)")
    add("--weights_key", default="", metavar="KEY",
        help="a state dict in the file, model_ema for instance (default: the first that fits)")
    add("--allow_branches", default=False, **yes_no,
        help="convert a network even if it branches on the values of its input (default: False)")
    add("--transform", default="", type=model_name, metavar="MODULE:NAME",
        help="your validation transform, PIL picture to tensor (default: the library's)")
    add("--default_img_preprocess", default=True, **yes_no,
        help="both modes: as the network wants it; False: by the defaults below (default: True)")
    add("--preprocess", choices=["own", "tutorial", "transform"], default="own",
        help="evaluation mode: own, as the network wants it; tutorial, the centre of 256x256; "
        "transform, PyTorch's pictures by its own transform, OpenCV's as deployed (default: own)")
    add("--engine", choices=["auto", *EACH_ENGINE], default="auto",
        help="evaluation mode: OpenCV's engine (default: auto, the fastest correct one)")
    add("--resume", default=True, **yes_no, help="continue a stopped evaluation (default: True)")
    for config in (TestClsConfig, TestClsModuleConfig):
        group = parser.add_argument_group(f"{config.__name__} in test_config.py", config.__doc__)
        for field in filter(lambda field: field.metadata, fields(config)):
            group.add_argument(f"--{field.name}", **field.metadata)
    return parser
# fmt: on


def get_args():
    """The command line, with args.request, and in args.given the Preprocessing's fields."""
    args = get_parser().parse_args()
    if not (args.model_name or args.list_models):
        raise RequestError("--model_name is missing (see --help)")
    if args.evaluate is None:
        args.evaluate = not args.test
    size = args.frame_width or args.frame_size, args.frame_height or args.frame_size
    args.request = Request(args.model_name, args.weights, args.weights_key, *size, args.transform)
    args.given = read_fields(vars(args))
    if args.weights_key and not args.request.is_file:
        raise RequestError(f"--weights_key needs --weights FILE; '{args.weights}' isn't a file")
    check_given(args)
    return args


def check_given(args):
    """Raise RequestError for options of the preprocessing that have no effect, or conflict."""
    given = {f"--{name.replace('initial_', 'rsz_')}" for name in args.given}
    given |= set() if args.default_img_preprocess else {"--default_img_preprocess"}
    initial = given & {"--rsz_width", "--rsz_height"}
    is_tutorial = args.evaluate and args.preprocess == "tutorial"
    if args.transform and given:
        raise RequestError(f"--transform says how pictures are prepared: leave out {min(given)}")
    if len(initial) == 1:
        raise RequestError("--rsz_width and --rsz_height go together")
    if initial and args.default_img_preprocess and not is_tutorial:
        needed = "--preprocess tutorial or --default_img_preprocess False"
        raise RequestError(f"--rsz_width and --rsz_height need {needed}; else, give --resize")
    others = given & {"--resize", "--interpolation", "--center", "--crop"}
    if is_tutorial and others and not args.test:
        raise RequestError(f"--preprocess tutorial has its own centre: leave out {min(others)}")
    if "--resize" in given and given & {"--crop", *initial}:
        raise RequestError("--resize excludes --crop and --rsz_*: leave one out")


def get_preprocessing(about, args):
    """The Preprocessing of a Network, or its Converted, with what the options change."""
    given, base = args.given, about.preprocessing
    if not args.default_img_preprocess:
        base = replace(base, **read_fields(vars(TestClsModuleConfig())))
    else:  # the tutorial's initial size is the evaluation's alone
        given = {name: value for name, value in given.items() if "initial" not in name}
        if not about.declared and given.keys() & NUMBERS:
            base = replace(base, scale=1.0, mean=(0.0,) * 3, std=())  # OpenCV's defaults
    if given.keys() & {*classification.BLOBS}:
        base = replace(base, resize=(), interpolation="bilinear", center="round")
    p = replace(base, **given)
    if "resize" in given:
        p = replace(p, crop=p.resize != (p.width, p.height))
    classification.check_preprocessing(p, given)
    return p


def fill_config(config_class, args):
    """The dataclass with the options of the command line."""
    given = {field.name: getattr(args, field.name, None) for field in fields(config_class)}
    return config_class(**{name: value for name, value in given.items() if value is not None})


def get_module_config(args):
    """The TestClsModuleConfig of the command line; its default files work from any folder."""
    config = fill_config(TestClsModuleConfig, args)
    for name in ("input_img", "classes", "test_module_path"):
        if getattr(args, name) is None:
            path = getattr(config, name).replace(CLS_TEST_DATA_DIR, config.cls_test_data_dir)
            setattr(config, name, find_bundled(path))
    return config


def list_models():
    """Print torchvision's classifiers; the accuracies are those of their default weights."""
    from networks import get_torchvision_names, get_torchvision_weights

    print(f"{'network':20}{'resize':>8}{'input':>7}{'top-1':>9}{'top-5':>9}  weights")
    for name in get_torchvision_names():
        entry = next(iter(get_torchvision_weights(name).values()))
        transforms, accuracy = entry.transforms(), entry.meta["_metrics"]["ImageNet-1K"]
        print(
            f"{name:20}{transforms.resize_size[0]:8}{transforms.crop_size[0]:7}"
            f"{accuracy['acc@1']:7.2f} %{accuracy['acc@5']:7.2f} %  {entry.name}"
        )


def get_converted(args, config, module_config, picture, names, data):
    """(Network, Converted, Plan) of the network's file, a new one or reused.

    Without an evaluation there is no Plan; and no Network if the file is found without PyTorch.
    """
    needs_network, network, plan = args.evaluate or args.transform, None, None
    converted = None if needs_network else find_converted(args.request)
    if not converted:
        print("loading PyTorch ...", flush=True)  # it takes seconds
        from networks import load_network

        network = load_network(args.request, data is None or data.bundled, module_config.input_img)
        # again: only now is it known that a download failed, or that a size is the network's own
        converted = find_converted(network.request, network)
    args.preprocessing = get_preprocessing(network or converted, args)
    if converted:
        outputs = converted.outputs
    else:
        blob = classification.get_blob(picture, network.preprocessing)
        references = get_references(network.model, blob)
        outputs = references[0].logits.shape[1]
    if args.evaluate:  # before the export, which takes longer
        plan = make_plan(network, data, outputs, config, args)
    elif args.classes and len(names) != outputs:
        problem = f"{len(names)} lines, but the network has {outputs} outputs"
        raise RequestError(f"{args.classes}: {problem}")
    if not converted:
        from conversion import convert

        converted = convert(network, references, args.allow_branches)
    return network, converted, plan


def save_entry(args, converted, names, classes):
    """Write the entry that test mode or a conversion asks for; report what had to be assumed.

    An evaluation alone keeps an older entry's settings. names: the lines of `classes`.
    """
    only_evaluates, p, name = args.evaluate and not args.test, args.preprocessing, args.model_name
    own = [] if args.classes else converted.class_names
    labels = classes if len(names) == converted.outputs and not own else None
    if not converted.declared and not args.given.keys() & NUMBERS:
        note = "assuming ImageNet's; --transform or --resize, --mean, --std change it"
        print(f"NOTE: {name} declares no preprocessing: {note}", file=sys.stderr)
    if own:
        print(f"class names: the network's own, {', '.join(own)[:60]} ...")
    elif labels and not args.classes and (args.request.is_own or args.request.is_file):
        print(f"NOTE: assuming that {name}'s classes are ImageNet's; --classes names others")
    if not args.test:  # which prints it as well
        print(f"preprocessing: {classification.describe(p)}")
    changed = [k for k, value in vars(p).items() if value != vars(converted.preprocessing)[k]]
    if converted.declared and changed:
        print(f"preprocessing: the network's own but for {', '.join(changed)}, as you say")
    if only_evaluates and converted.declared:
        p = converted.preprocessing  # the options are the evaluation's, not the entry's
    write_entry(converted, p, labels, anew=not only_evaluates)


def run_test_module(converted, module_config):
    """Run classification.py on the converted network, as you would; return its exit code."""
    picture, name = Path(module_config.input_img), converted.path.stem
    suffixes = classification.SAVED_PICTURES
    suffix = picture.suffix if picture.suffix.lower() in suffixes else suffixes[0]
    end = f"_{name}_{module_config.test_module_name}{suffix}"
    output = Path(RESULTS_DIR, classification.get_result_name(str(picture), end))
    zoo = converted.path.with_name(classification.ZOO_NAME)
    command = [sys.executable, module_config.test_module_path, name]
    command += ["--zoo", zoo, "--input", picture, "--output", output]
    code = subprocess.run(command).returncode
    if code < 0:
        raise RequestError(f"{module_config.test_module_path} was killed by signal {-code}")
    return code


def main():
    args = get_args()
    if args.list_models:
        return list_models()
    config, module_config = fill_config(TestClsConfig, args), get_module_config(args)
    if args.test and not Path(module_config.test_module_path).is_file():
        raise RequestError(f"--test_module_path {module_config.test_module_path}: no such file")
    picture, names = read_picture(module_config.input_img), read_lines(module_config.classes)
    data = get_data(config, args, names) if args.evaluate else None
    join_processes()  # torchrun's
    with first_process_first():
        network, converted, plan = get_converted(args, config, module_config, picture, names, data)
        if LOCAL_RANK == 0:
            save_entry(args, converted, names, module_config.classes)
    code = run_test_module(converted, module_config) if args.test and RANK == 0 else 0
    if args.evaluate:
        evaluate(network, converted, data, plan, args.resume)
    return code


if __name__ == "__main__":
    run(main)
