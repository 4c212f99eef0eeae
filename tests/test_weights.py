"""Where weights come from, and what is said of a file that holds none."""

import argparse
import hashlib
import http.server
import pickle
import socket
import threading

import numpy as np
import pytest
import torch
from conftest import check_one_line
from torchvision import models

import networks
from common import RequestError
from networks import (
    Weights,
    checkpoints_dir,
    download,
    load_network,
    load_weights,
    parse_weights,
)

CACHED = "squeezenet1_1-b8a52dc0.pth"  # what torchvision calls its weights
CONTENT = bytes(range(256)) * 4096
NAME = f"net-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"  # as torchvision names its files


@pytest.fixture
def server():
    """A server on the loopback address; what it sends is in the page's name."""
    release = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/silent":
                release.wait(60)
                return
            if self.path == "/garbage":
                self.wfile.write(b"no HTTP\r\n\r\n")
                return
            self.send_response(404 if self.path == "/absent" else 200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            half = self.path in ("/broken", "/stalled")
            self.wfile.write(CONTENT[: len(CONTENT) // 2] if half else CONTENT)
            if self.path == "/stalled":
                release.wait(60)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    release.set()
    server.shutdown()


def test_download(server, tmp_path):
    path = tmp_path / "cache" / NAME
    download(f"{server}/whole", path)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize(
    "page, words, timeout",
    [
        ("broken", "invalid hash value", 30),
        ("silent", "timed out", 0.5),
        ("stalled", "timed out", 0.5),
        ("absent", "Not Found", 30),
        ("garbage", "no HTTP", 30),
    ],
)
def test_download_that_fails_leaves_nothing(server, tmp_path, monkeypatch, page, words, timeout):
    """Neither a file nor a changed time limit for what else the process does."""
    assert 10 <= networks.DOWNLOAD_TIMEOUT <= 60
    monkeypatch.setattr(networks, "DOWNLOAD_TIMEOUT", timeout)
    with pytest.raises(RequestError, match=words) as caught:
        download(f"{server}/{page}", tmp_path / NAME)
    assert str(caught.value).startswith(f"{NAME}: ")
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_download_of_another_file(server, tmp_path):
    with pytest.raises(RequestError, match="net-00000000.pth: invalid hash value"):
        download(f"{server}/whole", tmp_path / "net-00000000.pth")
    assert list(tmp_path.iterdir()) == []


def test_download_from_a_port_where_nobody_listens(tmp_path):
    with pytest.raises(RequestError, match=f"{NAME}: .*refused"):
        download("http://127.0.0.1:9/net.pth", tmp_path / NAME)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changed", [{}, {"TORCH_HOME": "~/a"}, {"TORCH_HOME": "/a"}, {"XDG_CACHE_HOME": "/b/c"}]
)
def test_cache_is_torchvisions(monkeypatch, changed):
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    assert str(checkpoints_dir()) == f"{torch.hub.get_dir()}/checkpoints"


@pytest.mark.parametrize("text", [None, "imagenet1k_v1", "DEFAULT"])
def test_cached_weights_are_taken(monkeypatch, env, put_weights, weights, squeezenet, text):
    """Without a download, but not a file that torchvision's name doesn't fit."""
    monkeypatch.setenv("TORCH_HOME", env["TORCH_HOME"])
    monkeypatch.setattr(networks, "download", None)
    cached = put_weights(weights)
    network = load_network("squeezenet1_1", parse_weights("squeezenet1_1", text))
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert network.weights == Weights("torchvision", "IMAGENET1K_V1", cached, sha256, True)
    assert torch.equal(network.model.classifier[1].weight, squeezenet.classifier[1].weight)
    torch.save(squeezenet.state_dict() | {"classifier.1.bias": torch.ones(1000)}, cached)
    with pytest.raises(RequestError, match=f"{cached}: not the file .* delete it"):
        load_network("squeezenet1_1", parse_weights("squeezenet1_1", text))


def test_weights_that_are_not_the_first(monkeypatch, tmp_path):
    """torchvision's DEFAULT of resnet50 are its second, and the file is named after them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"weights")
    digest = "11ad3fa6" + "0" * 56
    monkeypatch.setattr(networks, "get_digest", lambda path, algorithm: digest)
    wanted = parse_weights("resnet50", "default")
    found = networks.find_torchvision_weights("resnet50", wanted, or_random=False)
    assert (found.name, found.path, found.default) == ("IMAGENET1K_V2", cached, False)


def test_state_dict_is_loaded(weights, squeezenet):
    network = load_network("squeezenet1_1", parse_weights("squeezenet1_1", str(weights)))
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert network.weights == Weights("file", "trained.pth", weights, sha256, False)
    batch = torch.randn(2, 3, 224, 224, generator=torch.manual_seed(5))
    with torch.no_grad():
        assert torch.equal(network.model(batch), squeezenet(batch))


def test_random_networks_are_the_same_every_time():
    """Whatever the generator's state; with BatchNorm that is calibrated."""
    wanted = parse_weights("shufflenet_v2_x0_5", "random")
    first = load_network("shufflenet_v2_x0_5", wanted)
    torch.manual_seed(7)
    second = load_network("shufflenet_v2_x0_5", wanted)
    assert first.weights == second.weights == Weights("random", "random")
    states = [network.model.state_dict() for network in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    variance = states[0]["conv1.1.running_var"]
    assert not (variance == 1).any()


class Code:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return (print, ("the pickle's code ran",))


def write_bad_file(kind, path, weights):
    if kind == "truncated":
        path.write_bytes(weights.read_bytes()[:1_000_000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "code":
        path.write_bytes(pickle.dumps(Code()))
    elif kind == "code beside the weights":
        torch.save({"state_dict": torch.load(weights), "args": Code()}, path)
    elif kind == "code in a Namespace":
        torch.save({"model": torch.load(weights), "args": argparse.Namespace(lr=Code())}, path)
    elif kind == "code in the older format":
        state = {"model": torch.load(weights), "args": argparse.Namespace(lr=Code())}
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "NumPy objects":
        torch.save({"model": torch.load(weights), "acc": np.array([Code()])}, path)
    elif kind == "whole model":
        torch.save(models.squeezenet1_1(), path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "no tensors":
        torch.save({"epoch": 3, "args": argparse.Namespace(lr=0.1)}, path)
    elif kind == "text":
        path.write_text("hello world\n")
    elif kind in ("nan", "inf"):
        bias = torch.full((1000,), float(kind))
        torch.save(torch.load(weights) | {"classifier.1.bias": bias}, path)
    elif kind == "no tensor among them":
        torch.save(torch.load(weights) | {"classifier.1.bias": 3}, path)
    elif kind == "a head that isn't a tensor":
        torch.save(torch.load(weights) | {"classifier.1.weight": 3}, path)
    elif kind == "other architecture":
        torch.save({"conv.weight": torch.zeros(3)}, path)
    elif kind == "other classes":
        weight = torch.zeros(7, 512, 1, 1)
        torch.save(torch.load(weights) | {"classifier.1.weight": weight}, path)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("truncated", "can't be read .*truncated"),
        ("empty", "can't be read .*truncated"),
        ("code", "more than tensors"),
        ("code beside the weights", "more than tensors"),
        ("code in a Namespace", "more than tensors"),
        ("code in the older format", "more than tensors"),
        ("NumPy objects", "more than tensors"),
        (
            "whole model",
            "torch.nn.modules.activation.ReLU, .*could run code",
        ),
        ("tensor", "no state dict"),
        ("no tensors", "no state dict"),
        ("text", "can't be read .*another format"),
        ("nan", "classifier.1.bias isn't a tensor of finite numbers"),
        ("inf", "classifier.1.bias isn't a tensor of finite numbers"),
        ("no tensor among them", "not the weights of squeezenet1_1.*classifier.1.bias"),
        ("a head that isn't a tensor", "not the weights of squeezenet1_1.*classifier.1"),
        ("other architecture", "not the weights of squeezenet1_1"),
        ("other classes", "not the weights of squeezenet1_1.*classifier.1.bias"),
    ],
)
def test_bad_weights_file(tmp_path, weights, capfd, kind, words):
    path = tmp_path / "bad.pth"
    write_bad_file(kind, path, weights)
    with pytest.raises(RequestError, match=words) as caught:
        load_weights("squeezenet1_1", path)
    assert "\n" not in str(caught.value) and "bad.pth" in str(caught.value)
    assert "code ran" not in capfd.readouterr().out
    if "code" in kind or kind == "NumPy objects":  # that it could have run
        (
            pickle.loads(path.read_bytes())
            if kind == "code"
            else torch.load(path, weights_only=False)
        )
        assert "code ran" in capfd.readouterr().out


def test_weights_of_no_name():
    words = "IMAGENET1K_V9: not a file.*IMAGENET1K_V1.*'random'"
    with pytest.raises(RequestError, match=words):
        load_network("squeezenet1_1", parse_weights("squeezenet1_1", "IMAGENET1K_V9"))
    with pytest.raises(RequestError, match="--weights nope.pth: no such file"):
        parse_weights("my_module:Net", "nope.pth")


def test_bad_weights_as_the_user_sees_them(run, folder, weights):
    write_bad_file("code in a Namespace", folder / "bad.pth", weights)
    options = ["--model_name", "squeezenet1_1", "--evaluate", "False", "--weights", "bad.pth"]
    result = run("py_to_py_cls.py", *options)
    check_one_line(result, "bad.pth")
    assert "code ran" not in result.stdout
    assert {p.name for p in folder.iterdir()} == {"bad.pth"}


def test_a_dictionary_with_numbers_for_keys_beside_the_weights(tmp_path, weights):
    state = torch.load(weights)
    path = tmp_path / "checkpoint.pth"
    torch.save({"class_weights": {0: torch.ones(1), 1: torch.ones(1)}, "model": state}, path)
    loaded = load_weights("squeezenet1_1", path).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
