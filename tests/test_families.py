"""A small member of each of torchvision's families, converted and compared."""

import cv2
import numpy as np
import pytest
import torch

from common import convert, load_network

# The size of the pictures: their own where they take no other, else one that takes less time.
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


@pytest.mark.parametrize("name, size", FAMILIES.items())
def test_family(tmp_path, name, size):
    """The random network answers each picture differently, and OpenCV answers the same."""
    model, origin = load_network(name, "random", frame_size=size)
    generator = np.random.default_rng(5)
    blob = generator.standard_normal((3, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(blob)).numpy()
    spread = np.abs(expected - expected.mean(axis=0)).max() / np.abs(expected).max()
    assert spread > 0.01
    assert 1e-3 < np.abs(expected).max() < 1e3

    path = tmp_path / f"{name}.onnx"
    engines = convert(model, origin, path, blob[:1])
    net = cv2.dnn.readNetFromONNX(str(path), getattr(cv2.dnn, f"ENGINE_{engines[0].upper()}"))
    for batch in (1, 3, 2):
        net.setInput(blob[:batch])
        output = net.forward()
        assert output.shape == (batch, 1000)
        assert np.abs(output - expected[:batch]).max() < 1e-4 * np.abs(expected).max()
