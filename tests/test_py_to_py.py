"""py_to_py_resnet50.py and py_to_py_cls.py: conversion, test mode, evaluation."""

import copy
import dataclasses
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from conftest import PICTURES, ROOT, check_one_line, read_answer

import conversion
import py_to_py_resnet50
from classification import RequestError, read_zoo
from common import NetworksDisagree, Preprocessing, read_tutorial
from conversion import convert, find_converted, get_onnx_path
from default_preprocess_config import pytorch_resize_input_blob
from networks import Network, Request
from py_to_py_cls import get_module_config, get_parser
from verify import get_references

RED_PANDA = PICTURES / "red_panda.jpg"
LABELLED = [line.split() for line in (PICTURES / "val.txt").read_text().splitlines()]
CACHED = "squeezenet1_1-b8a52dc0.pth"  # what torchvision calls its weights
IMAGENETS = Preprocessing(**read_tutorial(pytorch_resize_input_blob))


@pytest.fixture
def converted_before(folder, converted):
    """The converted file in the folder's models/, as `--weights trained.pth` leaves it."""
    shutil.copytree(converted, folder / "models")
    return folder / "models" / "squeezenet1_1-trained.onnx"


@pytest.fixture
def start_importtime(folder, env):
    """start_importtime(options): py_to_py_cls.py in a process, and the set of what it imports."""

    def start(*args):
        script = str(ROOT / "py_to_py_cls.py")
        command = [sys.executable, "-X", "importtime", script, *map(str, args)]
        result = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=300
        )
        lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
        return result, {line.rpartition("|")[2].strip() for line in lines}

    return start


def save_changed(weights, path):
    """Another state dict of the same network; returns the network."""
    from torchvision import models

    state = torch.load(weights)
    state["classifier.1.weight"] = state["classifier.1.weight"] * 1.5
    state["classifier.1.bias"] = state["classifier.1.bias"] + 1
    torch.save(state, path)
    network = models.squeezenet1_1()
    network.load_state_dict(state)
    return network.eval()


# --- the walk-through -----------------------------------------------------------------------------


def test_walk_through_without_network(run, folder):
    """ResNet-50 with random weights, and nobody can miss it."""
    result = run("py_to_py_resnet50.py")
    assert result.returncode == 0, result.stderr
    assert "RANDOM WEIGHTS" in result.stderr
    assert result.stdout.count("* shape:  (1, 1000)") == 2
    assert "/conv1/Conv" in result.stdout
    opencv = read_answer(result.stdout, "OpenCV DNN prediction:")
    pytorch = read_answer(result.stdout, "PyTorch prediction:")
    assert opencv[0] == pytorch[0]
    assert opencv[1] == pytest.approx(pytorch[1], abs=2e-4)
    *_, agree, random = result.stdout.splitlines()
    assert "PyTorch and OpenCV agree" in agree
    assert random.startswith("RANDOM WEIGHTS")
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["py_to_py_resnet50-random.onnx"]


def test_walk_through_that_disagrees(run, folder, monkeypatch, small):
    """Exit 1 with the figures; no new file, and the older one stays."""
    network = Network(Request("small", "small.pth"), "small.pth", small, IMAGENETS)
    monkeypatch.setattr(py_to_py_resnet50, "load_network", lambda *args: network)
    assert run("py_to_py_resnet50.py").returncode == 0
    path = folder / "models" / "py_to_py_resnet50.onnx"
    written = path.read_bytes()

    right = py_to_py_resnet50.get_opencv_dnn_prediction
    monkeypatch.setattr(
        py_to_py_resnet50, "get_opencv_dnn_prediction", lambda *args: 1.001 * right(*args)
    )
    check_one_line(
        run("py_to_py_resnet50.py"), "disagree", "relative error 1.0e-03 (limit 1e-04)", code=1
    )
    assert path.read_bytes() == written
    assert list(path.parent.iterdir()) == [path]
    path.unlink()
    check_one_line(run("py_to_py_resnet50.py"), "disagree", code=1)
    assert [p for p in folder.rglob("*") if p.is_file()] == []


def test_walk_through_reads_like_the_tutorial():
    text = (ROOT / "py_to_py_resnet50.py").read_text()
    steps = [
        "get_pytorch_onnx_model",
        "get_preprocessed_img",
        "get_imagenet_labels",
        "get_opencv_dnn_prediction",
        "get_pytorch_dnn_prediction",
    ]
    assert re.findall(r"^def (get_\w+)\(", text, re.M)[:5] == steps


@pytest.mark.parametrize("script", ["py_to_py_resnet50.py", "py_to_py_cls.py"])
def test_an_error_of_the_process(start, folder, script):
    """Exit code 2 and one line, before torch is imported."""
    name = ["--model_name", "squeezenet1_1"] if script == "py_to_py_cls.py" else []
    result = start(script, *name, "--input_img", "nope.jpg")
    check_one_line(result, f"{script}: error: ", "nope.jpg")
    assert "PyTorch" not in result.stdout and list(folder.iterdir()) == []


# --- test mode ------------------------------------------------------------------------------------


def test_test_mode_and_conversion(
    run, start_importtime, folder, put_weights, weights, squeezenet, get_logits
):
    """Cached weights: converted once, and found again without torch; any batch size."""
    put_weights(weights)
    options = ["--model_name", "SqueezeNet1_1", "--test", "True"]
    expected = get_logits(squeezenet, RED_PANDA, centre_crop=False)

    before = torch._C._jit_set_onnx_log_enabled
    first = run("py_to_py_cls.py", *options)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert torch._C._jit_set_onnx_log_enabled is before
    class_id, confidence = read_answer(first.stdout)
    assert class_id == expected.argmax()
    assert confidence == pytest.approx(expected.max(), abs=1e-4)
    assert "exporting squeezenet1_1 ..." in first.stdout
    assert f"verifying with OpenCV {cv2.__version__}, limit 1e-04 ..." in first.stdout
    rows = re.findall(r"^(new|classic) engine +(.+)$", first.stdout, re.M)
    rows = {engine: [float(cell) for cell in cells.split()] for engine, cells in rows}
    assert rows.keys() == {"new", "classic"}
    for *errors, ms in rows.values():
        assert len(errors) == 4 and ms > 0
        assert all(0 < error < 1e-4 for error in errors)
    fastest = min(rows, key=lambda engine: rows[engine][-1])
    path = folder / "models" / "squeezenet1_1.onnx"
    taking = f"models/squeezenet1_1.onnx: converted and verified; taking the {fastest} engine"
    assert taking in first.stdout
    assert not (folder / "logs").exists()
    picture = cv2.imread(str(folder / "results" / "red_panda_squeezenet1_1_classification.jpg"))
    assert picture.shape == cv2.imread(str(RED_PANDA)).shape

    written = {p.name for p in path.parent.iterdir()}
    assert written == {path.name, "models.yml", "squeezenet1_1_imagenet_classes.txt"}
    graph = onnx.load(path).graph
    assert [n.name for n in graph.input] == ["input"]
    assert [n.name for n in graph.output] == ["output"]
    written = path.stat()

    second, imported = start_importtime(*options)
    assert second.returncode == 0, second.stderr
    assert "cv2" in imported and not imported & {"torch", "torchvision", "onnx"}
    assert "converted and verified before" in second.stdout
    assert read_answer(second.stdout) == (class_id, confidence)
    assert path.stat() == written

    net = cv2.dnn.readNetFromONNX(str(path))
    batch = np.random.default_rng(3).standard_normal((5, 3, 224, 224)).astype(np.float32)
    with torch.no_grad():
        reference = squeezenet(torch.from_numpy(batch)).numpy()
    for size in (1, 5, 3):
        net.setInput(batch[:size])
        assert np.allclose(net.forward(), reference[:size], atol=1e-4)


def test_random_weights_converted_before_need_no_torch(run, start_importtime):
    """Default weights whose download fails are tried again, but not converted again."""
    options = ["--model_name", "squeezenet1_1", "--test", "True"]
    first = run("py_to_py_cls.py", *options)
    assert first.returncode == 0, first.stderr
    assert "RANDOM WEIGHTS" in first.stderr and "* RANDOM WEIGHTS" in first.stdout
    second, imported = start_importtime(*options, "--weights", "Random")
    assert second.returncode == 0, second.stderr
    assert "cv2" in imported and not imported & {"torch", "torchvision", "onnx"}
    third = run("py_to_py_cls.py", *options)
    assert "RANDOM WEIGHTS" in third.stderr
    for result in (second, third):
        assert "converted and verified before" in result.stdout
        assert "* RANDOM WEIGHTS" in result.stdout
        assert read_answer(result.stdout) == read_answer(first.stdout)


def test_two_weights_files_of_one_name(run, folder, converted_before, weights, get_logits):
    """The second replaces the first, and the output says so."""
    changed = save_changed(weights, folder / "trained.pth")
    options = ["--model_name", "squeezenet1_1", "--weights", "trained.pth", "--test", "True"]
    result = run("py_to_py_cls.py", *options)
    assert result.returncode == 0, result.stderr
    assert "squeezenet1_1-trained.onnx: converted and verified, in the place of" in result.stdout
    expected = get_logits(changed, RED_PANDA, centre_crop=False)
    answer = (expected.argmax(), pytest.approx(expected.max(), abs=1e-4))
    assert read_answer(result.stdout) == answer


DAMAGES = [
    ("engines", '["quantum"]'),
    ("engines", '["new", "quantum"]'),
    ("engines", "[]"),
    ("engines", "3"),
    ("engines", None),
    ("outputs", None),
    ("outputs", '"many"'),
    ("outputs", "-1"),
    ("load_info", None),
    ("load_info", '{ sha1: "0" }'),
    ("made_from", None),
    ("made_from", '"a text"'),
    ("made_from", '{ file: "0", entry: "0" }'),
]


@pytest.mark.parametrize("key, value", DAMAGES)
def test_damaged_entry(converted_before, weights, monkeypatch, key, value):
    """A file whose entry is damaged isn't taken."""
    monkeypatch.chdir(converted_before.parents[1])
    request = Request("squeezenet1_1", str(weights))
    found = find_converted(request)
    assert found.path == Path("models", converted_before.name) and found.outputs == 1000
    assert sorted(found.engines) == ["classic", "new"]
    zoo = converted_before.with_name("models.yml")
    line = "" if value is None else f"  {key}: {value}\n"
    text, count = re.subn(f"(?m)^  {key}: .*\n", line, zoo.read_text())
    zoo.write_text(text)
    assert count == 1 and find_converted(request) is None


@pytest.mark.parametrize("what", ["torch", "torchvision", "onnx", "opencv", "a script", "weights"])
def test_another_version_converts_again(
    converted_before, weights, monkeypatch, tmp_path, folder, what
):
    monkeypatch.chdir(folder)
    shutil.copy(weights, folder)
    request = Request("squeezenet1_1", "trained.pth")
    assert find_converted(request) is not None
    if what == "opencv":
        monkeypatch.setattr(cv2, "__version__", "4.0.0")
    elif what == "a script":
        for script in ROOT.glob("*.py"):
            shutil.copy(script, tmp_path)
        monkeypatch.setattr(conversion, "SCRIPT_DIR", tmp_path)
        assert find_converted(request) is not None
        (tmp_path / "onnx_rewrites.py").write_text("# changed")
    elif what == "weights":
        save_changed(weights, folder / "trained.pth")
    else:
        version = conversion.importlib.metadata.version
        changed = lambda name: "0.1" if name == what else version(name)  # noqa: E731
        monkeypatch.setattr(conversion.importlib.metadata, "version", changed)
    assert find_converted(request) is None


def test_what_an_entry_depends_on(run, folder, converted_before, weights):
    """Test mode writes it with the options that it uses; an evaluation leaves it alone."""
    options = ["--model_name", "squeezenet1_1", "--weights", weights]
    zoo = converted_before.with_name("models.yml")
    before = zoo.read_text()
    trial = ["--scale", "1", "--mean", "0", "0", "0", "--std", "1", "1", "1"]
    data = ["--img_root_dir", PICTURES, "--img_cls_file", PICTURES / "val.txt"]
    result = run("py_to_py_cls.py", *options, *trial, *data)
    assert "exporting" not in result.stdout and "top-1 accuracy" in result.stdout
    assert zoo.read_text() == before
    refused = run("py_to_py_cls.py", *options, *data, "--preprocess", "torchvision", *trial)
    assert refused.returncode == 2 and zoo.read_text() == before
    refused = run("py_to_py_cls.py", *options, *data, "--frame_size", "200", "--rsz_width", "9",
                  "--rsz_height", "9")  # fmt: skip
    assert refused.returncode == 2 and zoo.read_text() == before

    result = run("py_to_py_cls.py", *options, *trial, "--test", "True")
    assert "exporting" in result.stdout
    assert "preprocessing: scale 1.0, mean [0.0, 0.0, 0.0], std [1.0, 1.0, 1.0]" in result.stdout
    again = run("py_to_py_cls.py", *options, *trial, "--test", "True")
    assert "exporting" not in again.stdout
    assert read_answer(again.stdout) == read_answer(result.stdout)
    assert read_zoo(zoo)["squeezenet1_1-trained"]["scale"] == 1

    # another size is another file
    small = run("py_to_py_cls.py", *options, "--test", "True", "--frame_size", "96")
    assert small.returncode == 0, small.stderr
    assert read_zoo(zoo)["squeezenet1_1-96-trained"]["width"] == 96
    assert read_zoo(zoo)["squeezenet1_1-trained"]["scale"] == 1

    # an evaluation that has to convert writes what the network wants, whatever it tries itself
    shutil.rmtree(folder / "models")
    result = run("py_to_py_cls.py", *options, *trial, *data)
    assert "exporting" in result.stdout and "top-1 accuracy" in result.stdout
    assert read_zoo(zoo)["squeezenet1_1-trained"]["scale"] == pytest.approx(1 / 255)


def test_preprocessing_of_test_mode(run, converted_before, weights, squeezenet):
    """--default_img_preprocess False: TestClsModuleConfig; options win over both."""
    options = ["--model_name", "squeezenet1_1", "--weights", weights, "--test", "yes"]
    options += ["--input_img", PICTURES / "koala.jpg"]
    picture = cv2.imread(str(PICTURES / "koala.jpg")).astype(np.float32)

    def expected(rgb):
        with torch.no_grad():
            tensor = torch.from_numpy(rgb.astype(np.float32)).permute(2, 0, 1)[None]
            logits = squeezenet(tensor)[0].numpy()
        return logits.argmax(), pytest.approx(logits.max(), rel=1e-4)

    plain = cv2.resize(picture, (224, 224))[:, :, ::-1]
    off = ["--default_img_preprocess", "False"]
    result = run("py_to_py_cls.py", *options, *off)
    assert read_answer(result.stdout) == expected(plain.copy())
    result = run("py_to_py_cls.py", *options, *off, "--scale", "0.25", "--std", "1", "2", "4")
    assert read_answer(result.stdout) == expected(plain / 4 / [1, 2, 4])

    resized = cv2.resize(cv2.resize(picture, (256, 256)), (224, 224))[:, :, ::-1]
    result = run("py_to_py_cls.py", *options, "--mean", "0", "0", "0")
    assert read_answer(result.stdout) == expected(resized / 255 / [0.229, 0.224, 0.225])


def test_evaluation_with_nothing_but_the_install(run, folder):
    """No data, no network: the bundled pictures, random weights, and both are said."""
    result = run(
        "py_to_py_cls.py", "--model_name", "squeezenet1_1", "--test", "1", "--evaluate", "1"
    )
    assert result.returncode == 0, result.stderr
    assert "evaluating on the bundled pictures" in result.stdout
    assert "RANDOM weights, 12 pictures" in result.stdout
    assert "RANDOM WEIGHTS" in result.stderr
    assert "RANDOM weights" in (folder / "logs" / "squeezenet1_1-random_log.txt").read_text()
    assert (folder / "results" / "red_panda_squeezenet1_1-random_classification.jpg").is_file()

    # the answer is marked whichever way the network is named, and if the entry alone says it
    assert "* RANDOM WEIGHTS" in run("classification.py", "squeezenet1_1-random").stdout
    model = folder / "models" / "squeezenet1_1-random.onnx"
    result = run("classification.py", "--input", model, RED_PANDA)
    assert "* RANDOM WEIGHTS" in result.stdout
    zoo = folder / "models" / "models.yml"
    assert '\n  weights: "random"\n' in zoo.read_text()
    text = zoo.read_text().replace("1-random:", "1-renamed:")
    zoo.write_text(text.replace("1-random.onnx", "1-renamed.onnx"))
    model.rename(model.with_name("squeezenet1_1-renamed.onnx"))
    result = run("classification.py", "squeezenet1_1-renamed")
    assert result.returncode == 0, result.stderr
    assert "* RANDOM WEIGHTS" in result.stdout


def test_named_data_is_not_evaluated_with_random_weights(run, folder):
    options = ["--img_root_dir", PICTURES, "--img_cls_file", PICTURES / "val.txt"]
    result = run("py_to_py_cls.py", "--model_name", "squeezenet1_1", *options)
    check_one_line(result, CACHED, "checkpoints", "--weights random")
    assert [p for p in folder.rglob("*") if p.is_file()] == []


# --- conversion -----------------------------------------------------------------------------------


class Wrong(torch.nn.Module):
    """Off by a thousandth once it is exported."""

    def forward(self, x):
        return x.mean(dim=(2, 3)) * (1.001 if torch.onnx.is_in_onnx_export() else 1.0)


class Failing(torch.nn.Module):
    """Can't be exported by either exporter."""

    def forward(self, x):
        if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
            raise ValueError("not like this")
        return x.mean(dim=(2, 3))


class Leaving(torch.nn.Module):
    """Ends the process when it is exported."""

    def forward(self, x):
        if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
            raise SystemExit(0)
        return x.mean(dim=(2, 3))


def make_network(model, name="test"):
    return Network(Request(name), "test.pth", model, IMAGENETS)


@pytest.mark.parametrize(
    "module, error, words",
    [
        (Wrong, NetworksDisagree, "relative error 1.0e-03"),
        (Failing, RequestError, "can't export.* for 16x16 pictures: ValueError: not like this"),
        (Leaving, RequestError, "can't export.* for 16x16 pictures: SystemExit"),
    ],
)
def test_a_conversion_that_fails(tmp_path, monkeypatch, module, error, words):
    """The older file of that name stays as it is, and nothing else is written."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "models" / "wrong.onnx"
    path.parent.mkdir()
    path.write_text("an older file of that name")
    path.with_name("wrong.onnx.data").write_text("its weights")
    blob = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    before = torch._C._jit_set_onnx_log_enabled
    with pytest.raises(error, match=words) as caught:
        convert(make_network(module(), "wrong"), get_references(module(), blob))
    assert caught.type is error and "\n" not in str(caught.value)
    assert torch._C._jit_set_onnx_log_enabled is before
    assert {p.name: p.read_text() for p in path.parent.iterdir()} == {
        "wrong.onnx": "an older file of that name",
        "wrong.onnx.data": "its weights",
    }


def test_a_file_that_disagrees_never_gets_its_name(tmp_path, small, monkeypatch):
    """Neither exporter's; and if only the first one's disagrees, the second one's is taken."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "models" / "small.onnx"
    blob = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    references = get_references(small, blob)
    right, wrong_ones = conversion.export, {False, True}

    def export(model, part, shape, dynamo):
        changed = copy.deepcopy(model)
        if dynamo in wrong_ones:
            with torch.no_grad():
                changed[-1].weight *= 1.001
                changed[-1].bias *= 1.001
        return right(changed, part, shape, False)

    monkeypatch.setattr(conversion, "export", export)
    with pytest.raises(NetworksDisagree, match="relative error 1.0e-03"):
        convert(make_network(small, "small"), references)
    assert list(path.parent.iterdir()) == []
    wrong_ones.remove(True)
    convert(make_network(small, "small"), references)
    assert list(path.parent.iterdir()) == [path]


def test_a_conversion_that_succeeds_leaves_no_older_weights(tmp_path, small, monkeypatch):
    """The .data of an older file goes; a file that isn't ONNX is replaced."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "models" / "small.onnx"
    path.parent.mkdir()
    path.write_text("an older file of that name")
    (path.parent / "small.onnx.data").write_text("its weights")
    blob = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    found = convert(make_network(small, "small"), get_references(small, blob))
    assert list(path.parent.iterdir()) == [path]
    assert (found.path.absolute(), found.outputs) == (path, 1000)
    assert sorted(found.engines) == ["classic", "new"]
    net = cv2.dnn.readNetFromONNX(str(path))
    net.setInput(blob)
    with torch.no_grad():
        assert np.allclose(net.forward(), small(torch.from_numpy(blob)).numpy(), atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1.0])
def test_outputs_that_prove_nothing(value):
    class Constant(torch.nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3)) * 0 + value

    blob = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    with warnings.catch_warnings(), pytest.raises(RequestError, match="prove nothing"):
        warnings.simplefilter("error")
        get_references(Constant(), blob)


def test_a_file_called_random_is_not_taken_for_random_weights(tmp_path):
    (tmp_path / "random.pth").write_bytes(b"weights")
    stem = get_onnx_path(Request("squeezenet1_1", str(tmp_path / "random.pth"))).stem
    assert not stem.endswith("-random") and stem != "squeezenet1_1"
    assert get_onnx_path(Request("squeezenet1_1", "RANDOM")).stem == "squeezenet1_1-random"
    small = Request("squeezenet1_1", "RANDOM", width=96, height=64)
    assert get_onnx_path(small).stem == "squeezenet1_1-96-64-random"


# --- the project's own facts ----------------------------------------------------------------------


def test_standalone_constants_are_the_projects():
    """classification.py travels alone and so has its own copy of two facts."""
    import classification
    from test_config import TestClsModuleConfig

    own = Preprocessing(**read_tutorial(classification.TORCHVISION))
    assert own == IMAGENETS
    assert own.scale == 1 / 255 and own.mean == (123.675, 116.28, 103.53)
    assert str(classification.BUNDLED_PICTURE).endswith(TestClsModuleConfig().input_img)


def test_bundled_data():
    import torchvision

    labels = (PICTURES / "imagenet_classes.txt").read_text().splitlines()
    assert len(labels) == 1000
    assert labels[335] == "fox squirrel, eastern fox squirrel, Sciurus niger"
    categories = torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"]
    differing = [i for i, c in enumerate(categories) if c not in labels[i].split(", ")]
    assert differing == [134, 639]  # torchvision's "crane bird" and "maillot tank suit"
    pictures = {p.name for p in PICTURES.glob("*.jpg")}
    assert {name for name, _ in LABELLED} == pictures and len(pictures) >= 8
    sources = (PICTURES / "SOURCES.txt").read_text()
    assert all(name in sources for name in pictures)


@pytest.mark.parametrize("arguments", [["--help"], ["--model_nmae", "resnet18"]])
def test_the_command_line_is_read_before_torch_is_imported(start_importtime, arguments):
    result, imported = start_importtime(*arguments)
    assert result.returncode == (0 if arguments == ["--help"] else 2)
    assert "cv2" in imported
    assert not imported & {"torch", "torchvision", "onnx", "matplotlib"}


def test_every_config_field_is_an_option(run):
    from test_config import TestClsConfig, TestClsModuleConfig

    text = run("py_to_py_cls.py", "--help").stdout
    for config in (TestClsConfig, TestClsModuleConfig):
        for field in dataclasses.fields(config):
            assert (f"--{field.name} " in text) == (field.name != "model")


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ([], ["ROOT/test_data/cls/red_panda.jpg", "ROOT/test_data/cls/imagenet_classes.txt"]),
        (["--cls_test_data_dir", "mine"], ["mine/red_panda.jpg", "mine/imagenet_classes.txt"]),
        (
            ["--cls_test_data_dir", "mine", "--input_img", "cat.jpg"],
            ["cat.jpg", "mine/imagenet_classes.txt"],
        ),
        (  # named by the user: not the one beside the scripts
            ["--input_img", "test_data/cls/red_panda.jpg"],
            ["test_data/cls/red_panda.jpg", "ROOT/test_data/cls/imagenet_classes.txt"],
        ),
    ],
)
def test_where_test_mode_finds_its_files(tmp_path, monkeypatch, options, files):
    monkeypatch.chdir(tmp_path)
    args = get_parser().parse_args(["--model_name", "resnet50", *options])
    config = get_module_config(args)
    assert [config.input_img, config.classes] == [f.replace("ROOT", str(ROOT)) for f in files]
    assert config.test_module_path == str(ROOT / "classification.py")


def test_a_converted_file_that_was_changed_is_converted_again(run, folder, weights):
    """One byte in the middle of the weights: no answer from it, in no mode."""
    options = ["--model_name", "squeezenet1_1", "--weights", weights, "--test", "True"]
    first = run("py_to_py_cls.py", *options)
    path = folder / "models" / "squeezenet1_1-trained.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    second = run("py_to_py_cls.py", *options)
    assert "verified before" not in second.stdout
    assert read_answer(second.stdout) == read_answer(first.stdout)
    assert "verified before" in run("py_to_py_cls.py", *options).stdout
