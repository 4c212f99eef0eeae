"""py_to_py_resnet50.py and py_to_py_cls.py: conversion, test mode, evaluation."""

import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import onnx
import pytest
import torch
from conftest import PICTURES, ROOT, check_one_line, read_answer

RED_PANDA = PICTURES / "red_panda.jpg"
LABELLED = [line.split() for line in (PICTURES / "val.txt").read_text().splitlines()]


def test_walk_through_without_network(run, folder):
    """ResNet-50 with random weights, and nobody can miss it."""
    result = run("py_to_py_resnet50.py")
    assert result.returncode == 0, result.stderr
    assert "RANDOM WEIGHTS" in result.stderr
    assert result.stdout.count("* shape:  (1, 1000)") == 2
    assert result.stdout.count("* RANDOM WEIGHTS") == 2
    assert "/conv1/Conv" in result.stdout
    opencv = read_answer(result.stdout, "OpenCV DNN prediction:")
    pytorch = read_answer(result.stdout, "PyTorch prediction:")
    assert opencv[0] == pytorch[0]
    assert opencv[1] == pytest.approx(pytorch[1], abs=2e-4)
    assert "PyTorch and OpenCV agree" in result.stdout.splitlines()[-1]
    written = {p.name for p in (folder / "models").iterdir()}
    assert written == {"resnet50-random.onnx", "models.yml", "imagenet_classes.txt"}


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


def test_test_mode_and_conversion(run, folder, env, weights, torchvision_logits):
    """Cached weights: converted once, again for other weights only; any batch size."""
    cache = folder.parent / "torch_home" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    shutil.copy(weights, cache / "resnet18-f37072fd.pth")
    options = ["--model_name", "ResNet18", "--test", "True"]
    expected = torchvision_logits(RED_PANDA, centre_crop=False)

    first = run("py_to_py_cls.py", *options)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    class_id, confidence = read_answer(first.stdout)
    assert class_id == expected.argmax()
    assert confidence == pytest.approx(expected.max(), abs=1e-4)
    assert first.stdout.count("relative error") == 4
    assert not (folder / "logs").exists()
    picture = cv2.imread(str(folder / "results" / "red_panda_resnet18_classification.jpg"))
    assert picture.shape == cv2.imread(str(RED_PANDA)).shape

    path = folder / "models" / "resnet18.onnx"
    assert {p.name for p in path.parent.iterdir()} == {
        path.name,
        "models.yml",
        "imagenet_classes.txt",
    }
    graph = onnx.load(path).graph
    assert [n.name for n in graph.input] == ["input"]
    assert [n.name for n in graph.output] == ["output"]
    written = path.stat()

    second = run("py_to_py_cls.py", *options)
    assert second.returncode == 0
    assert "converted and verified before" in second.stdout
    assert read_answer(second.stdout) == (class_id, confidence)
    assert path.stat() == written

    net = cv2.dnn.readNetFromONNX(str(path))
    batch = np.random.default_rng(3).standard_normal((5, 3, 224, 224)).astype(np.float32)
    outputs = []
    for size in (1, 5, 3):
        net.setInput(batch[:size])
        outputs.append(net.forward())
    assert [len(output) for output in outputs] == [1, 5, 3]
    assert np.allclose(outputs[1][:3], outputs[2], atol=1e-5)

    state = torch.load(weights)
    state["fc.bias"] += 1
    torch.save(state, folder / "changed.pth")
    third = run("py_to_py_cls.py", *options, "--weights", "changed.pth")
    assert "converted and verified before" not in third.stdout
    assert read_answer(third.stdout)[1] == pytest.approx(confidence + 1, abs=1e-3)


def test_preprocessing_of_test_mode(run, folder, weights, resnet18):
    """--default_img_preprocess False: TestClsModuleConfig; options win over both."""
    options = ["--model_name", "resnet18", "--weights", weights, "--test", "yes"]
    picture = cv2.imread(str(PICTURES / "koala.jpg")).astype(np.float32)

    def expected(rgb):
        with torch.no_grad():
            tensor = torch.from_numpy(rgb.astype(np.float32)).permute(2, 0, 1)[None]
            logits = resnet18(tensor)[0].numpy()
        return logits.argmax(), pytest.approx(logits.max(), rel=1e-4)

    plain = cv2.resize(picture, (224, 224))[:, :, ::-1]
    options += ["--input_img", PICTURES / "koala.jpg"]
    result = run("py_to_py_cls.py", *options, "--default_img_preprocess", "False")
    assert read_answer(result.stdout) == expected(plain.copy())

    resized = cv2.resize(cv2.resize(picture, (256, 256)), (224, 224))[:, :, ::-1]
    result = run("py_to_py_cls.py", *options, "--mean", "0", "0", "0")
    assert read_answer(result.stdout) == expected(resized / 255 / [0.229, 0.224, 0.225])


def test_evaluation_with_nothing_but_the_install(run, folder):
    """No data, no network: the bundled pictures, random weights, and both are said."""
    result = run(
        "py_to_py_cls.py", "--model_name", "squeezenet1_1", "--test", "1", "--evaluate", "1"
    )
    assert result.returncode == 0, result.stderr
    assert "12 bundled pictures" in result.stdout
    assert "RANDOM WEIGHTS" in result.stderr
    assert "RANDOM weights" in (folder / "logs" / "squeezenet1_1-random_log.txt").read_text()
    assert (folder / "results" / "red_panda_squeezenet1_1-random_classification.jpg").is_file()

    # renamed, the answer is marked all the same: the file's metadata say it
    (folder / "models" / "squeezenet1_1-random.onnx").rename(folder / "renamed.onnx")
    result = run("classification.py", "--input", "renamed.onnx", RED_PANDA)
    assert "* RANDOM WEIGHTS" in result.stdout


def test_named_data_is_not_evaluated_with_random_weights(run, folder):
    options = ["--img_root_dir", PICTURES, "--img_cls_file", PICTURES / "val.txt"]
    result = run("py_to_py_cls.py", "--model_name", "resnet18", *options)
    check_one_line(result, "resnet18-f37072fd.pth", "checkpoints", "--weights FILE", "random")
    assert [p for p in folder.rglob("*") if p.is_file()] == []


def test_another_networks_file_is_found_out(run, folder, weights, model):
    """--model with a file of other weights: exit 1, the figures on the last line."""
    state = torch.load(weights)
    state["layer3.0.conv1.weight"] *= 1.001
    torch.save(state, folder / "changed.pth")
    options = ["--model_name", "resnet18", "--weights", "changed.pth", "--model", model]
    result = run("py_to_py_cls.py", *options, "--test", "True")
    check_one_line(result, "doesn't give PyTorch's answer", "relative error", "L1", code=1)


def test_a_file_that_disagrees_never_gets_its_name(folder):
    """An export that is off by a thousandth; an older file of that name goes as well."""
    from common import convert
    from verify import NetworksDisagree

    class Wrong(torch.nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3)) * (1.001 if torch.onnx.is_in_onnx_export() else 1.0)

    path = folder / "models" / "wrong.onnx"
    path.parent.mkdir()
    path.write_text("an older file of that name")
    picture = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    with pytest.raises(NetworksDisagree, match="relative error 1.0e-03"):
        convert(Wrong(), "test", path, picture)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, 0.0, 1.0])
def test_outputs_that_prove_nothing(folder, value):
    from classification import RequestError
    from common import convert

    class Constant(torch.nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3)) * 0 + value

    picture = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    with pytest.raises(RequestError, match="prove nothing"):
        convert(Constant(), "test", folder / "constant.onnx", picture)
    assert list(folder.iterdir()) == []


def test_a_file_called_random_is_not_taken_for_random_weights():
    from classification import RANDOM_SUFFIX
    from common import get_onnx_path

    stem = get_onnx_path("resnet18", "some/random.pth", "models").stem
    assert not stem.endswith(RANDOM_SUFFIX) and stem != "resnet18"


def test_standalone_constants_are_the_projects():
    """classification.py travels alone and so has its own copy of three facts."""
    import classification
    import default_preprocess_config as preset
    from test_config import RESULTS_DIR, TestClsModuleConfig

    own = classification.TORCHVISION_PREPROCESSING
    blob = preset.pytorch_resize_input_blob
    assert own["scale"] == preset.BASE_IMG_SCALE_FACTOR == float(blob["scale"])
    assert own["mean"] == [float(v) for v in blob["mean"]]
    assert own["std"] == [float(v) for v in blob["std"]]
    assert (own["crop"], own["rgb"]) == (blob["crop"] == "True", blob["rgb"] == "True")
    assert (own["initial_width"], own["initial_height"]) == (256, 256)
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
def test_the_command_line_is_read_before_torch_is_imported(folder, env, arguments):
    command = [sys.executable, "-X", "importtime", str(ROOT / "py_to_py_cls.py"), *arguments]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "cv2" in imported
    assert not imported & {"torch", "torchvision", "onnx", "matplotlib"}


def test_every_config_field_is_an_option(run):
    import dataclasses

    from test_config import TestClsConfig, TestClsModuleConfig

    text = run("py_to_py_cls.py", "--help").stdout
    for config in (TestClsConfig, TestClsModuleConfig):
        for field in dataclasses.fields(config):
            assert f"--{field.name} " in text
