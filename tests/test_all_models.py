"""Every network of the tutorial's list, converted and compared; and their files in other OpenCVs:

python -m pytest --all-models -n 0 -s tests/test_all_models.py
"""

import re
import subprocess
import sys
import venv

import cv2
import numpy as np
import pytest
import torch
from conftest import PICTURES, ROOT, read_answer

from networks import Weights, load_network
from py_to_py_cls import MODELS

KOALA = PICTURES / "koala.jpg"
PACKAGES = [
    "opencv-python==4.10.*",
    "opencv-python==4.14.*",
    "opencv-python-headless==4.10.*",
    "opencv-python-headless==4.14.*",
    "opencv-python-headless==5.0.*",
]


pytestmark = pytest.mark.all_models


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """The folder of the converted networks."""
    return tmp_path_factory.mktemp("all_models")


@pytest.fixture
def convert(shared, env):
    """convert(name): the network's file, and the program's output if it wasn't there yet."""

    def convert(name):
        path = shared / "models" / f"{name}-random.onnx"
        if path.exists():
            return path, None
        command = [sys.executable, ROOT / "py_to_py_cls.py", "--model_name", name]
        command += ["--weights", "random", "--evaluate", "False"]
        result = subprocess.run(command, cwd=shared, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return path, result.stdout

    return convert


@pytest.mark.parametrize("name", MODELS)
def test_network(convert, name):
    path, output = convert(name)
    assert path.is_file()
    errors = [float(e) for e in re.findall(r" (\d\.\de-\d\d)\b", output)]
    assert len(errors) == 4  # two engines, two comparisons each
    assert 0 < max(errors) < 1e-4
    print(f"{name}: relative error {max(errors):.1e}")


@pytest.fixture(scope="session")
def answers():
    """{network: (class ID, logit) of the koala} by PyTorch, preprocessed without the project."""
    rgb = cv2.imread(str(KOALA))[:, :, ::-1].astype(np.float32)
    rgb = cv2.resize(cv2.resize(rgb, (256, 256)), (224, 224)) / 255
    blob = ((rgb - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).astype(np.float32)
    found = {}
    for name in MODELS:
        model = load_network(name, Weights("random", "random")).model
        with torch.no_grad():
            logits = model(torch.from_numpy(blob).permute(2, 0, 1)[None])[0]
        found[name] = int(logits.argmax()), float(logits.max())
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_opencv_version(convert, answers, folder, env, package):
    """classification.py gives PyTorch's answer with all the files, in an environment of its own."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", package, "numpy"], check=True)
    found = subprocess.run(
        [python, "-c", "import cv2; print(cv2.__version__)"], capture_output=True, text=True
    ).stdout.strip()
    assert package.partition("==")[2].rstrip("*") in found

    def classify(*arguments):
        command = [python, ROOT / "classification.py", *arguments]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)

    assert ("--engine" in classify("--help").stdout) == found.startswith("5")
    for name, (class_id, logit) in answers.items():
        path, _ = convert(name)
        result = classify("--input", path, KOALA)
        assert result.returncode == 0, result.stderr
        assert read_answer(result.stdout) == (class_id, pytest.approx(logit, rel=1e-4, abs=1e-4))
        # and by the entry in models.yml
        result = classify(name, "--zoo", path.parent / "models.yml", "--input", KOALA)
        assert read_answer(result.stdout) == (class_id, pytest.approx(logit, rel=1e-4, abs=1e-4))
    print(f"{package}: OpenCV {found} gives PyTorch's answer with {len(answers)} networks")
