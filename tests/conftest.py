"""The scripts are run here as a user runs them: a process each, in an empty folder, without a
display and without network."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "test_data" / "cls"
sys.path.insert(0, str(ROOT))
# For this process's workers and the scripts: PyTorch's threads take no time from the other tests',
# and glibc keeps the memory of large networks, which the kernel would clear again and again.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def pytest_addoption(parser):
    parser.addoption("--all-models", action="store_true", help="convert every network of the list")
    parser.addoption("--slow", action="store_true", help="run the tests marked as slow as well")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with --slow")
    config.addinivalue_line("markers", "all_models: runs with --all-models")


def pytest_collection_modifyitems(config, items):
    for option in ("--slow", "--all-models"):
        skip = pytest.mark.skip(reason=f"needs {option}")
        for item in items:
            marker = item.get_closest_marker(option.strip("-").replace("-", "_"))
            if marker and not config.getoption(option):
                item.add_marker(skip)


@pytest.fixture
def env(tmp_path):
    """No display, no network (a proxy that refuses), an empty cache of weights."""
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    env["TORCH_HOME"] = str(tmp_path / "torch_home")
    for scheme in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        env[scheme] = "http://127.0.0.1:9"
    return env


@pytest.fixture
def folder(tmp_path):
    """The folder in which the scripts run."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def run(folder, env):
    """run("script.py", options ...): the finished process, its output as text."""

    def run(script, *args, **changed_env):
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        return subprocess.run(
            command, cwd=folder, env=env | changed_env, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture
def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="session")
def resnet18():
    """A random resnet18 to be treated as if it were trained: seed 1, calibrated."""
    import torch
    from torchvision import models

    torch.manual_seed(1)
    model = models.resnet18()
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 224, 224))
    return model.eval()


@pytest.fixture(scope="session")
def weights(resnet18, tmp_path_factory):
    """Its state dict in a file."""
    import torch

    path = tmp_path_factory.mktemp("weights") / "trained.pth"
    torch.save(resnet18.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def model(resnet18, tmp_path_factory):
    """Its ONNX file, exported without the project's code."""
    import torch

    path = tmp_path_factory.mktemp("model") / "resnet18.onnx"
    batch = {0: "batch"}
    torch.onnx.export(
        resnet18,
        torch.zeros(1, 3, 224, 224),
        str(path),
        input_names=["input"],
        output_names=["output"],
        dynamic_axes={"input": batch, "output": batch},
        dynamo=False,
    )
    return path


@pytest.fixture(scope="session")
def converted(resnet18, weights, tmp_path_factory):
    """The file that the project makes of it, verified."""
    import classification
    from common import convert

    picture = classification.read_picture(PICTURES / "red_panda.jpg")
    path = tmp_path_factory.mktemp("converted") / "resnet18.onnx"
    blob = classification.get_blob(picture, classification.parse_args([]))
    convert(resnet18, str(weights), path, blob)
    return path


@pytest.fixture(scope="session")
def torchvision_logits(resnet18):
    """logits(path, centre_crop): PyTorch's answer, preprocessed without the project's code.

    torchvision's normalisation of a picture that cv2 has read and resized. With centre_crop the
    middle 224 of 256 pixels, else the whole picture made small, which is what blobFromImage does.
    """
    import cv2
    import torch
    from torchvision.transforms import v2

    normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def logits(path, centre_crop):
        rgb = cv2.imread(str(path))[:, :, ::-1].astype("float32")
        rgb = cv2.resize(rgb, (256, 256))
        rgb = rgb[16:240, 16:240] if centre_crop else cv2.resize(rgb, (224, 224))
        tensor = torch.from_numpy(rgb.copy()).permute(2, 0, 1) / 255
        with torch.no_grad():
            return resnet18(normalize(tensor)[None])[0].numpy()

    return logits


def read_answer(text, block=""):
    """(class ID, confidence) that follow the line `block` in a script's output."""
    lines = text[text.index(block) :].splitlines()
    class_id = next(line for line in lines if line.startswith("* class ID: "))
    confidence = next(line for line in lines if line.startswith("* confidence: "))
    return int(class_id.split()[3].rstrip(",")), float(confidence.split()[-1])


def check_one_line(result, *words, code=2):
    """The process ended with `code` and one line on stderr that has all the `words`."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0]
