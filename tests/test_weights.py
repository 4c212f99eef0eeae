"""Where weights come from: torchvision's, a training script's checkpoint, none, and bad files."""

import argparse
import hashlib
import io
import pathlib
import pickle
import re
import socket
import socketserver
import threading
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import slow
from torchvision import models

import networks
from classification import RequestError
from entries import get_onnx_path
from networks import Request, load_network


@pytest.fixture(scope="module")
def seven():
    """A network of seven classes to be treated as if it were trained."""
    torch.manual_seed(4)
    return models.squeezenet1_1(num_classes=7).eval()


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """What torchvision's transforms do is measured in other tests; this is how to do it."""
    set_preprocessing = networks.set_preprocessing
    monkeypatch.setattr(networks, "set_preprocessing", lambda *_: None)
    return lambda: monkeypatch.setattr(networks, "set_preprocessing", set_preprocessing)


# --- torchvision's weights ------------------------------------------------------------------------


@pytest.fixture
def serve(weights, env, monkeypatch):
    """serve(page): torchvision's weights of squeezenet1_1 come from the loopback address.

    The page says how. Returns the file of the cache, which is empty.
    """
    content, release = weights.read_bytes(), threading.Event()
    name = f"squeezenet1_1-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    found = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content)
    pages = dict.fromkeys(("whole", "another"), found + content)
    pages |= dict.fromkeys(("broken", "stalled"), found + content[:1_000_000])
    pages |= {
        "silent": b"",
        "garbage": b"no HTTP\r\n\r\n",
        "absent": b"HTTP/1.0 404 Not Found\r\n\r\n",
    }

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            page = self.rfile.readline().decode().split("/")[1]
            while self.rfile.readline().strip():
                pass
            self.wfile.write(pages[page])
            if page in ("silent", "stalled"):
                release.wait(60)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def serve(page):
        port = 9 if page == "refused" else server.server_address[1]
        file = "squeezenet1_1-00000000.pth" if page == "another" else name
        entry = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.value
        monkeypatch.setattr(entry, "url", f"http://127.0.0.1:{port}/{page}/{file}")
        monkeypatch.setenv("TORCH_HOME", env["TORCH_HOME"])
        return pathlib.Path(env["TORCH_HOME"], "hub", "checkpoints", file)

    yield serve
    release.set()
    server.shutdown()
    server.server_close()


def test_download(serve, squeezenet, capsys):
    path = serve("whole")
    network = load_network(Request("squeezenet1_1"), or_random=False)
    assert network.weights == "IMAGENET1K_V1" and network.published["acc@1"] == 58.178
    assert torch.equal(network.model.classifier[1].weight, squeezenet.classifier[1].weight)
    assert list(path.parent.iterdir()) == [path]
    assert capsys.readouterr().err == "" and socket.getdefaulttimeout() is None


@pytest.mark.parametrize(
    "page, words, timeout",
    [
        ("broken", "invalid hash value", 30),
        ("another", "invalid hash value", 30),
        ("silent", "timed out", 0.5),
        ("stalled", "timed out", 0.5),
        ("absent", "Not Found", 30),
        ("garbage", "no HTTP", 30),
        ("refused", "refused", 30),
    ],
)
def test_download_that_fails(serve, monkeypatch, capsys, page, words, timeout):
    """Random weights and a warning, or an error; no file, and no changed time limit."""
    assert 10 <= networks.DOWNLOAD_TIMEOUT <= 60
    monkeypatch.setattr(networks, "DOWNLOAD_TIMEOUT", timeout)
    path = serve(page)
    with pytest.raises(RequestError, match=f"{path.name}: .*{words}.*--weights") as caught:
        load_network(Request("squeezenet1_1"), or_random=False)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""
    network = load_network(Request("squeezenet1_1"))
    assert (network.weights, network.published) == ("random", {}) and network.request.is_random
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^WARNING: .*{path.name}: .*{words}.* RANDOM WEIGHTS", line)
    assert [file for file in path.parents[2].rglob("*") if file.is_file()] == []
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("text", ["", "imagenet1k_v1", "DEFAULT"])
def test_cached_weights_are_taken(monkeypatch, env, put_weights, weights, squeezenet, text):
    """Without a download, but not a file that torchvision's name doesn't fit."""
    monkeypatch.setenv("TORCH_HOME", env["TORCH_HOME"])
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    cached = put_weights(weights)
    network = load_network(Request("squeezenet1_1", text))
    assert network.weights == "IMAGENET1K_V1"
    assert torch.equal(network.model.classifier[1].weight, squeezenet.classifier[1].weight)
    torch.save(squeezenet.state_dict() | {"classifier.1.bias": torch.ones(1000)}, cached)
    with pytest.raises(RequestError, match=f"{cached}: not the file .* delete it"):
        load_network(Request("squeezenet1_1", text))


@pytest.mark.parametrize("text, version, resize", [("", 1, 256), ("default", 2, 232)])
def test_weights_that_are_not_the_first(
    monkeypatch, tmp_path, small, measured, text, version, resize
):
    """torchvision's DEFAULT of resnet50 are its second, which want another resize."""
    measured()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    taken = []
    monkeypatch.setattr(
        models, "get_model", lambda *_, weights, **__: taken.append(weights) or small
    )
    network = load_network(Request("resnet50", text))
    assert [entry.name for entry in taken] == [network.weights] == [f"IMAGENET1K_V{version}"]
    assert network.published == taken[0].meta["_metrics"]["ImageNet-1K"]
    assert network.preprocessing.resize == (resize,)


def test_random_networks_are_the_same_every_time():
    """Whatever the generator's state; with BatchNorm that is calibrated."""
    first = load_network(Request("shufflenet_v2_x0_5", "random"))
    torch.manual_seed(7)
    second = load_network(Request("shufflenet_v2_x0_5", "RANDOM"))
    assert first.weights == second.weights == "random"
    states = [network.model.state_dict() for network in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not (states[0]["conv1.1.running_var"] == 1).any()


@pytest.mark.parametrize(
    "name, words",
    [("squeezenet1_1", "no such file.*IMAGENET1K_V1.*random"), ("my_module:Net", "no such file")],
)
def test_weights_that_are_missing(name, words):
    """They are named as they were typed."""
    with pytest.raises(RequestError, match=f"--weights ck/NoSuch.pth: {words}"):
        load_network(Request(name, "ck/NoSuch.pth"))


# --- checkpoints ----------------------------------------------------------------------------------


def check_loaded(path, network, key=""):
    """The file gives squeezenet1_1 the answers of `network`."""
    loaded = load_network(Request("squeezenet1_1", str(path), key))
    assert loaded.weights == path.name and loaded.published == {}
    batch = torch.randn(2, 3, 96, 96, generator=torch.manual_seed(5))
    with torch.no_grad():
        assert torch.equal(loaded.model(batch), network(batch))


@pytest.mark.parametrize(
    "prefix, key",
    [("", None), ("module.", None), ("_orig_mod.", "state_dict"), ("module._orig_mod.", "model"),
     ("", "model_state_dict"), ("net.", "net")],
)  # fmt: skip
def test_wrapped_checkpoints(tmp_path, seven, prefix, key):
    state = prefixed(seven, prefix)
    torch.save(state if key is None else {"epoch": 3, key: state}, tmp_path / "my.pth")
    check_loaded(tmp_path / "my.pth", seven)


def prefixed(model, prefix):
    return {prefix + name: value for name, value in model.state_dict().items()}


def reference_script(model):
    """What torchvision's references/classification/train.py saves, with --model-ema."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without a gradient the weights stay, and the optimizer has a state
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():  # another model, so another answer
        for parameter in average.parameters():
            parameter += 0.1
    args = argparse.Namespace(lr=0.1, output_dir=".", data_path=pathlib.Path("/data"), amp=None)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 3,
        "args": args,
        "model_ema": average.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
    }


def lightning(model, prefix, **more):
    """What a LightningModule with the network as an attribute saves; more: of its other modules."""
    return {
        "epoch": 3,
        "global_step": np.int64(1200),
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed(model, prefix) | more,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9), "dirpath": "."}},
        "optimizer_states": [],
        "hyper_parameters": {"lr": 0.1},
    }


CHECKPOINTS = {
    "torchvision's reference script": reference_script,
    "Lightning": lambda m: lightning(m, "model."),
    "Lightning, compiled": lambda m: lightning(m, "model._orig_mod."),
    "EMA": lambda m: {"model_ema": torch.optim.swa_utils.AveragedModel(m).state_dict()},
    "AveragedModel": lambda m: torch.optim.swa_utils.AveragedModel(m).state_dict(),
    "NumPy scalars": lambda m: {
        "acc": np.float64(93.1), "loss": np.float32(0.5), "epoch": np.int64(5),
        "best": np.bool_(True), "net": prefixed(m, "module."),
    },
    "NumPy arrays": lambda m: {
        "model": m.state_dict(), "preds": np.zeros((5, 7)), "targets": np.zeros(0, np.int64),
        "names": np.array(["a", "b"], dtype=object), "dtype": np.float32,
        "rng": np.random.get_state(),
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
    "numbers for keys": lambda m: {"class_weights": {0: torch.ones(1)}, "model": m.state_dict()},
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_training_scripts(tmp_path, seven, kind):
    """Each has the weights somewhere among other things."""
    path = tmp_path / "my.pth"
    torch.save(CHECKPOINTS[kind](seven), path)
    check_loaded(path, seven)
    torch.save(CHECKPOINTS[kind](seven), path, _use_new_zipfile_serialization=False)
    check_loaded(path, seven)


def test_a_weighted_loss_beside_the_network(tmp_path, seven, capsys):
    """What lies outside the network's prefix is left out, by name; inside it, it is an error."""
    path = tmp_path / "my.ckpt"
    loss = {"criterion.weight": torch.ones(7)}
    torch.save(lightning(seven, "model.", **loss), path)
    check_loaded(path, seven)
    out = capsys.readouterr().out
    assert f"{path}: taking what is under 'model.', without criterion.weight\n" in out
    torch.save(lightning(seven, "model.", **loss, **{"model.extra.weight": torch.ones(7)}), path)
    with pytest.raises(RequestError, match="not the weights of squeezenet1_1.*extra.weight"):
        load_network(Request("squeezenet1_1", str(path)))


def test_which_of_two_weights_is_taken(tmp_path, seven, capfd):
    """The first, which is said; or what --weights_key names, a dictionary or a prefix of keys."""
    path = tmp_path / "my.pth"
    torch.save(reference_script(seven), path)
    check_loaded(path, seven)
    out = capfd.readouterr().out
    assert re.search(f"{path}: weights in 'model' and 'model_ema.*': taking 'model'; --weig", out)
    with pytest.raises(RequestError, match=f"{path}: no .*'ema', only model, optimizer, lr_sch"):
        load_network(Request("squeezenet1_1", str(path), "ema"))
    other = models.squeezenet1_1(num_classes=7).eval()
    halves = prefixed(other, "encoder_k.") | prefixed(seven, "encoder_q.")
    for checkpoint, key in (
        ({"state_dict": seven.state_dict()}, ""),
        ({"model": other.state_dict(), "model_ema": seven.state_dict()}, "model_ema"),
        ({"model": other.state_dict(), "model_ema": prefixed(seven, "module.")}, "model_ema"),
        (halves, "encoder_q"),
        ({"state_dict": halves, "epoch": 3}, "encoder_q"),
        ({"a": halves, "b": prefixed(other, "encoder_q.")}, "a.encoder_q"),
    ):
        torch.save(checkpoint, path)
        check_loaded(path, seven, key)
        assert "--weights_key" not in capfd.readouterr().out
    names = [get_onnx_path(Request("a", str(path), key)).name for key in ("", "model_ema")]
    assert names == ["a-my.onnx", "a-my-model_ema.onnx"]


def test_safetensors(monkeypatch, tmp_path, seven):
    path = tmp_path / "my.safetensors"
    safetensors.torch.save_file(seven.state_dict(), path)
    check_loaded(path, seven)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="pip install safetensors"):
        load_network(Request("squeezenet1_1", str(path)))


LARGE = ["swin_t", "regnet_y_400mf", "vit_b_32"]


@pytest.mark.parametrize("kind", ["as PyTorch saves it", "as torchvision 0.2 saved it"])
@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121", "mnasnet0_5", *map(slow, LARGE)])
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
    loaded = load_network(Request(name, str(tmp_path / "my.pth"))).model.state_dict()
    assert 13 in {len(value) for value in loaded.values() if value.ndim}
    if kind != "as PyTorch saves it":
        loaded = {key: value for key, value in loaded.items() if "num_batches" not in key}
    assert all(map(torch.equal, state.values(), loaded.values()))
    assert len(state) == len(loaded)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.list_models(module=models))
def test_the_head_is_the_last_parameter_of_two_dimensions(name, monkeypatch):
    for function in ("normal_", "kaiming_uniform_", "uniform_"):  # 2.6 GB of random numbers
        monkeypatch.setattr(torch.nn.init, function, lambda tensor, *_, **__: tensor)
    options = {"aux_logits": False, "init_weights": False}
    options = options if name in ("googlenet", "inception_v3") else {}
    device = "cpu" if name.startswith("regnet") else "meta"  # which RegNet's code can't take
    shapes = []
    for classes in (1000, 7):
        with torch.device(device):
            parameters = models.get_model(name, num_classes=classes, **options).named_parameters()
            shapes.append({key: value.shape for key, value in parameters if value.ndim > 1})
        del parameters  # 2.6 GB
    changed = [key for key in shapes[0] if shapes[0][key] != shapes[1][key]]
    assert changed == list(shapes[0])[-1:]


def test_inception_that_was_trained_from_torchvisions(tmp_path, capsys):
    """Auxiliary heads in the file are left out; the input is transformed, and that is said."""
    with torch.device("meta"):
        state = models.inception_v3(num_classes=5, init_weights=False).state_dict()
    assert any(key.startswith("AuxLogits.") for key in state)
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items()}
    torch.save(state, tmp_path / "my.pth")
    model = load_network(Request("inception_v3", str(tmp_path / "my.pth"))).model
    assert model.transform_input and model.AuxLogits is None and model.fc.out_features == 5
    assert "transform_input=True" in capsys.readouterr().err


def test_checkpoint_that_numpy_1_wrote(tmp_path, seven):
    """Its modules had other names."""
    state = {"model": seven.state_dict(), "acc": np.float64(93.1), "preds": np.zeros(3)}
    content = io.BytesIO(saved(state))
    with zipfile.ZipFile(content) as new, zipfile.ZipFile(tmp_path / "my.pth", "w") as old:
        for name in new.namelist():
            data = new.read(name)
            assert (b"numpy._core" in data) == name.endswith("data.pkl")
            old.writestr(name, data.replace(b"numpy._core", b"numpy.core"))
    check_loaded(tmp_path / "my.pth", seven)


def test_position_embedding_of_another_size(tmp_path, monkeypatch):
    """Of a vit_b_32 with a single small layer."""

    def build(name, image_size):
        sizes = {"num_layers": 1, "num_heads": 1, "hidden_dim": 8, "mlp_dim": 8}
        return models.VisionTransformer(image_size, patch_size=32, **sizes)

    monkeypatch.setattr(models, "get_model", build)
    torch.save(build("vit_b_32", 384).state_dict(), tmp_path / "my.pth")
    with pytest.raises(RequestError, match="size mismatch for encoder.pos_embedding.*--frame_size"):
        load_network(Request("vit_b_32", str(tmp_path / "my.pth")))


# --- bad files ------------------------------------------------------------------------------------


class Code:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return (print, ("the pickle's code ran",))


def saved(checkpoint, **options):
    file = io.BytesIO()
    torch.save(checkpoint, file, **options)
    return file.getvalue()


def torchscript():
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


def exported():
    file = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), file)
    return file.getvalue()


def quantized():
    """Its weights are hidden in a tuple."""
    linear = torch.nn.Sequential(torch.nn.Linear(2, 2))
    return torch.ao.quantization.quantize_dynamic(linear, {torch.nn.Linear}).state_dict()


LOADED = r"bad.pth: {}, .*build = lambda: torch.{}.load\('.*bad.pth'.*--model_name my_net:build"
CODE = "more than tensors.*could run code"
FINITE = "classifier.1.bias isn't a tensor of finite numbers"
OTHER = "not the weights of squeezenet1_1.*"
OWN_CODE = ".*--model_name MODULE:FUNCTION --weights FILE"
WEIGHT, BIAS, STEM = "classifier.1.weight", "classifier.1.bias", "features.0.weight"
ARGS = argparse.Namespace(lr=Code())
OLDER_FORMAT = {"_use_new_zipfile_serialization": False}
BAD_FILES = {  # {kind: (words of the message, the file's content or an object from a state dict)}
    "truncated": ("can't be read.*truncated", lambda s: saved(s)[:1_000_000]),
    "empty": ("can't be read.*truncated", lambda s: b""),
    "text": ("can't be read.*another format", lambda s: b"hello world\n"),
    "pickle": ("can't be read.*another format", lambda s: pickle.dumps({"model": 3})),
    "code": (CODE, lambda s: pickle.dumps(Code(), protocol=2)),  # as torch.save has it
    "code beside the weights": (CODE, lambda s: {"state_dict": s, "args": Code()}),
    "code in a Namespace": (CODE, lambda s: {"model": s, "args": ARGS}),
    "code in an older file": (CODE, lambda s: saved({"model": s, "args": ARGS}, **OLDER_FORMAT)),
    "code in NumPy objects": (CODE, lambda s: {"model": s, "acc": np.array([Code()])}),
    "model": ("squeezenet.SqueezeNet, could run code", lambda s: models.squeezenet1_1()),
    "TorchScript": (LOADED.format("a TorchScript archive", "jit"), lambda s: torchscript()),
    "torch.export": (LOADED.format("a torch.export program", "export"), lambda s: exported()),
    "quantized": ("its weights are quantized.*float network", lambda s: {"model": quantized()}),
    "tensor": ("no weights of this network", lambda s: torch.zeros(3)),
    "no tensors": ("no weights.*epoch, args", lambda s: {"epoch": 3, "args": argparse.Namespace()}),
    "nan": (FINITE, lambda s: s | {BIAS: torch.full((1000,), np.nan)}),
    "inf": (FINITE, lambda s: s | {BIAS: torch.full((1000,), np.inf)}),
    "no tensor among them": (OTHER + BIAS, lambda s: s | {BIAS: 3}),
    "a head that isn't a tensor": (OTHER + WEIGHT, lambda s: s | {WEIGHT: 3}),
    "other classes": (OTHER + BIAS, lambda s: s | {WEIGHT: torch.zeros(7, 512, 1, 1)}),
    "another architecture": (
        OTHER + "Missing key.*features.3.squeeze.weight" + OWN_CODE,
        lambda s: {STEM: s[STEM], "fc.weight": torch.ones(3)},
    ),
    "a changed head": (
        OTHER + WEIGHT + ".*classifier.1.0.weight" + OWN_CODE,
        lambda s: {key.replace("classifier.1.", "classifier.1.0."): s[key] for key in s},
    ),
    "a changed stem": (OTHER + STEM + OWN_CODE, lambda s: s | {STEM: torch.zeros(64, 3, 5, 5)}),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_weights_file(tmp_path, weights, capfd, kind):
    path = tmp_path / "bad.pth"
    words, build = BAD_FILES[kind]
    content = build(torch.load(weights))
    path.write_bytes(content if isinstance(content, bytes) else saved(content))
    with pytest.raises(RequestError, match=words) as caught:
        load_network(Request("squeezenet1_1", str(path)))
    assert "\n" not in str(caught.value) and "bad.pth" in str(caught.value)
    assert "code ran" not in capfd.readouterr().out
    if "code" in kind:  # that it could have run
        pickle.loads(content) if kind == "code" else torch.load(path, weights_only=False)
        assert "code ran" in capfd.readouterr().out
