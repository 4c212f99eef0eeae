"""py_to_py_resnet50.py and py_to_py_cls.py: conversion, test mode, evaluation."""

import copy
import dataclasses
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from conftest import (
    PICTURES,
    ROOT,
    check_one_line,
    find_result,
    get_output,
    near,
    read_answer,
    read_onnx,
    run_picture,
    run_torch,
    slow,
)
from PIL import Image
from torchvision import models
from torchvision.transforms import Resize

import classification
import conversion
import entries
import py_to_py_resnet50
from classification import RequestError, read_zoo
from common import NetworksDisagree, Preprocessing, read_fields
from conversion import convert
from entries import find_converted, get_onnx_path
from networks import IMAGENET, Network, Request
from py_to_py_cls import get_module_config, get_parser
from test_config import TestClsConfig, TestClsModuleConfig
from verify import EACH_ENGINE, get_references

RED_PANDA = PICTURES / "red_panda.jpg"
NAMES = str(PICTURES / "imagenet_classes.txt")
LABELLED = [line.split() for line in (PICTURES / "val.txt").read_text().splitlines()]
CACHED = "squeezenet1_1-b8a52dc0.pth"  # what torchvision calls its weights


@pytest.fixture
def converted_before(folder, trained):
    """The converted file in the folder's models/, as `--weights trained.pth` leaves it."""
    return folder / "models" / "squeezenet1_1-trained.onnx"


@pytest.fixture
def start_importtime(execute):
    """start_importtime(options): py_to_py_cls.py in a process, and the set of what it imports."""

    def start(*args):
        script = ROOT / "py_to_py_cls.py"
        result = execute(sys.executable, "-X", "importtime", script, *args)
        return result, set(re.findall(r"^import time:.*\| +(\S+)$", result.stderr, re.M))

    return start


# --- the walk-through -----------------------------------------------------------------------------


@pytest.mark.parametrize("real", [False, slow(True)])
def test_walk_through_without_network(run, folder, monkeypatch, real):
    """ResNet-50, or one with a block per stage, with random weights, and nobody can miss it."""
    if not real:
        monkeypatch.setattr(models, "get_model", get_small_resnet)
    result = run("py_to_py_resnet50.py")
    assert "RANDOM WEIGHTS" in result.stderr
    assert result.stdout.count("* shape:  (1, 1000)") == 2
    assert "/conv1/Conv" in result.stdout
    opencv = read_answer(result, "OpenCV DNN prediction:")
    pytorch = read_answer(result, "PyTorch prediction:")
    assert opencv == (pytorch[0], pytest.approx(pytorch[1], abs=2e-4))
    *_, agree, random = result.stdout.splitlines()
    assert "PyTorch and OpenCV agree" in agree
    assert random.startswith("RANDOM WEIGHTS")
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["py_to_py_resnet50-random.onnx"]


def get_small_resnet(name, weights=None, **options):
    """As torchvision answers without a network connection."""
    assert name == "resnet50"
    if weights:
        raise OSError("no network")
    return models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])


def test_walk_through_that_disagrees(run, folder, monkeypatch, small):
    """Exit 1 with the figures; no new file, and the older one stays."""
    network = Network(Request("small", "small.pth"), "small.pth", small, IMAGENET)
    monkeypatch.setattr(py_to_py_resnet50, "load_network", lambda *args: network)
    assert run("py_to_py_resnet50.py").returncode == 0
    path = folder / "models" / "py_to_py_resnet50.onnx"
    written = path.read_bytes()

    right = py_to_py_resnet50.get_opencv_dnn_prediction
    wrong = lambda *args: 1.001 * right(*args)  # noqa: E731
    monkeypatch.setattr(py_to_py_resnet50, "get_opencv_dnn_prediction", wrong)
    words = ("disagree", "relative error 1.0e-03 (limit 1e-04)")
    check_one_line(run("py_to_py_resnet50.py"), *words, code=1)
    assert path.read_bytes() == written
    assert list(path.parent.iterdir()) == [path]
    path.unlink()
    check_one_line(run("py_to_py_resnet50.py"), "disagree", code=1)
    assert [p for p in folder.rglob("*") if p.is_file()] == []


def test_walk_through_reads_like_the_tutorial():
    text = (ROOT / "py_to_py_resnet50.py").read_text()
    steps = "pytorch_onnx_model preprocessed_img imagenet_labels opencv_dnn_prediction "
    steps += "pytorch_dnn_prediction"
    assert re.findall(r"^def get_(\w+)\(", text, re.M)[:5] == steps.split()


def test_a_picture_that_is_missing(start, run, folder):
    """Exit code 2 and one line, before PyTorch is loaded."""
    nope, name = ["--input_img", "nope.jpg"], ["--model_name", "squeezenet1_1"]
    for result in (run("py_to_py_resnet50.py", *nope), start("py_to_py_cls.py", *name, *nope)):
        check_one_line(result, ".py: error: ", "nope.jpg")
        assert "PyTorch" not in result.stdout and list(folder.iterdir()) == []


# --- test mode ------------------------------------------------------------------------------------


def test_test_mode_and_conversion(
    run, start_importtime, folder, put_weights, weights, squeezenet, get_logits, engines_apart
):
    """Cached weights: converted once, and found again without torch; any batch size."""
    put_weights(weights)
    options = ["--model_name", "SqueezeNet1_1", "--test", "True"]

    before = torch._C._jit_set_onnx_log_enabled
    first = run("py_to_py_cls.py", *options)
    assert first.stderr == ""
    assert torch._C._jit_set_onnx_log_enabled is before
    answer = read_answer(first)
    assert answer == near(get_logits(squeezenet, RED_PANDA))
    assert "exporting squeezenet1_1 ..." in first.stdout
    assert f"verifying with OpenCV {cv2.__version__}, limit 1e-04 ..." in first.stdout
    rows = re.findall(r"^(new|classic) engine +(.+)$", first.stdout, re.M)
    rows = {engine: [float(cell) for cell in cells.split()] for engine, cells in rows}
    assert [*rows] == EACH_ENGINE
    for *errors, ms in rows.values():
        assert len(errors) == 4 and ms > 0
        assert all(0 < error < 1e-4 for error in errors)
    fastest = min(rows, key=lambda engine: rows[engine][-1])
    path = folder / "models" / "squeezenet1_1.onnx"
    taking = f"models/squeezenet1_1.onnx: converted and verified; using the {fastest} engine"
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
    assert read_answer(second) == answer
    assert "cv2" in imported and not imported & {"torch", "torchvision", "onnx"}
    assert "converted and verified before" in second.stdout
    assert path.stat() == written

    forward = read_onnx(path)
    batch = np.random.default_rng(3).standard_normal((5, 3, 224, 224)).astype(np.float32)
    reference = run_torch(squeezenet, batch)
    for size in (1, 5, 3):
        assert np.allclose(forward(batch[:size]), reference[:size], atol=1e-4)


def test_nothing_but_the_install(run, start_importtime, folder):
    """No data, no network: the bundled pictures, random weights, and both are said.

    Default weights whose download fails are tried again, but not converted again.
    """
    options = ["--model_name", "squeezenet1_1", "--test", "True"]
    first = run("py_to_py_cls.py", *options, "--evaluate", "True")
    assert "evaluating on the bundled pictures" in get_output(first)
    assert "RANDOM weights\n12 pictures " in first.stdout
    assert "RANDOM WEIGHTS" in first.stderr and "* RANDOM WEIGHTS" in first.stdout
    assert "RANDOM weights" in find_result(folder, "log.txt", "squeezenet1_1-random").read_text()
    assert (folder / "results" / "red_panda_squeezenet1_1-random_classification.jpg").is_file()
    second, imported = start_importtime(*options, "--weights", "Random")
    assert "cv2" in imported and not imported & {"torch", "torchvision", "onnx"}
    third = run("py_to_py_cls.py", *options)
    assert "RANDOM WEIGHTS" in third.stderr
    for result in (second, third):
        assert "converted and verified before" in result.stdout
        assert "* RANDOM WEIGHTS" in result.stdout
        assert read_answer(result) == read_answer(first)


@pytest.mark.parametrize(
    "key, values",
    [
        ("engines", ['["quantum"]', '["new", "quantum"]', "[]", "3", None]),
        ("outputs", [None, '"many"', "-1"]),
        ("load_info", [None, '{ sha1: "0" }']),
        ("made_from", [None, '"a text"', '{ sha256: "0" }', '{ sha256: "0", preprocessing: "x" }']),
    ],
)
def test_damaged_entry(converted_before, weights, monkeypatch, key, values):
    """A file whose entry is damaged isn't taken."""
    monkeypatch.chdir(converted_before.parents[1])
    request = Request("squeezenet1_1", str(weights))
    found = find_converted(request)
    assert found.path == Path("models", converted_before.name) and found.outputs == 1000
    assert sorted(found.engines) == sorted(EACH_ENGINE)
    zoo = converted_before.with_name("models.yml")
    text = zoo.read_text()
    for value in values:
        line = "" if value is None else f"  {key}: {value}\n"
        changed, count = re.subn(f"(?m)^  {key}: .*\n", line, text)
        zoo.write_text(changed)
        assert count == 1 and find_converted(request) is None, value
    zoo.write_text(text)
    assert find_converted(request) is not None


@pytest.mark.parametrize(
    "what", ["torch", "torchvision", "onnx", "opencv", "a script", "weights", "one byte"]
)
def test_any_change_converts_again(converted_before, weights, monkeypatch, tmp_path, folder, what):
    monkeypatch.chdir(folder)
    shutil.copy(weights, folder)
    request = Request("squeezenet1_1", "trained.pth")
    assert find_converted(request) is not None
    if what == "opencv":
        monkeypatch.setattr(cv2, "__version__", "4.0.0")
    elif what == "a script":
        for script in ROOT.glob("*.py"):
            shutil.copy(script, tmp_path)
        monkeypatch.setattr(entries, "SCRIPT_DIR", tmp_path)
        assert find_converted(request) is not None
        (tmp_path / "onnx_rewrites.py").write_text("# changed")
    elif what == "weights":
        (folder / "trained.pth").write_bytes(b"others")
    elif what == "one byte":
        data = bytearray(converted_before.read_bytes())
        data[len(data) // 2] ^= 0x40
        converted_before.write_bytes(data)
    else:
        version = entries.importlib.metadata.version
        changed = lambda name: "0.1" if name == what else version(name)  # noqa: E731
        monkeypatch.setattr(entries.importlib.metadata, "version", changed)
    assert find_converted(request) is None


def test_what_an_entry_depends_on(run, folder, converted_before, weights, monkeypatch, undrawn):
    """A test or a conversion writes what is asked for, without an export; an evaluation doesn't."""
    monkeypatch.setattr(conversion, "export", None)
    options = ["--model_name", "squeezenet1_1", "--weights", weights]
    zoo = converted_before.with_name("models.yml")
    before = zoo.read_text()
    trial = ["--scale", "1", "--mean", "0", "0", "0", "--std", "1", "1", "1"]
    (folder / "val.txt").write_text("koala.jpg 105\nred_panda.jpg 387\n")
    data = ["--img_root_dir", PICTURES, "--img_cls_file", "val.txt", "--engine", "new"]
    assert "top-1 accuracy" in get_output(run("py_to_py_cls.py", *options, *trial, *data))
    assert zoo.read_text() == before
    too_small = ["--preprocess", "tutorial", "--rsz_width", "9", "--rsz_height", "9"]
    for refused in (["--preprocess", "transform", "--frame_size", "200"], too_small):
        assert run("py_to_py_cls.py", *options, *data, *refused).returncode == 2
        assert zoo.read_text() == before

    names = folder / "mine.txt"
    names.write_text("".join(f"name {i}\n" for i in range(1000)))
    result = run("py_to_py_cls.py", *options, *trial, "--test", "True", "--classes", names)
    assert "preprocessing: scale 1.0, mean [0.0, 0.0, 0.0], std [1.0, 1.0, 1.0]" in result.stdout
    assert "label: name " in result.stdout
    trial_entry = zoo.read_text()
    assert trial_entry != before
    again = run("py_to_py_cls.py", *options, *trial, "--test", "True", "--classes", names)
    assert read_answer(again) == read_answer(result) and zoo.read_text() == trial_entry
    # an evaluation leaves both, and the comments and whatever else you have written there
    zoo.write_text(
        before := trial_entry.replace("  rgb: true\n", "  rgb: true\n\n# ?\n  my: [1]\n")
    )
    get_output(run("py_to_py_cls.py", *options, *data))
    assert zoo.read_text() == before and "my: [1]" in before
    # a conversion alone gets what is asked for
    get_output(run("py_to_py_cls.py", *options, "--evaluate", "False"))
    entry = read_zoo(zoo)["squeezenet1_1-trained"]
    assert entry["scale"] == pytest.approx(1 / 255) and "my" not in entry
    assert entry["labels"].endswith("imagenet_classes.txt")
    (zoo.parent / entry["labels"]).unlink()  # as if its number didn't fit: an evaluation mends it
    get_output(run("py_to_py_cls.py", *options, *data))
    assert (zoo.parent / entry["labels"]).is_file()


def test_another_size_is_another_file(run, folder, converted_before, weights):
    options = ["--model_name", "squeezenet1_1", "--weights", weights, "--evaluate", "False"]
    zoo = converted_before.with_name("models.yml")
    get_output(run("py_to_py_cls.py", *options, "--frame_size", "96"))
    assert read_zoo(zoo)["squeezenet1_1-96-trained"]["width"] == 96
    assert read_zoo(zoo)["squeezenet1_1-trained"]["width"] == 224


def test_preprocessing_of_test_mode(run, converted_before, weights, squeezenet):
    """--default_img_preprocess False: TestClsModuleConfig; options win over both."""
    options = ["--model_name", "squeezenet1_1", "--weights", weights, "--test", "yes"]
    options += ["--input_img", PICTURES / "koala.jpg"]
    picture = cv2.imread(str(PICTURES / "koala.jpg")).astype(np.float32)

    def expected(rgb):
        return near(run_picture(squeezenet, rgb), rel=1e-4)

    plain = cv2.resize(picture, (224, 224))[:, :, ::-1]
    off = ["--default_img_preprocess", "False"]
    result = run("py_to_py_cls.py", *options, *off)
    assert read_answer(result) == expected(plain)
    result = run("py_to_py_cls.py", *options, *off, "--scale", "0.25", "--std", "1", "2", "4")
    assert read_answer(result) == expected(plain / 4 / [1, 2, 4])

    resized = Resize((224, 250))(Image.open(PICTURES / "koala.jpg"))
    more = ["--mean", "0", "0", "0", "--resize", "250", "224"]
    result = run("py_to_py_cls.py", *options, *more)
    centre = np.float32(resized)[:, 13:237]
    assert read_answer(result) == expected(centre / 255 / [0.229, 0.224, 0.225])


def test_named_data_is_not_evaluated_with_random_weights(run, folder):
    options = ["--img_root_dir", PICTURES, "--img_cls_file", PICTURES / "val.txt"]
    result = run("py_to_py_cls.py", "--model_name", "squeezenet1_1", *options)
    check_one_line(result, CACHED, "checkpoints", "--weights random")
    assert [p for p in folder.rglob("*") if p.is_file()] == []


# --- conversion -----------------------------------------------------------------------------------


def test_a_file_that_disagrees_never_gets_its_name(tmp_path, small, monkeypatch, capsys):
    """Neither exporter's, with each engine's error; a wrong answer counts more than no file. If the
    second one's is right, it replaces the older file, and that one's weights go."""
    path = tmp_path / "models" / "small.onnx"
    path.parent.mkdir()
    older = {path: "an older file of that name", path.with_name("small.onnx.data"): "its weights"}
    for file, text in older.items():
        file.write_text(text)
    monkeypatch.setattr(conversion, "locate", lambda *_: "Gemm")
    blob = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    network = Network(Request("small"), "small.pth", small, IMAGENET)
    references = get_references(small, blob)
    right, wrong_ones, failing = conversion.export, {False, True}, set()

    def export(model, part, shape, dynamo):
        changed = copy.deepcopy(model)
        if dynamo in failing:
            raise RequestError("no file")
        if dynamo in wrong_ones:
            with torch.no_grad():
                changed[-1].weight *= 1.001
                changed[-1].bias *= 1.001
        return right(changed, part, shape, False)

    monkeypatch.setattr(conversion, "export", export)
    with pytest.raises(NetworksDisagree, match="relative error 1.0e-03"):
        convert(network, references)
    assert {file: file.read_text() for file in path.parent.iterdir()} == older
    wrong = r"^(new|classic) engine +wrong on picture: .*relative error 1.0e-03"
    found = re.findall(wrong, capsys.readouterr().out, re.M)
    assert found == 4 * EACH_ENGINE  # of two exporters, the faster graph and the plain one

    failing.add(False)
    with pytest.raises(NetworksDisagree, match="relative error 1.0e-03"):
        convert(network, references)
    wrong_ones.remove(True)
    converted = convert(network, references)
    assert "small.onnx: converted and verified (replaces an older file);" in capsys.readouterr().out
    assert list(path.parent.iterdir()) == [path]
    assert (converted.path.absolute(), converted.outputs) == (path, 1000)
    assert sorted(converted.engines) == sorted(EACH_ENGINE)
    assert np.allclose(read_onnx(path)(blob), run_torch(small, blob), atol=1e-5)


def test_a_file_called_random_is_not_taken_for_random_weights(tmp_path):
    (tmp_path / "random.pth").write_bytes(b"weights")
    stem = get_onnx_path(Request("squeezenet1_1", str(tmp_path / "random.pth"))).stem
    assert not stem.endswith("-random") and stem != "squeezenet1_1"
    assert get_onnx_path(Request("squeezenet1_1", "RANDOM")).stem == "squeezenet1_1-random"
    small = Request("squeezenet1_1", "RANDOM", width=96, height=64)
    assert get_onnx_path(small).stem == "squeezenet1_1-96-64-random"
    one_side = [Request("a", width=w, height=h) for w, h in ((96, 96), (96, None), (None, 96))]
    assert [get_onnx_path(request).stem for request in one_side] == ["a-96", "a-96-own", "a-own-96"]


# --- the project's own facts ----------------------------------------------------------------------


def test_standalone_constants_are_the_projects():
    """classification.py travels alone and so has its own copy of two facts."""
    own = Preprocessing(**read_fields(classification.TORCHVISION))
    assert own == IMAGENET
    assert own.scale == 1 / 255 and own.mean == (123.675, 116.28, 103.53)
    assert str(classification.BUNDLED_PICTURE).endswith(TestClsModuleConfig().input_img)


def test_bundled_data():
    labels = (PICTURES / "imagenet_classes.txt").read_text().splitlines()
    assert len(labels) == 1000
    assert labels[335] == "fox squirrel, eastern fox squirrel, Sciurus niger"
    categories = models.ResNet50_Weights.DEFAULT.meta["categories"]
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
    text = run("py_to_py_cls.py", "--help").stdout
    for config in (TestClsConfig, TestClsModuleConfig):
        for field in dataclasses.fields(config):
            assert (f"--{field.name} " in text) == (field.name != "model")


@pytest.mark.parametrize(
    "options, picture, classes",
    [
        ("", str(RED_PANDA), NAMES),
        ("--cls_test_data_dir mine", "mine/red_panda.jpg", "mine/imagenet_classes.txt"),
        ("--cls_test_data_dir mine --input_img cat.jpg", "cat.jpg", "mine/imagenet_classes.txt"),
        # named by the user: not the one beside the scripts
        ("--input_img test_data/cls/red_panda.jpg", "test_data/cls/red_panda.jpg", NAMES),
    ],
)
def test_where_test_mode_finds_its_files(options, picture, classes):
    args = get_parser().parse_args(["--model_name", "resnet50", *options.split()])
    config = get_module_config(args)
    assert (config.input_img, config.classes) == (picture, classes)
    assert config.test_module_path == str(ROOT / "classification.py")
