"""A small member of each of torchvision's families, converted and compared."""

import cv2
import numpy as np
import pytest
from conftest import read_onnx, run_torch, slow

from conversion import convert
from networks import Request, load_network
from verify import get_references

SMALL = ["mobilenet_v3_small", "regnet_y_400mf"]
# the others watch OpenCV and torchvision more than this project
OTHERS = [
    "googlenet", "shufflenet_v2_x0_5",
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s",
    "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "resnet18", "resnext50_32x4d",
    "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_32",
]  # fmt: skip


# OpenCV crashes with some of these on the classic engine
@pytest.mark.usefixtures("engines_apart")
@pytest.mark.parametrize("name", [*SMALL, *map(slow, OTHERS)])
def test_family(name):
    """The random network answers each picture differently, and OpenCV answers the same."""
    # their own size if they take no other, else one that takes less time
    size = 224 if name in ("alexnet", "maxvit_t", "vgg11", "vit_b_32") else 96
    network = load_network(Request(name, "random", width=size, height=size))
    model = network.model
    generator = np.random.default_rng(5)
    blob = generator.standard_normal((3, 3, size, size)).astype(np.float32)
    expected = run_torch(model, blob)
    spread = np.abs(expected - expected.mean(axis=0)).max() / np.abs(expected).max()
    assert spread > 0.01
    assert 1e-3 < np.abs(expected).max() < 1e3

    converted = convert(network, get_references(model, blob[:1]))
    engine = getattr(cv2.dnn, f"ENGINE_{converted.engines[0].upper()}")
    forward = read_onnx(converted.path, engine)
    for batch in (1, 3, 2):
        output = forward(blob[:batch])
        assert output.shape == (batch, 1000)
        assert np.abs(output - expected[:batch]).max() < 1e-4 * np.abs(expected).max()
