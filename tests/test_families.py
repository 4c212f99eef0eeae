"""A small member of each of torchvision's families, converted and compared."""

import cv2
import numpy as np
import pytest
import torch

from conversion import convert
from networks import Request, load_network
from verify import get_references

# The size of the pictures: their own if they take no other, else one that takes less time.
FAMILIES = {
    "alexnet": 224,
    "convnext_tiny": 96,
    "densenet121": 96,
    "efficientnet_b0": 96,
    "efficientnet_v2_s": 96,
    "googlenet": 96,
    "inception_v3": 96,
    "maxvit_t": 224,
    "mnasnet0_5": 96,
    "mobilenet_v2": 96,
    "mobilenet_v3_small": 96,
    "regnet_y_400mf": 96,
    "resnet18": 96,
    "resnext50_32x4d": 96,
    "shufflenet_v2_x0_5": 96,
    "squeezenet1_1": 96,
    "swin_t": 96,
    "swin_v2_t": 96,
    "vgg11": 224,
    "vit_b_32": 224,
}


LARGE = {
    "alexnet", "convnext_tiny", "efficientnet_v2_s", "maxvit_t", "swin_t", "swin_v2_t", "vgg11",
    "vit_b_32",
}  # fmt: skip


@pytest.mark.parametrize(
    "name, size",
    [
        pytest.param(name, size, marks=[pytest.mark.slow] if name in LARGE else [])
        for name, size in FAMILIES.items()
    ],
)
def test_family(tmp_path, monkeypatch, name, size):
    """The random network answers each picture differently, and OpenCV answers the same."""
    monkeypatch.chdir(tmp_path)
    network = load_network(Request(name, "random", width=size, height=size))
    model = network.model
    generator = np.random.default_rng(5)
    blob = generator.standard_normal((3, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(blob)).numpy()
    spread = np.abs(expected - expected.mean(axis=0)).max() / np.abs(expected).max()
    assert spread > 0.01
    assert 1e-3 < np.abs(expected).max() < 1e3

    converted = convert(network, get_references(model, blob[:1]))
    engine = getattr(cv2.dnn, f"ENGINE_{converted.engines[0].upper()}")
    net = cv2.dnn.readNetFromONNX(str(converted.path), engine)
    for batch in (1, 3, 2):
        net.setInput(blob[:batch])
        output = net.forward()
        assert output.shape == (batch, 1000)
        assert np.abs(output - expected[:batch]).max() < 1e-4 * np.abs(expected).max()
