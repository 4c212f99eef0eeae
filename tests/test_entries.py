"""What a converted file's entry says about it, and what a killed conversion leaves."""

import os
import platform
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import classification
import conversion
from classification import RequestError, Terminated
from common import remove_leftovers, whole_file
from conversion import convert
from entries import describe_file, find_converted, write_entry
from networks import IMAGENET, Network, Request, run_forward
from verify import Reference, get_references


def make_network(model, weights="random"):
    return Network(Request("test", weights), weights, model, IMAGENET)


@pytest.mark.parametrize(
    "outputs, activation",
    [
        ([[[0.3]], [[0.6], [1.0]]], "sigmoid"),
        ([[[0.3, 0.6]], [[0.1, 0.2]]], "sigmoid"),
        ([[[0.4, 0.6]], [[0.1, 0.9]]], "softmax"),
        # one picture's logits look like probabilities, or like those of a softmax
        ([[[0.3, 0.6]], [[0.1, 1.2]]], None),
        ([[[0.4, 0.6]], [[-0.1, 1.1]]], None),
        ([[[0.4, 0.6]], [[0.1, 0.2]]], "sigmoid"),
        ([[[0.3]], [[-2.0]]], None),
    ],
)
def test_activation_is_decided_over_all_references(tmp_path, outputs, activation):
    references = [Reference("", None, np.float32(logits)) for logits in outputs]
    converted = describe_file(make_network(None), tmp_path / "a.onnx", ["new"], references)
    assert (converted.activation, converted.outputs) == (activation, len(outputs[0][0]))


def test_the_same_file_keeps_the_order_of_its_engines(tmp_path, small, monkeypatch):
    """Else an evaluation that was stopped might start over, with the other engine."""
    engines = ["classic", "new"]
    monkeypatch.setitem(classification.ENGINES, "classic", 1)  # the next OpenCV has none
    monkeypatch.setattr(conversion, "verify", lambda *_: (list(engines), {}))
    blob = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    network, references = make_network(small), get_references(small, blob)
    write_entry(convert(network, references), IMAGENET, None)
    engines.reverse()
    assert convert(network, references).engines == ["classic", "new"]
    engines.remove("classic")  # which has become wrong
    assert convert(network, references).engines == ["new"]
    engines.append("classic")
    with torch.no_grad():  # another file
        changed = torch.nn.Sequential(*small[:-1], torch.nn.Linear(12, 1000)).eval()
    network = make_network(changed)
    assert convert(network, get_references(changed, blob)).engines == ["new", "classic"]


def test_what_a_killed_process_leaves(tmp_path):
    """The next conversion removes it, but nothing of a process that runs, here or elsewhere."""
    script = "import common, sys, time\nwith common.whole_file('models/a.onnx') as part:\n"
    script += "    part.write_text('half')\n    print('here', flush=True)\n    time.sleep(60)\n"
    command = [sys.executable, "-c", script]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
        process.stdout.readline()
        (left,) = (tmp_path / "models").iterdir()
        remove_leftovers(tmp_path / "models")
        assert (left / "a.onnx").read_text() == "half"
        process.kill()
    elsewhere = left.with_name(left.name.replace(platform.node(), f"x{platform.node()}"))
    elsewhere.mkdir()
    remove_leftovers(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == [elsewhere]


@pytest.mark.parametrize("place", ["forward", "export", "file"])
def test_sigterm(tmp_path, capsys, place):
    """143 and one line, wherever it comes: nobody takes it for a failure of his own."""

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    class Net(torch.nn.Module):
        def forward(self, x):
            stop()

    def main():
        if place == "forward":
            run_forward(Net(), torch.zeros(1, 3, 8, 8))
        elif place == "export":
            conversion.export(Net(), tmp_path / "a.onnx", (1, 3, 8, 8), dynamo=False)
        with whole_file(tmp_path / "a.onnx") as part:
            part.write_text("half")
            stop()

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            classification.run(main)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 143
    (line,) = capsys.readouterr().err.splitlines()
    assert "stopped by SIGTERM" in line and list(tmp_path.iterdir()) == []
    assert not issubclass(Terminated, Exception) and issubclass(RequestError, Exception)


def test_what_a_second_run_knows(tmp_path, small, monkeypatch):
    """Without PyTorch: the network's own preprocessing, and what had to be assumed."""
    monkeypatch.setattr(conversion, "verify", lambda *_: (["new"], {}))
    blob = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    network, references = make_network(small), get_references(small, blob)
    network.declared = False
    first = convert(network, references)
    trial = SimpleNamespace(**vars(IMAGENET) | {"scale": 2.0, "std": ()})
    write_entry(first, IMAGENET.__class__(**vars(trial)), None)
    second = find_converted(Request("test", "random"))
    assert second == first and second.preprocessing == IMAGENET and not second.declared
    assert "scale: 2.0" in (tmp_path / "models" / "models.yml").read_text()
