"""The user's own weights, and the user's own architecture."""

import re

import cv2
import numpy as np
import pytest
import torch
from conftest import PICTURES, check_one_line, read_answer
from torchvision import models

from classification import RequestError
from common import build_network, load_network, load_weights
from verify import NetworksDisagree, get_references, verify

KOALA = PICTURES / "koala.jpg"


@pytest.fixture(scope="module")
def seven():
    """A network of seven classes to be treated as if it were trained."""
    torch.manual_seed(4)
    return models.squeezenet1_1(num_classes=7).eval()


def classify(model, picture, mean, std, size=224, resize=256):
    """PyTorch's logits, without the project's code."""
    rgb = cv2.imread(str(picture))[:, :, ::-1].astype(np.float32)
    rgb = cv2.resize(cv2.resize(rgb, (resize, resize)), (size, size))
    blob = ((rgb - mean) / 255 / std).astype(np.float32)
    with torch.no_grad():
        return model(torch.from_numpy(blob).permute(2, 0, 1)[None])[0].numpy()


def test_own_weights_and_labels(run, folder, seven):
    """Another number of classes, as DataParallel saves it, from the command line to the answer."""
    state = {f"module.{key}": value for key, value in seven.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 90}, folder / "my.pth")
    (folder / "my_labels.txt").write_text("a\nb\nc\nd\ne\nf\ng\n")
    options = ["--model_name", "squeezenet1_1", "--weights", "my.pth", "--test", "True"]
    options += ["--input_img", KOALA]
    result = run("py_to_py_cls.py", *options, "--classes", "my_labels.txt")
    assert result.returncode == 0, result.stderr
    logits = classify(seven, KOALA, [123.675, 116.28, 103.53], [0.229, 0.224, 0.225])
    assert read_answer(result.stdout) == (logits.argmax(), pytest.approx(logits.max(), abs=1e-4))
    assert f"label: {'abcdefg'[logits.argmax()]}" in result.stdout

    # by its name, with nothing but cv2; the class names come along
    again = run("classification.py", "squeezenet1_1", "--input", KOALA)
    assert read_answer(again.stdout) == read_answer(result.stdout)
    assert f"label: {'abcdefg'[logits.argmax()]}" in again.stdout

    # labels that don't fit are told before the network is converted
    (folder / "six.txt").write_text("a\nb\nc\nd\ne\nf\n")
    result = run("py_to_py_cls.py", *options, "--classes", "six.txt")
    check_one_line(result, "six.txt", "6 lines", "7 outputs")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
def test_wrapped_checkpoints(tmp_path, seven, prefix, key):
    state = {prefix + name: value for name, value in seven.state_dict().items()}
    torch.save(state if key is None else {"epoch": 3, key: state}, tmp_path / "my.pth")
    model = load_weights("squeezenet1_1", tmp_path / "my.pth")
    batch = torch.randn(2, 3, 96, 96, generator=torch.manual_seed(5))
    with torch.no_grad():
        assert torch.equal(model(batch), seven(batch))


def test_another_architecture_names_the_keys(tmp_path, seven):
    torch.save(seven.state_dict(), tmp_path / "my.pth")
    with pytest.raises(RequestError) as caught:
        load_weights("mobilenet_v3_small", tmp_path / "my.pth")
    assert "missing key features.0.0.weight (and " in str(caught.value)
    assert "unexpected key features.0.weight (and " in str(caught.value)


@pytest.mark.parametrize("kind", ["as PyTorch saves it", "as torchvision 0.2 saved it"])
@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "vit_b_32", "swin_t", "densenet121", "mnasnet0_5", "regnet_y_400mf"]
)
def test_the_head_is_sized_from_the_file(tmp_path, name, kind):
    """Of each architecture that torchvision builds or loads in a way of its own."""
    saved = models.get_model(name, num_classes=13).state_dict()
    state = type(saved)((k, torch.rand(v.shape).to(v.dtype)) for k, v in saved.items())
    if kind == "as PyTorch saves it":
        state._metadata = saved._metadata
    else:  # without versions and counts of batches, and DenseNet's layers called norm.1
        layer = re.compile(r"(denselayer\d+\.(?:norm|conv))([12]\.)")
        state = {layer.sub(r"\1.\2", k): v for k, v in state.items() if "num_batches" not in k}
    torch.save(state, tmp_path / "my.pth")
    loaded = load_weights(name, tmp_path / "my.pth").state_dict()
    assert 13 in {len(value) for value in loaded.values() if value.ndim}
    if kind != "as PyTorch saves it":
        loaded = {key: value for key, value in loaded.items() if "num_batches" not in key}
    assert all(map(torch.equal, state.values(), loaded.values()))
    assert len(state) == len(loaded)


def test_inception_that_was_trained_from_torchvisions(tmp_path, capsys):
    """Auxiliary heads in the file are left out; the input is transformed, and that is said."""
    with torch.device("meta"):
        state = models.inception_v3(num_classes=5, init_weights=False).state_dict()
    assert any(key.startswith("AuxLogits.") for key in state)
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items()}
    torch.save(state, tmp_path / "my.pth")
    model, _ = load_network("inception_v3", str(tmp_path / "my.pth"))
    assert model.transform_input and model.AuxLogits is None and model.fc.out_features == 5
    assert "transform_input=True" in capsys.readouterr().err


MY_MODULE = '''
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 16, 3, 2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))

def broken():
    return 1 / 0

def number():
    return 5

class Two(Net):
    def forward(self, x):
        return super().forward(x), x

class Module(nn.Module):
    """Its keys begin as those of DataParallel do."""
    def __init__(self):
        super().__init__()
        self.module = Net()
    def forward(self, x):
        return self.module(x)

class InPlace(Net):
    def forward(self, x):
        for channel in x.unbind(1):
            channel.clamp_(-0.3, 0.3)
        return super().forward(x)

class Double(Net):
    def forward(self, x):
        return super().forward(x).double()

def stop():
    raise SystemExit(0)

class Blind(Net):
    """Never looks at the picture."""
    def forward(self, x):
        return super().forward(x * 0)
'''


def test_own_architecture(run, folder):
    """A class in a file beside the user, with a frame size and preprocessing of its own."""
    (folder / "my_module.py").write_text(MY_MODULE)
    options = ["--model_name", "my_module:Net", "--frame_size", "56", "--mean", "10", "20", "30"]
    options += ["--std", "0.5", "0.5", "0.5", "--test", "True", "--input_img", KOALA]
    result = run("py_to_py_cls.py", *options)
    assert result.returncode == 0, result.stderr
    namespace = {}
    exec(MY_MODULE, namespace)
    logits = classify(namespace["Net"](), KOALA, [10, 20, 30], [0.5, 0.5, 0.5], 56, 64)
    answer = (logits.argmax(), pytest.approx(logits.max(), abs=1e-4))
    assert read_answer(result.stdout) == answer
    assert f"label: Class #{logits.argmax()}" in result.stdout
    again = run("classification.py", "my_module-Net", "--input", KOALA)
    assert read_answer(again.stdout) == answer

    # other code with the same weights is another network
    (folder / "my_module.py").write_text(MY_MODULE.replace(".mean((2, 3))", ".amax((2, 3))"))
    result = run("py_to_py_cls.py", *options)
    assert "converted and verified before" not in result.stdout
    assert read_answer(result.stdout) != answer


@pytest.mark.parametrize(
    "name, words",
    [
        ("my_module:broken", "ZeroDivisionError: division by zero .*my_module.py, line 16"),
        ("my_module:number", "returns int, not a torch.nn.Module"),
        ("my_module:stop", "SystemExit"),
        ("my_module:absent", "my_module.py has no absent"),
        ("no_module:Net", "No module named 'no_module'"),
        (":Net", "module"),
    ],
)
def test_own_architecture_that_cannot_be_built(tmp_path, monkeypatch, name, words):
    (tmp_path / "my_module.py").write_text(MY_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RequestError, match=words) as caught:
        build_network(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, words",
    [("Two", "no float32 tensor"), ("Double", "no float32 tensor"), ("Blind", "prove nothing")],
)
def test_own_architecture_that_proves_nothing(name, words):
    namespace = {}
    exec(MY_MODULE, namespace)
    with pytest.raises(RequestError, match=words):
        get_references(namespace[name]().eval(), np.ones((1, 3, 56, 56), np.float32))


def test_a_network_that_changes_its_input_gets_a_copy():
    """Or PyTorch's answer to one picture would be held against OpenCV's to another."""
    namespace = {}
    exec(MY_MODULE, namespace)
    blob = np.random.default_rng(1).standard_normal((1, 3, 56, 56)).astype(np.float32)
    before = blob.copy()
    for _, reference, _ in get_references(namespace["InPlace"]().eval(), blob):
        assert np.abs(reference).max() > 0.3
    assert np.array_equal(blob, before)


def test_a_prefix_that_is_the_networks_own(tmp_path, monkeypatch):
    (tmp_path / "prefixed.py").write_text(MY_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    saved = build_network("prefixed:Module").state_dict()
    torch.save(saved, "my.pth")
    loaded = load_weights("prefixed:Module", "my.pth").state_dict()
    assert list(loaded) == list(saved) and all("module." in key for key in saved)


def test_a_function_of_an_installed_package():
    model, origin = load_network("torchvision.models.mnasnet:mnasnet0_5")
    assert type(model).__name__ == "MNASNet" and not model.training
    assert origin == "torchvision.models.mnasnet:mnasnet0_5"


def test_an_engine_that_is_wrong_is_named_with_the_figures(model, resnet18):
    """Both engines, each with its relative error; nothing is taken for right."""
    blob = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    references = get_references(resnet18, blob)
    name, blob, logits = references[1]
    logits = logits * np.float32(1.001)
    with pytest.raises(NetworksDisagree) as caught:
        verify(str(model), [references[0], (name, blob, logits)])
    for words in ("new engine: on a batch of 2", "classic engine", "relative error 1.0e-03"):
        assert words in str(caught.value)
