"""The defaults of py_to_py_cls.py: each field is also one of its options, of the same name."""

from dataclasses import dataclass, field

from classification import CENTERS, INTERPOLATIONS, boolean, finite, non_zero, positive_int

# Output folders, in the current folder.
MODELS_DIR = "models"
LOGS_DIR = "logs"
RESULTS_DIR = "results"

# The bundled pictures; they are found beside the scripts from any folder.
CLS_TEST_DATA_DIR = "test_data/cls"
# The tutorial's folder of ImageNet's pictures; if it is missing, the bundled ones are taken.
IMAGENET_VAL_DIR = "./ILSVRC2012_img_val"


def option(default, text, parse=str, **how):
    """A dataclass field, with what argparse needs to know of it as its metadata."""
    metavar = {positive_int: "N", boolean: "BOOL"}.get(parse, "V")
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    text += f" (default: {'none' if shown in ('', None) else shown})"
    return field(default=default, metadata={"type": parse, "metavar": metavar, **how, "help": text})


@dataclass
class TestClsConfig:
    """Evaluation mode: both networks over labelled pictures."""

    __test__ = False  # the name is the tutorial's; pytest must not collect it

    batch_size: int = option(50, "pictures in one forward pass", positive_int)
    frame_size: int = option(None, "sides of the blob, px; none: the network's", positive_int)
    img_root_dir: str = option(IMAGENET_VAL_DIR, "folder of the labelled pictures")
    img_cls_file: str = option("./val.txt", "the label file; or val.txt or val.csv in that folder")
    bgr_to_rgb: bool = option(None, "the tutorial's name for --rgb", boolean, dest="rgb")


@dataclass
class TestClsModuleConfig:
    """Test mode: one picture. The options of the preprocessing are evaluation mode's as well."""

    __test__ = False

    cls_test_data_dir: str = option(
        CLS_TEST_DATA_DIR, "folder of the default input_img and classes"
    )
    input_img: str = option(f"{CLS_TEST_DATA_DIR}/red_panda.jpg", "the test picture")
    classes: str = option(f"{CLS_TEST_DATA_DIR}/imagenet_classes.txt", "class names, one per line")
    test_module_name: str = option("classification", "suffix of the result's file name")
    test_module_path: str = option("classification.py", "the script that test mode runs")
    model: str = ""  # the tutorial's; here test mode always runs the converted one
    frame_height: int = option(None, "height of the blob, px", positive_int)
    frame_width: int = option(None, "width of the blob, px", positive_int)
    scale: float = option(1.0, "blobFromImage's scalefactor", non_zero)
    mean: tuple = option((0.0, 0.0, 0.0), "subtracted first, R G B if --rgb", finite, nargs=3)
    std: tuple = option((), "divide the channels of the blob by these", non_zero, nargs=3)
    crop: bool = option(False, "blobFromImage's crop", boolean)
    rgb: bool = option(True, "blobFromImage's swapRB", boolean)
    rsz_height: int = option(None, "the tutorial's first resize: height, px", positive_int)
    rsz_width: int = option(None, "the tutorial's first resize: width, px", positive_int)
    resize: tuple = option((), "the shorter side, or width and height, px", positive_int, nargs="+")
    interpolation: str = option("bilinear", "of --resize", choices=INTERPOLATIONS, metavar=None)
    center: str = option("round", "where --resize cuts", choices=CENTERS, metavar=None)
