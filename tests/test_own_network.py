"""The user's own weights, and the user's own architecture."""

import argparse
import json
import pathlib
import re
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import PICTURES, check_one_line, read_answer
from torchvision import models

from common import NetworksDisagree, Preprocessing, RequestError
from conversion import get_onnx_path
from networks import (
    Weights,
    build_network,
    get_preprocessing,
    load_network,
    load_weights,
    parse_weights,
    run_pytorch,
    scale_frame,
)
from verify import get_references, verify

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

    # labels that don't fit are reported before the network is converted
    (folder / "six.txt").write_text("a\nb\nc\nd\ne\nf\n")
    result = run("py_to_py_cls.py", *options, "--classes", "six.txt")
    check_one_line(result, "six.txt", "6 lines", "7 outputs")
    assert not (folder / "models").exists()

    result = run("py_to_py_cls.py", *options, "--classes", "my_labels.txt")
    assert result.returncode == 0, result.stderr
    logits = classify(seven, KOALA, [123.675, 116.28, 103.53], [0.229, 0.224, 0.225])
    assert read_answer(result.stdout) == (logits.argmax(), pytest.approx(logits.max(), abs=1e-4))
    assert f"label: {'abcdefg'[logits.argmax()]}" in result.stdout

    # by its name, with nothing but cv2; the class names come along
    again = run("classification.py", "squeezenet1_1", "--input", KOALA)
    assert read_answer(again.stdout) == read_answer(result.stdout)
    assert f"label: {'abcdefg'[logits.argmax()]}" in again.stdout


def check_loaded(path, seven):
    """The file gives squeezenet1_1 the answers of `seven`."""
    model = load_weights("squeezenet1_1", path)
    batch = torch.randn(2, 3, 96, 96, generator=torch.manual_seed(5))
    with torch.no_grad():
        assert torch.equal(model(batch), seven(batch))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "net."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict", "net"])
def test_wrapped_checkpoints(tmp_path, seven, prefix, key):
    state = {prefix + name: value for name, value in seven.state_dict().items()}
    torch.save(state if key is None else {"epoch": 3, key: state}, tmp_path / "my.pth")
    check_loaded(tmp_path / "my.pth", seven)


def averaged(model):
    """The state dict of the average that an EMA keeps: another model, so another answer."""
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter += 0.1
    return average.state_dict()


def prefixed(model, prefix):
    return {prefix + name: value for name, value in model.state_dict().items()}


def reference_script(model):
    """What torchvision's references/classification/train.py saves, with --model-ema."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without a gradient the weights stay, and the optimizer has a state
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    args = argparse.Namespace(lr=0.1, output_dir=".", data_path=pathlib.Path("/data"), amp=None)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 3,
        "args": args,
        "model_ema": averaged(model),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
    }


def lightning(model, prefix):
    """What a LightningModule with the network as an attribute saves."""
    return {
        "epoch": 3,
        "global_step": np.int64(1200),
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed(model, prefix),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9), "dirpath": "."}},
        "optimizer_states": [],
        "hyper_parameters": {"lr": 0.1},
    }


CHECKPOINTS = {
    "torchvision's reference script": reference_script,
    "Lightning, model": lambda m: lightning(m, "model."),
    "Lightning, net": lambda m: lightning(m, "net."),
    "Lightning, compiled": lambda m: lightning(m, "model._orig_mod."),
    "EMA": lambda m: {"epoch": 3, "model_ema": m.state_dict()},
    "EMA of AveragedModel": lambda m: {
        "model_ema": torch.optim.swa_utils.AveragedModel(m).state_dict()
    },
    "AveragedModel": lambda m: torch.optim.swa_utils.AveragedModel(m).state_dict(),
    "net and accuracy": lambda m: {"net": prefixed(m, "module."), "acc": 93.1, "epoch": 5},
    "NumPy scalars": lambda m: {
        "acc": np.float64(93.1), "loss": np.float32(0.5), "epoch": np.int64(5),
        "best": np.bool_(True), "state_dict": m.state_dict(),
    },
    "paths": lambda m: {
        "from": pathlib.Path("runs/1"), "at": pathlib.PureWindowsPath("C:/x"), "net": m.state_dict()
    },
    "options": lambda m: {
        "opt": argparse.Namespace(out=pathlib.Path("x"), inner=argparse.Namespace(b=np.float64(1))),
        "net": m.state_dict(),
    },
    "another network first": lambda m: {
        "teacher": torch.nn.Linear(2, 2).state_dict(), "student": m.state_dict()
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_training_scripts(tmp_path, seven, kind):
    """Each has the weights somewhere among other things."""
    path = tmp_path / "my.pth"
    torch.save(CHECKPOINTS[kind](seven), path)
    check_loaded(path, seven)
    torch.save(CHECKPOINTS[kind](seven), path, _use_new_zipfile_serialization=False)
    check_loaded(path, seven)


def test_which_of_two_weights_is_taken_is_said(tmp_path, seven, capsys):
    path = tmp_path / "my.pth"
    torch.save(reference_script(seven), path)
    load_weights("squeezenet1_1", path)
    assert f"{path}: weights in 'model' and 'model_ema': taking 'model'" in capsys.readouterr().out
    torch.save({"state_dict": seven.state_dict()}, path)
    load_weights("squeezenet1_1", path)
    assert capsys.readouterr().out == ""


def test_weights_key_chooses(tmp_path, seven, capsys):
    path = tmp_path / "my.pth"
    checkpoint = reference_script(seven)
    torch.save(checkpoint, path)
    model = load_weights("squeezenet1_1", path, weights_key="model_ema")
    expected = checkpoint["model_ema"]["module.classifier.1.bias"]
    assert torch.equal(model.classifier[1].bias, expected)
    assert not torch.equal(expected, seven.classifier[1].bias)
    assert capsys.readouterr().out == ""
    with pytest.raises(RequestError, match="no state dict 'ema' in it, only model, optimizer"):
        load_weights("squeezenet1_1", path, weights_key="ema")
    both = [parse_weights("squeezenet1_1", str(path), key) for key in (None, "model_ema")]
    names = [get_onnx_path("squeezenet1_1", weights, "models").name for weights in both]
    assert names == ["squeezenet1_1-my.onnx", "squeezenet1_1-my-model_ema.onnx"]
    with pytest.raises(RequestError, match="--weights_key needs --weights FILE"):
        parse_weights("squeezenet1_1", None, "model_ema")


def test_safetensors(monkeypatch, tmp_path, seven):
    """The file written here by its specification: length, JSON, tensors."""
    header, data = {}, b""
    for key, value in seven.state_dict().items():
        content = value.contiguous().numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path = tmp_path / "my.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    check_loaded(path, seven)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="pip install safetensors"):
        load_weights("squeezenet1_1", path)


def test_another_architecture_names_the_keys(tmp_path, seven):
    torch.save(seven.state_dict(), tmp_path / "my.pth")
    with pytest.raises(RequestError) as caught:
        load_weights("mobilenet_v3_small", tmp_path / "my.pth")
    assert "missing key features.0.0.weight (and " in str(caught.value)
    assert "unexpected key features.0.weight (and " in str(caught.value)


@pytest.mark.parametrize("kind", ["as PyTorch saves it", "as torchvision 0.2 saved it"])
@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v2",
        pytest.param("vit_b_32", marks=pytest.mark.slow),
        "swin_t",
        "densenet121",
        "mnasnet0_5",
        "regnet_y_400mf",
    ],
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
    weights = parse_weights("inception_v3", str(tmp_path / "my.pth"))
    model = load_network("inception_v3", weights).model
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

class Leaving(Net):
    def forward(self, x):
        raise SystemExit(0)

class LeavingLater(Net):
    """Ends the process when it is exported."""
    def forward(self, x):
        if torch.onnx.is_in_onnx_export():
            raise SystemExit(0)
        return super().forward(x)

class Timm(Net):
    pretrained_cfg = {
        "input_size": (3, 48, 56), "mean": (0.5, 0.25, 0.75), "std": (0.5, 0.2, 0.1),
        "crop_pct": 0.875, "interpolation": "bicubic",
    }

class OlderTimm(Net):
    default_cfg = {"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0)}

class HalfTimm(Net):
    pretrained_cfg = {"input_size": (3, 64, 64)}

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
    assert result.stderr == ""
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


def test_evaluation_of_pictures_that_are_not_square(run, folder):
    """A network that carries timm's pretrained_cfg, for pictures 48 px wide and 32 px high."""
    config = {"input_size": (3, 32, 48), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.8}
    build = f"""
def build():
    model = Net()
    model.pretrained_cfg = {config}
    return model
"""
    (folder / "my_module.py").write_text(MY_MODULE + build)
    labels = folder / "labels.txt"
    labels.write_text("".join(f"{picture.name} 0\n" for picture in sorted(PICTURES.glob("*.jpg"))))
    options = ["--img_root_dir", PICTURES, "--img_cls_file", labels]
    result = run("py_to_py_cls.py", "--model_name", "my_module:build", *options)
    assert result.returncode == 0, result.stderr
    assert re.search(r"same class (\d+) of \1\n", result.stdout)


@pytest.mark.parametrize("name", ["Leaving", "LeavingLater"])
def test_own_architecture_that_ends_the_process(run, folder, name):
    """A SystemExit of the network's code is an error, not the script's success."""
    (folder / "my_module.py").write_text(MY_MODULE)
    options = ["--model_name", f"my_module:{name}", "--frame_size", "56", "--evaluate", "False"]
    result = run("py_to_py_cls.py", *options)
    assert result.returncode == 2
    note, error = result.stderr.splitlines()
    assert note.startswith(f"NOTE: my_module:{name} declares no preprocessing")
    assert error.startswith("py_to_py_cls.py: error: ") and "SystemExit" in error
    if name == "Leaving":
        line = MY_MODULE[: MY_MODULE.index("raise SystemExit(0)\n\nclass LeavingLater")].count("\n")
        assert f"my_module.py, line {line + 1}" in error
    assert not [p for p in folder.rglob("*") if ".onnx" in p.name]


def test_preprocessing_that_a_network_carries(tmp_path, monkeypatch, capsys):
    """timm's pretrained_cfg: sizes, mean and std for pixels from 0 to 1, the part that is kept."""
    (tmp_path / "carrying.py").write_text(MY_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def get(name):
        network = load_network(f"carrying:{name}", Weights("own", f"carrying:{name}"))
        out, err = capsys.readouterr()
        assert err == "" and ("bicubic" in out) == (name == "Timm")
        return network.preprocessing, network.assumed

    found, assumed = get("Timm")
    assert found == Preprocessing(
        scale=1 / 255, mean=(127.5, 63.75, 191.25), std=(0.5, 0.2, 0.1), rgb=True, crop=True,
        width=56, height=48, initial_width=64, initial_height=54,
    )  # fmt: skip
    assert not assumed
    found, assumed = get("OlderTimm")
    assert found == Preprocessing(
        scale=1 / 255, mean=(127.5, 127.5, 127.5), std=(1, 1, 1), rgb=True, crop=True,
        width=64, height=64, initial_width=64, initial_height=64,
    )  # fmt: skip
    assert not assumed
    for name in ("HalfTimm", "Net"):
        found, assumed = get(name)
        assert found == Preprocessing(
            scale=1 / 255, mean=(123.675, 116.28, 103.53), std=(0.229, 0.224, 0.225), rgb=True,
            crop=True, width=224, height=224, initial_width=256, initial_height=256,
        )  # fmt: skip
        assert assumed


def test_preprocessing_of_torchvisions_networks():
    """Its sizes, whatever the weights are; --frame_size scales the resize along."""
    for weights in (Weights("random", "random"), Weights("file", "my.pth")):
        found = get_preprocessing("inception_v3", weights)
        sizes = (found.width, found.height, found.initial_width, found.initial_height)
        assert sizes == (299, 299, 342, 342)
    sizes = {"IMAGENET1K_V1": 256, "IMAGENET1K_V2": 232}
    for name, resize in sizes.items():
        found = get_preprocessing("resnet50", Weights("torchvision", name))
        assert (found.width, found.initial_width) == (224, resize)
        assert found.mean == (123.675, 116.28, 103.53) and found.std == (0.229, 0.224, 0.225)
    larger = scale_frame(get_preprocessing("resnet50", Weights("random", "random")), 448)
    assert (larger.width, larger.height, larger.initial_width, larger.initial_height) == (
        448, 448, 512, 512
    )  # fmt: skip


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
    [
        ("Two", "not a classifier: forward returns"),
        ("Double", "not a classifier: forward returns a float64 tensor of shape"),
        ("Blind", "prove nothing"),
    ],
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
    name = "torchvision.models.mnasnet:mnasnet0_5"
    network = load_network(name, parse_weights(name, None))
    assert type(network.model).__name__ == "MNASNet" and not network.model.training
    assert (network.name, network.weights) == (name, Weights("own", name))


def test_an_engine_that_is_wrong_is_named_with_the_figures(model, small):
    """Both engines, each with its relative error; nothing is taken for right."""
    blob = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    references = get_references(small, blob)
    *right, (name, blob, logits) = references
    logits = logits * np.float32(1.001)
    with pytest.raises(NetworksDisagree) as caught:
        verify(str(model), [*right, (name, blob, logits)])
    assert str(caught.value).count("relative error 1.0e-03") == 2
    for engine in ("new", "classic"):
        assert f"{engine} engine: wrong on {name}: " in str(caught.value)


@pytest.mark.parametrize(
    "output, words",
    [
        ((torch.zeros(1, 7), torch.zeros(1, 3)), "tuple with 0 (1, 7), 1 (1, 3)"),
        ({"out": torch.zeros(1, 7), "n": 3}, "dict with out (1, 7)"),
        (
            SimpleNamespace(logits=torch.zeros(1, 7), loss=None),
            "SimpleNamespace with logits (1, 7)",
        ),
        (torch.zeros(1, 7, 4, 4), "a float32 tensor of shape (1, 7, 4, 4)"),
        (None, "NoneType"),
    ],
)
def test_output_that_is_not_logits_is_described(output, words):
    class Other(torch.nn.Module):
        def forward(self, x):
            return output

    with pytest.raises(RequestError, match="wraps it in a module") as caught:
        run_pytorch(Other(), np.zeros((1, 3, 8, 8), np.float32))
    assert f"forward returns {words}, not a float32 tensor" in str(caught.value)
