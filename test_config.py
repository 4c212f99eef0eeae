"""The defaults of py_to_py_cls.py: each field is also one of its options, of the same name."""

import os
from dataclasses import dataclass, field

# Output folders, in the current folder.
MODELS_DIR = "models"
LOGS_DIR = "logs"
RESULTS_DIR = "results"

# The bundled pictures; they are found beside the scripts from any folder.
CLS_TEST_DATA_DIR = "test_data/cls"
# The tutorial's folder of ImageNet's pictures; if it is missing, the bundled ones are taken.
IMAGENET_VAL_DIR = "./ILSVRC2012_img_val"


def option(default, text):
    """A dataclass field with its line in --help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class TestClsConfig:
    """The evaluation of both networks over a labelled set of pictures."""

    __test__ = False  # the name is the tutorial's; pytest must not collect it

    batch_size: int = option(50, "pictures in one forward pass")
    frame_size: int = option(224, "width and height of the blob, px, if not the network's own")
    img_root_dir: str = option(IMAGENET_VAL_DIR, "folder of the labelled pictures")
    img_cls_file: str = option("./val.txt", "their labels: lines of 'name class-ID'")
    bgr_to_rgb: bool = option(True, "the network takes RGB, OpenCV reads BGR")


@dataclass
class TestClsModuleConfig:
    """Test mode. Strings, as on the command line of classification.py."""

    __test__ = False

    cls_test_data_dir: str = option(
        CLS_TEST_DATA_DIR, "folder of the test picture and the class names"
    )
    test_module_name: str = option("classification", "suffix of the result's file name")
    test_module_path: str = option("classification.py", "the script that test mode runs")
    input_img: str = option(os.path.join(CLS_TEST_DATA_DIR, "red_panda.jpg"), "the test picture")
    model: str = option("", "a converted network (.onnx) to use instead of converting one")
    frame_height: str = option(str(TestClsConfig.frame_size), "height of the blob, px")
    frame_width: str = option(str(TestClsConfig.frame_size), "width of the blob, px")
    scale: str = option("1.0", "blobFromImage's scalefactor")
    mean: list[str] = option(
        ["0.0", "0.0", "0.0"], "blobFromImage's mean, subtracted before scaling"
    )
    std: list[str] = option([], "divide the channels of the blob by these")
    crop: str = option("False", "blobFromImage's crop")
    rgb: str = option("True", "blobFromImage's swapRB")
    rsz_height: str = option("", "resize the picture to this height first, px")
    rsz_width: str = option("", "resize the picture to this width first, px")
    classes: str = option(
        os.path.join(CLS_TEST_DATA_DIR, "imagenet_classes.txt"), "file of class names, one per line"
    )
