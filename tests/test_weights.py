"""Where weights come from, and what is said of a file that holds none."""

import hashlib
import http.server
import pickle
import threading

import pytest
import torch
from conftest import check_one_line

from classification import RequestError
from common import RANDOM, download, fetch_weights, load_network, load_weights

CONTENT = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    """A server on the loopback address: /whole, /broken (ends early), /silent (sends nothing)."""
    release = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/silent":
                release.wait(60)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/broken" else CONTENT)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    release.set()
    server.shutdown()


def test_download(server, tmp_path):
    path = tmp_path / "cache" / "net.pth"
    download(f"{server}/whole", path, SHA256[:8], timeout=30)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "page, words, timeout",
    [("broken", "broke off after 524288", 30), ("silent", "no byte in 0.5 s|timed out", 0.5)],
)
def test_download_that_fails_leaves_nothing(server, tmp_path, page, words, timeout):
    with pytest.raises(RequestError, match=words):
        download(f"{server}/{page}", tmp_path / "net.pth", SHA256[:8], timeout)
    assert list(tmp_path.iterdir()) == []


def test_download_of_another_file(server, tmp_path):
    with pytest.raises(RequestError, match="net.pth: broke off"):
        download(f"{server}/whole", tmp_path / "net.pth", "00000000", timeout=30)
    assert list(tmp_path.iterdir()) == []


def test_download_from_a_port_where_nobody_listens(tmp_path):
    with pytest.raises(RequestError, match="refused"):
        download("http://127.0.0.1:9/net.pth", tmp_path / "net.pth", SHA256[:8])


def test_cache_is_torchvisions(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / "net-01234567.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"cached")
    path = fetch_weights("http://127.0.0.1:9/net-01234567.pth")
    assert path == cached


def test_state_dict_is_loaded(weights, resnet18):
    model, origin = load_network("resnet18", str(weights))
    assert origin == str(weights)
    batch = torch.randn(2, 3, 224, 224, generator=torch.manual_seed(5))
    with torch.no_grad():
        assert torch.equal(model(batch), resnet18(batch))


def test_random_networks_are_the_same_every_time():
    first, second = (load_network("resnet18", "random") for _ in range(2))
    assert first[1] == RANDOM
    states = zip(first[0].state_dict().values(), second[0].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


class Code:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return (print, ("the pickle's code ran",))


def write_bad_file(kind, path, weights):
    if kind == "cut short":
        path.write_bytes(weights.read_bytes()[:1_000_000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "code":
        path.write_bytes(pickle.dumps(Code()))
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "text":
        path.write_text("hello world\n")
    elif kind == "nan":
        torch.save(torch.load(weights) | {"fc.bias": torch.full((1000,), torch.nan)}, path)
    elif kind == "other architecture":
        torch.save({"conv.weight": torch.zeros(3)}, path)
    elif kind == "other classes":
        torch.save(torch.load(weights) | {"fc.weight": torch.zeros(7, 512)}, path)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("cut short", "cut short"),
        ("empty", "cut short"),
        ("code", "more in it than tensors"),
        ("tensor", "no state dict"),
        ("text", "no weights"),
        ("nan", "fc.bias holds something else than finite numbers"),
        ("other architecture", "not the weights of resnet18"),
        ("other classes", "not the weights of resnet18.*fc.bias"),
    ],
)
def test_bad_weights_file(tmp_path, weights, capfd, kind, words):
    path = tmp_path / "bad.pth"
    write_bad_file(kind, path, weights)
    with pytest.raises(RequestError, match=words) as caught:
        load_weights("resnet18", path)
    assert "\n" not in str(caught.value) and "bad.pth" in str(caught.value)
    assert "code ran" not in capfd.readouterr().out


def test_weights_of_no_name():
    with pytest.raises(RequestError, match="IMAGENET1K_V9: no file.*IMAGENET1K_V1"):
        load_network("resnet18", "IMAGENET1K_V9")


def test_bad_weights_as_the_user_sees_them(run, folder, weights):
    write_bad_file("code", folder / "bad.pth", weights)
    options = ["--model_name", "resnet18", "--evaluate", "False", "--weights", "bad.pth"]
    check_one_line(run("py_to_py_cls.py", *options), "bad.pth")
    assert {p.name for p in folder.iterdir()} == {"bad.pth"}
