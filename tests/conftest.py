"""Most tests call a script's main() in the test's process, in an empty folder, without a display
and without network; the others start a process as a user does."""

import hashlib
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

# A shell ignores SIGINT in what it starts in the background, and children inherit that: the tests
# of Ctrl-C would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "test_data" / "cls"
sys.path.insert(0, str(ROOT))
# The tutorial's networks.
MODELS = [
    "alexnet", "vgg11", "vgg13", "vgg16", "vgg19",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "squeezenet1_0", "squeezenet1_1",
    "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2",
]  # fmt: skip
# For this process's workers and the scripts: PyTorch has one thread, since there are more workers
# than cores, and torchrun's default, so that it rounds the same everywhere; and glibc keeps the
# memory of large networks, which the kernel would clear again and again.
os.environ["OMP_NUM_THREADS"] = "1"
# which a process reads once, before its first video; the same as the scripts'
os.environ |= {"OPENCV_FFMPEG_LOGLEVEL": "-8", "OPENCV_VIDEOIO_PRIORITY_CV_MJPEG": "0"}
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


def slow(*values):
    """Values of a parametrization that run with --slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def env(tmp_path):
    """No display, no network (a proxy that refuses), an empty cache of weights."""
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    env["TORCH_HOME"] = str(tmp_path / "torch_home")
    for scheme in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        env[scheme] = "http://127.0.0.1:9"
    return env


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """What a test writes to models/ stays there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def engines_apart():
    """For the tests of what only processes of OpenCV's engines show: see below."""


@pytest.fixture(autouse=True)
def engines_here(request, monkeypatch):
    """Elsewhere a conversion runs OpenCV's engines in this process, one as fast as the other."""
    if "engines_apart" not in request.fixturenames:
        for module in ("verify", "locate"):
            monkeypatch.setattr(f"{module}.run_engine_apart", run_engine_here)


def run_engine_here(path, engine, blobs, timeout=None):
    """verify.run_engine_apart without a process."""
    from classification import ENGINES
    from common import NetworksDisagree
    from verify import get_reason, run_opencv

    try:
        net = cv2.dnn.readNetFromONNX(str(path), ENGINES[engine])
    except cv2.error as error:
        raise NetworksDisagree(f"can't read the file: {get_reason(error)}") from None
    return [run_opencv(net, blob) for blob in blobs], 1.0


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """The folder that the workers share."""
    base = tmp_path_factory.getbasetemp()  # of a worker, in that of all; or of a run without any
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture
def undrawn(monkeypatch):
    """No chart and no sheet of the evaluations: they take longer than small networks."""
    monkeypatch.setattr("results.draw", lambda *_: None)


@pytest.fixture
def folder(tmp_path):
    """The folder in which the scripts run."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def execute(folder, env):
    """execute(program, options ...): the finished process, its output as text."""

    def execute(*command, cwd=folder, **changed_env):
        options = {"capture_output": True, "text": True, "timeout": 600}
        return subprocess.run([*map(str, command)], cwd=cwd, env=env | changed_env, **options)

    return execute


@pytest.fixture
def start(execute):
    """start("script.py", options ...): the same of one of the scripts."""
    return lambda script, *args, **env: execute(sys.executable, ROOT / script, *args, **env)


@pytest.fixture
def run(folder, env, monkeypatch, capfd):
    """The same in this process, which has imported torch already: exit code and output."""
    import classification

    # the scripts' own folder may hold the models.yml of a user who has tried them
    monkeypatch.setattr(classification, "__file__", str(folder / "classification.py"))
    for name in os.environ.keys() - env.keys():
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    urllib.request.install_opener(None)  # which remembers the proxies of its first use
    monkeypatch.chdir(folder)
    log_level = cv2.utils.logging.getLogLevel()

    def run(script, *args):
        module = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, args)])
        modules, path = dict(sys.modules), list(sys.path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            classification.run(module.main)
        out, err = capfd.readouterr()
        sys.modules.update(modules)  # classification too, whose __file__ is changed above
        for name in set(sys.modules) - set(modules):  # the user's own, which a test changes
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        sys.path[:] = path
        return SimpleNamespace(returncode=exit_.value.code or 0, stdout=out, stderr=err)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield run
    urllib.request.install_opener(None)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    cv2.utils.logging.setLogLevel(log_level)


@pytest.fixture(scope="session")
def small():
    """A seeded network of three layers and 1000 classes, for tests of everything around it."""
    import torch
    from torch import nn

    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 1000)]
    return nn.Sequential(*layers, *head).eval()


@pytest.fixture(scope="session")
def model(small, tmp_path_factory):
    """Its ONNX file, exported without the project's code."""
    import torch

    path = tmp_path_factory.mktemp("model") / "small.onnx"
    options = {"input_names": ["input"], "output_names": ["output"]}
    options["dynamic_axes"] = {"input": {0: "batch"}, "output": {0: "batch"}}
    torch.onnx.export(small, torch.zeros(1, 3, 224, 224), str(path), dynamo=False, **options)
    return path


@pytest.fixture(scope="session")
def squeezenet():
    """A random squeezenet1_1 to be treated as if it were trained: seed 1."""
    import torch
    from torchvision import models

    torch.manual_seed(1)
    return models.squeezenet1_1().eval()


@pytest.fixture(scope="session")
def weights(squeezenet, tmp_path_factory):
    """Its state dict in a file."""
    import torch

    path = tmp_path_factory.mktemp("weights") / "trained.pth"
    torch.save(squeezenet.state_dict(), path)
    return path


@pytest.fixture
def put_weights(env, monkeypatch):
    """put_weights(path): make a file torchvision's default weights of squeezenet1_1, downloaded.

    They are the only ones in its cache, under a name that ends in their hash, as its own do.
    """
    from torchvision import models

    def put(path):
        cache = Path(env["TORCH_HOME"]) / "hub" / "checkpoints"
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True)
        content = Path(path).read_bytes()
        cached = cache / f"squeezenet1_1-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        cached.write_bytes(content)
        entry = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.value
        monkeypatch.setattr(entry, "url", f"https://example.com/{cached.name}")
        return cached

    return put


@pytest.fixture(scope="session")
def converted(weights, tmp_path_factory):
    """The folder models/ that `--weights trained.pth` leaves."""
    import py_to_py_cls

    folder = tmp_path_factory.mktemp("converted")
    options = ["--model_name", "squeezenet1_1", "--weights", str(weights), "--evaluate", "False"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["py_to_py_cls.py", *options])
        assert py_to_py_cls.main() == 0
    return folder / "models"


@pytest.fixture
def trained(folder, weights, converted):
    """The options for this network, whose converted file is in the folder's models/."""
    shutil.copytree(converted, folder / "models")
    return ["--model_name", "squeezenet1_1", "--weights", str(weights)]


@pytest.fixture(scope="session")
def get_logits():
    """get_logits(network, path): PyTorch's answer behind torchvision's own transforms."""
    from PIL import Image
    from torchvision import transforms

    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), normalize]
    transform = transforms.Compose(steps)
    return lambda network, path: run_torch(network, transform(Image.open(path))[None].numpy())[0]


def run_picture(network, picture):
    """PyTorch's logits for a prepared picture (height, width, 3), without the project's code."""
    return run_torch(network, np.float32(picture).transpose(2, 0, 1)[None].copy())[0]


def run_torch(network, blob):
    """PyTorch's logits (batch, classes), without the project's code."""
    import torch

    with torch.no_grad():
        return network(torch.from_numpy(blob)).numpy()


def read_onnx(path, *engine):
    """The same of OpenCV with a file, as a function of the blob."""
    net = cv2.dnn.readNetFromONNX(str(path), *engine)

    def forward(blob):
        net.setInput(blob)
        return net.forward()

    return forward


def read_answer(result, block=""):
    """(class ID, confidence) that follow the line `block` in a script's output."""
    text = get_output(result)
    pattern = r"^\* class ID: (\d+),.*\n\* confidence: (.*)$"
    found = re.search(pattern, text[text.index(block) :], re.M)
    return int(found[1]), float(found[2])


def near(logits, **tolerance):
    """The answer that read_answer has to find for PyTorch's logits."""
    return logits.argmax(), pytest.approx(logits.max(), **tolerance or {"abs": 1e-4})


def find_result(folder, end, name=""):
    """The path of the newest file of that name of an evaluation's results."""
    found = folder.glob(f"logs/{name}*_*/{end}")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def get_output(result):
    """What a process has printed that ended with exit code 0."""
    assert result.returncode == 0, result.stderr
    return result.stdout


def check_one_line(result, *words, code=2):
    """The process ended with `code` and one line on stderr that has all the `words`."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0]
