"""py_to_py_resnet50.py and py_to_py_cls.py: conversion, test mode, evaluation."""

import copy
import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
import time
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
from common import (
    TORCHVISION_PREPROCESSING,
    NetworksDisagree,
    Preprocessing,
    RequestError,
    add_to_zoo,
)
from conversion import Converted, convert, find_converted, find_network, get_onnx_path
from networks import Network, Weights, parse_weights
from py_to_py_cls import get_module_config, get_parser
from verify import get_references

RED_PANDA = PICTURES / "red_panda.jpg"
LABELLED = [line.split() for line in (PICTURES / "val.txt").read_text().splitlines()]
CACHED = "squeezenet1_1-b8a52dc0.pth"  # what torchvision calls its weights


@pytest.fixture
def converted_before(folder, converted):
    """The converted file in the folder's models/, as `--weights trained.pth` leaves it."""
    path = folder / "models" / "squeezenet1_1-trained.onnx"
    path.parent.mkdir()
    shutil.copy(converted, path)
    add_to_zoo("squeezenet1_1", Converted(path, ["new"], 1000), TORCHVISION_PREPROCESSING, None)
    return path


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
    """Another state dict of the same network; returns it."""
    state = torch.load(weights)
    state["classifier.1.weight"] = state["classifier.1.weight"] * 1.5
    state["classifier.1.bias"] = state["classifier.1.bias"] + 1
    torch.save(state, path)
    return state


def get_changed_network(state):
    from torchvision import models

    network = models.squeezenet1_1()
    network.load_state_dict(state)
    return network.eval()


def set_metadata(path, key, value):
    """Change one key of an ONNX file's metadata, None removes it; its entry has the new SHA-1."""
    proto = onnx.load(path)
    about = {p.key: p.value for p in proto.metadata_props}
    assert key in about
    del proto.metadata_props[:]
    about[key] = value
    onnx.helper.set_model_props(proto, {k: v for k, v in about.items() if v is not None})
    onnx.save(proto, path)
    add_to_zoo("squeezenet1_1", Converted(path, ["new"], 1000), TORCHVISION_PREPROCESSING, None)


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
    weights = Weights("file", "small.pth")
    network = Network("small", weights, Preprocessing(), small)
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
    """Cached weights: converted once, again for other weights only; any batch size."""
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
        assert len(errors) >= 2 and ms > 0
        assert all(0 < error < 1e-4 for error in errors)
    fastest = min(rows, key=lambda engine: rows[engine][-1])
    path = folder / "models" / "squeezenet1_1.onnx"
    taking = f"models/squeezenet1_1.onnx: converted and verified; taking the {fastest} engine"
    assert taking in first.stdout
    assert not (folder / "logs").exists()
    picture = cv2.imread(str(folder / "results" / "red_panda_squeezenet1_1_classification.jpg"))
    assert picture.shape == cv2.imread(str(RED_PANDA)).shape

    written = {p.name for p in path.parent.iterdir()}
    assert written == {path.name, "models.yml", "imagenet_classes.txt"}
    graph = onnx.load(path).graph
    assert [n.name for n in graph.input] == ["input"]
    assert [n.name for n in graph.output] == ["output"]
    written = path.stat()

    second, imported = start_importtime(*options)
    assert second.returncode == 0, second.stderr
    assert "cv2" in imported and not imported & {"torch", "torchvision"}
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

    state = save_changed(weights, folder / "changed.pth")
    put_weights(folder / "changed.pth")
    third = run("py_to_py_cls.py", *options)
    assert third.returncode == 0, third.stderr
    assert "converted and verified before" not in third.stdout
    assert "squeezenet1_1.onnx: replaces a network with other weights of this name" in third.stdout
    expected = get_logits(get_changed_network(state), RED_PANDA, centre_crop=False)
    assert abs(expected.max() - confidence) > 0.5
    answer = (expected.argmax(), pytest.approx(expected.max(), abs=1e-4))
    assert read_answer(third.stdout) == answer


def test_a_weights_file_converted_before_needs_no_torch(
    start_importtime, converted_before, weights, squeezenet, get_logits
):
    options = ["--model_name", "squeezenet1_1", "--weights", weights, "--test", "True"]
    result, imported = start_importtime(*options)
    assert result.returncode == 0, result.stderr
    assert "cv2" in imported and not imported & {"torch", "torchvision"}
    assert "converted and verified before" in result.stdout
    expected = get_logits(squeezenet, RED_PANDA, centre_crop=False)
    answer = (expected.argmax(), pytest.approx(expected.max(), abs=1e-4))
    assert read_answer(result.stdout) == answer


def test_random_weights_converted_before_need_no_torch(run, start_importtime):
    options = ["--model_name", "squeezenet1_1", "--weights", "Random", "--test", "True"]
    first = run("py_to_py_cls.py", *options)
    assert first.returncode == 0, first.stderr
    assert "* RANDOM WEIGHTS" in first.stdout
    second, imported = start_importtime(*options)
    assert second.returncode == 0, second.stderr
    assert "cv2" in imported and not imported & {"torch", "torchvision"}
    assert "converted and verified before" in second.stdout
    assert "* RANDOM WEIGHTS" in second.stdout
    assert read_answer(second.stdout) == read_answer(first.stdout)


def test_two_weights_files_of_one_name(run, folder, converted_before, weights, get_logits):
    """The second replaces the first, and the output says so."""
    state = save_changed(weights, folder / "trained.pth")
    options = ["--model_name", "squeezenet1_1", "--weights", "trained.pth", "--test", "True"]
    result = run("py_to_py_cls.py", *options)
    assert result.returncode == 0, result.stderr
    note = "models/squeezenet1_1-trained.onnx: replaces a network with other weights of this name"
    assert note in result.stdout
    expected = get_logits(get_changed_network(state), RED_PANDA, centre_crop=False)
    answer = (expected.argmax(), pytest.approx(expected.max(), abs=1e-4))
    assert read_answer(result.stdout) == answer


DAMAGES = [
    ("engines", "quantum"),
    ("engines", "new quantum"),
    ("engines", ""),
    ("engines", None),
    ("classes", None),
    ("classes", "many"),
    ("classes", "-1"),
    ("weights_kind", None),
    ("weights_sha256", "0" * 64),
    ("preprocessing", None),
    ("preprocessing", "a text"),
    ("preprocessing", "[1, 2]"),
    ("preprocessing", '{"scale": 1.0}'),
    ("preprocessing", '{"scale": 1.0, "mean": 3, "std": []}'),
    ("preprocessing", '{"depth": 1.0, "mean": [0, 0, 0], "std": []}'),
    ("opencv", "4.0.0"),
    ("torch", None),
]


@pytest.mark.parametrize("key, value", DAMAGES)
def test_damaged_metadata(converted_before, weights, key, value):
    """A file whose metadata are damaged, or of other versions, isn't taken."""
    wanted = parse_weights("squeezenet1_1", str(weights))

    def find():
        network = find_network("squeezenet1_1", wanted, converted_before.parent)
        return network and find_converted(network, converted_before, (1, 3, 224, 224))

    found = find()
    assert found.path == converted_before and found.classes == 1000
    assert sorted(found.engines) == ["classic", "new"]
    set_metadata(converted_before, key, value)
    assert find() is None


@pytest.mark.parametrize("key, value", [("engines", "quantum"), ("classes", None)])
def test_damaged_metadata_as_the_user_sees_it(run, converted_before, weights, key, value):
    set_metadata(converted_before, key, value)
    options = ["--model_name", "squeezenet1_1", "--weights", weights, "--evaluate", "False"]
    result = run("py_to_py_cls.py", *options)
    assert result.returncode == 0 and result.stderr == ""
    assert "converted and verified before" not in result.stdout
    assert "converted and verified; taking the " in result.stdout


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
    assert "* RANDOM WEIGHTS" in run("classification.py", "squeezenet1_1").stdout
    model = folder / "models" / "squeezenet1_1-random.onnx"
    result = run("classification.py", "--input", model, RED_PANDA)
    assert "* RANDOM WEIGHTS" in result.stdout
    zoo = folder / "models" / "models.yml"
    assert '\n  weights: "random"\n' in zoo.read_text()
    zoo.write_text(zoo.read_text().replace("-random.onnx", "-renamed.onnx"))
    model.rename(model.with_name("squeezenet1_1-renamed.onnx"))
    result = run("classification.py", "squeezenet1_1")
    assert result.returncode == 0, result.stderr
    assert "* RANDOM WEIGHTS" in result.stdout


def test_named_data_is_not_evaluated_with_random_weights(run, folder):
    options = ["--img_root_dir", PICTURES, "--img_cls_file", PICTURES / "val.txt"]
    result = run("py_to_py_cls.py", "--model_name", "squeezenet1_1", *options)
    check_one_line(result, CACHED, "checkpoints", "--weights FILE", "random")
    assert [p for p in folder.rglob("*") if p.is_file()] == []


def test_another_networks_file_is_found_out(run, folder, weights, converted):
    """--model with a file of other weights: exit 1, the figures on the last line."""
    state = torch.load(weights)
    state["features.3.squeeze.weight"] *= 1.001
    torch.save(state, folder / "changed.pth")
    options = ["--model_name", "squeezenet1_1", "--weights", "changed.pth", "--model", converted]
    result = run("py_to_py_cls.py", *options, "--test", "True")
    check_one_line(result, "doesn't give PyTorch's answer", "relative error", "L1", code=1)
    assert not (folder / "models").exists()


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


def make_network(model):
    return Network("test", Weights("file", "test.pth", sha256="1" * 64), Preprocessing(), model)


@pytest.mark.parametrize(
    "module, error, words",
    [
        (Wrong, NetworksDisagree, "relative error 1.0e-03"),
        (Failing, RequestError, "can't export.* for 16x16 pictures: .*can't export"),
        (Leaving, RequestError, "can't export.* for 16x16 pictures: SystemExit"),
    ],
)
def test_a_conversion_that_fails(tmp_path, module, error, words):
    """The older file of that name stays as it is, and nothing else is written."""
    path = tmp_path / "models" / "wrong.onnx"
    path.parent.mkdir()
    path.write_text("an older file of that name")
    path.with_name("wrong.onnx.data").write_text("its weights")
    blob = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    before = torch._C._jit_set_onnx_log_enabled
    with pytest.raises(error, match=words) as caught:
        convert(make_network(module()), path, get_references(module(), blob))
    assert caught.type is error and "\n" not in str(caught.value)
    assert torch._C._jit_set_onnx_log_enabled is before
    assert {p.name: p.read_text() for p in path.parent.iterdir()} == {
        "wrong.onnx": "an older file of that name",
        "wrong.onnx.data": "its weights",
    }


def test_a_file_that_disagrees_never_gets_its_name(tmp_path, small, monkeypatch):
    """Neither exporter's; and if only the first one's disagrees, the second one's is taken."""
    path = tmp_path / "models" / "small.onnx"
    blob = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    references = get_references(small, blob)
    right = conversion.export_by_torchscript

    def export_wrong(model, part, shape):
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            wrong[-1].weight *= 1.001
            wrong[-1].bias *= 1.001
        right(wrong, part, shape)

    monkeypatch.setattr(conversion, "export_by_torchscript", export_wrong)
    monkeypatch.setattr(conversion, "export_by_dynamo", export_wrong)
    with pytest.raises(NetworksDisagree, match="relative error 1.0e-03"):
        convert(make_network(small), path, references)
    assert list(path.parent.iterdir()) == []
    monkeypatch.setattr(conversion, "export_by_dynamo", right)
    convert(make_network(small), path, references)
    assert list(path.parent.iterdir()) == [path]


def test_a_conversion_that_succeeds_leaves_no_older_weights(tmp_path, small, capsys):
    """The .data of an older file goes; a file that is no ONNX is replaced."""
    path = tmp_path / "models" / "small.onnx"
    path.parent.mkdir()
    path.write_text("an older file of that name")
    (path.parent / "small.onnx.data").write_text("its weights")
    blob = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    found = convert(make_network(small), path, get_references(small, blob))
    assert list(path.parent.iterdir()) == [path]
    assert (found.path, found.classes) == (path, 1000)
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
    weights = parse_weights("squeezenet1_1", str(tmp_path / "random.pth"))
    stem = get_onnx_path("squeezenet1_1", weights, "models").stem
    assert not stem.endswith("-random") and stem != "squeezenet1_1"
    weights = parse_weights("squeezenet1_1", "RANDOM")
    assert get_onnx_path("squeezenet1_1", weights, "models").stem == "squeezenet1_1-random"


# --- the project's own facts ----------------------------------------------------------------------


def test_standalone_constants_are_the_projects():
    """classification.py travels alone and so has its own copy of three facts."""
    import classification
    import default_preprocess_config as preset
    from test_config import RESULTS_DIR, TestClsModuleConfig

    own = classification.TORCHVISION_PREPROCESSING
    blob = preset.pytorch_resize_input_blob
    assert own.scale == preset.BASE_IMG_SCALE_FACTOR == float(blob["scale"])
    assert own.mean == tuple(float(v) for v in blob["mean"])
    assert own.std == tuple(float(v) for v in blob["std"])
    assert (own.crop, own.rgb) == (blob["crop"] == "True", blob["rgb"] == "True")
    assert (own.width, own.height) == (224, 224)
    assert (own.initial_width, own.initial_height) == (256, 256)
    assert (blob["rsz_width"], blob["rsz_height"]) == ("256", "256")
    assert str(classification.BUNDLED_PICTURE).endswith(TestClsModuleConfig().input_img)
    assert str(classification.BUNDLED_LABELS).endswith(TestClsModuleConfig().classes)
    assert classification.RESULTS_DIR == RESULTS_DIR


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
            assert f"--{field.name} " in text


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


def test_a_network_that_branches_on_its_input_is_refused(run, folder):
    """Tracing keeps one branch: silently wrong for pictures that take the other."""
    (folder / "branches.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        torch.manual_seed(0)\n"
        "        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(),\n"
        "            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5))\n"
        "    def forward(self, x):\n"
        "        y = self.net(x)\n"
        "        return y if float(x[0, 0, 0, 0]) < 1.9 else y.flip(1)\n"
    )
    options = ["--model_name", "branches:Net", "--evaluate", "False", "--mean", "0", "0", "0"]
    result = run("py_to_py_cls.py", *options)
    check_one_line(result, "branches on its input", "branches.py, line 10", "< 1.9")
    assert not list(folder.glob("models/*"))


def test_a_killed_conversion_is_swept(folder):
    """Its folder goes with the next conversion; that of a living process stays."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    (folder / f".net.{platform.node()}.{gone.pid}.abcd").mkdir()
    living = folder / f".net.{platform.node()}.{os.getpid()}.abcd"
    living.mkdir()
    with conversion.folder_beside(folder / "other.onnx") as part:
        assert {p.name for p in folder.iterdir()} == {living.name, part.name}
    assert {p.name for p in folder.iterdir()} == {living.name}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends when its work is done")
def test_the_verifying_child_ends_with_its_parent(tmp_path):
    """The child waits for its blobs; the parent is killed while the pipe stays open."""
    import fcntl
    import termios

    reader, writer = os.pipe()
    os.write(writer, b"x")
    code = "import subprocess, sys, time; "
    code += "print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(600)"
    child = [sys.executable, str(ROOT / "verify.py"), "x.onnx", "new"]
    options = {"stdin": reader, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    with subprocess.Popen([sys.executable, "-c", code, *child], **options) as parent:
        pid = int(parent.stdout.readline())
        unread = b""
        while unread != bytes(4):  # until it reads
            time.sleep(0.05)
            unread = fcntl.ioctl(writer, termios.FIONREAD, bytes(4))
        parent.kill()
    status = Path(f"/proc/{pid}/status")
    deadline = time.monotonic() + 60
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(writer)
