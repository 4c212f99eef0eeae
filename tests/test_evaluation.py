"""The evaluation: its table and figures, what it does with odd data, and that nothing is lost."""

import csv
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import PICTURES, ROOT, check_one_line
from filelock import FileLock

LABELLED = [line.split() for line in (PICTURES / "val.txt").read_text().splitlines()]
IMAGENETS = (PICTURES / "imagenet_classes.txt").read_text().splitlines()
CLS = str(ROOT / "py_to_py_cls.py")
NAME = "squeezenet1_1-trained"
RESULTS = ["log.txt", "pictures.csv", "summary.json", "time.png", "wrong.png"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Forty small photographs in four class folders, and the same with a label file."""
    root = tmp_path_factory.mktemp("data")
    lines = []
    for number in range(40):
        picture = cv2.imread(str(PICTURES / LABELLED[number % 12][0]))
        x = 10 * (number // 12)
        small = cv2.resize(picture[x : x + 200, x : x + 230], (120, 90))
        name = f"class{number % 4}/picture{number:02}.jpg"
        (root / "folders" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / "folders" / name), small)
        lines.append(f"{name} {number % 4}\n")
    (root / "labels.txt").write_text("".join(sorted(lines)))
    return root


@pytest.fixture
def trained(folder, weights, converted):
    """The options for a network that is converted already."""
    shutil.copytree(converted, folder / "models")
    return ["--model_name", "squeezenet1_1", "--weights", str(weights)]


@pytest.fixture
def command(data, trained):
    """An evaluation in ten batches, on one engine, without a conversion.

    From the class folders, while `whole` is from the label file: so each test that compares the
    two shows as well that the lines of --classes say which class a folder is.
    """
    return [sys.executable, CLS, *trained, *get_options(data)]


def get_options(data):
    names = data / "classes.txt"
    names.write_text("".join(f"class{number} of many\n" for number in range(1000)))
    options = ["--img_root_dir", data / "folders", "--classes", names]
    return [*map(str, options), "--batch_size", "4", "--engine", "new"]


def read_table(folder, name=f"{NAME}_new"):
    """The rows of the table, without the times."""
    with open(folder / "logs" / f"{name}_pictures.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["pytorch_ms"], row["opencv_ms"], row["warm_up"]
    return rows


def read_figures(folder, name=f"{NAME}_new"):
    """The figures and rows that must not depend on how the run went."""
    summary = json.loads((folder / "logs" / f"{name}_summary.json").read_text())
    for network in summary.values():
        if isinstance(network, dict) and "ms_mean" in network:
            for time_ in ("ms_mean", "ms_median", "ms_p95"):
                assert network.pop(time_) > 0
    about = ("seconds", "processes", "threads")
    about += ("pictures_root", "pictures_sha256")  # of a worker's own copy
    return {k: v for k, v in summary.items() if k not in about} | {"rows": read_table(folder, name)}


@pytest.fixture(scope="session")
def whole(tmp_path_factory, data, weights, converted):
    """Figures of a run that was never stopped, from the label file; made by one worker for all."""
    folder = tmp_path_factory.getbasetemp().parent / "whole"
    with FileLock(f"{folder}.lock"):
        if not (folder / "logs" / f"{NAME}_new_summary.json").exists():
            folder.mkdir(exist_ok=True)
            shutil.copytree(converted, folder / "models")
            options = ["--model_name", "squeezenet1_1", "--weights", str(weights)]
            options += [*get_options(data), "--img_cls_file", str(data / "labels.txt")]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, CLS, *options], cwd=folder, check=True, env=env)
    found = sorted(p.name for p in (folder / "logs").iterdir())
    assert found == [f"{NAME}_new_{end}" for end in RESULTS]
    return read_figures(folder)


GREY = """
import torch
from torch import nn


def build():
    \"\"\"The k that is nearest to x + 1/4, for a picture of the value x: no ties.\"\"\"
    head = nn.Linear(3, CLASSES)
    k = torch.arange(CLASSES)
    with torch.no_grad():
        head.weight[:] = 0
        head.weight[:, 1] = 2.0 * k
        head.bias[:] = 0.5 * k - k**2
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def build_binary():
    \"\"\"A single logit, x - 4.5.\"\"\"
    head = nn.Linear(3, 1)
    with torch.no_grad():
        head.weight[:] = torch.tensor([0.0, 1.0, 0.0])
        head.bias[:] = -4.5
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
"""


@pytest.fixture
def grey(run, folder):
    """grey(pictures, *options): evaluates a network that names the grey value of a picture.

    pictures: [(name, value, label)]; value None: not a picture. So all figures are known.
    """

    def grey(pictures, *options, function="build", classes=10):
        (folder / "grey.py").write_text(GREY.replace("CLASSES", str(classes)))
        (folder / "set").mkdir(exist_ok=True)
        for name, value, _ in pictures:
            path = folder / "set" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"broken")
            if value is not None:
                picture = np.full((40, 40, 3), value, np.uint8)
                path.write_bytes(cv2.imencode(".png", picture)[1].tobytes())
        if "--img_root_dir" not in options:
            lines = [f"{name} {label}\n" for name, _, label in pictures]
            (folder / "val.txt").write_text("".join(lines))
            options += ("--img_root_dir", "set", "--img_cls_file", "val.txt")
        preprocessing = ["--scale", 1, "--mean", 0, 0, 0, "--std", 1, 1, 1]
        return run("py_to_py_cls.py", "--model_name", f"grey:{function}", *preprocessing, *options)

    return grey


def read_summary(folder, name="grey-build"):
    return json.loads((folder / "logs" / f"{name}_summary.json").read_text())


# --- the table and the figures --------------------------------------------------------------------


def test_figures_known_beforehand(grey, folder):
    """Accuracy, ranks, confusions. The class nearest to the value + 1/4 is first, and so on."""
    # the picture's value, its label, and the label's rank: for 2, the order is 2, 3, 1, 4, 0
    values = [(3, 3, 1), (4, 4, 1), (2, 0, 5), (2, 0, 5), (9, 2, 8), (5, 6, 2), (1, 1, 1)]
    pictures = [(f"{i:02}.png", value, label) for i, (value, label, _) in enumerate(values)]
    result = grey(pictures, "--batch_size", 3)
    assert result.returncode == 0, result.stderr
    rows = read_table(folder, "grey-build")
    assert [row["pytorch_class"] for row in rows] == [str(value) for value, _, _ in values]
    assert [row["opencv_class"] for row in rows] == [str(value) for value, _, _ in values]
    for row, (_, _, rank) in zip(rows, values, strict=True):
        assert row["pytorch_rank"] == row["opencv_rank"] == str(rank)
    assert [row["batch"] for row in rows] == list("0001112")
    summary = read_summary(folder)
    for network in ("PyTorch", f"OpenCV {cv2.__version__}"):
        assert summary[network]["top1"] == pytest.approx(100 * 3 / 7)
        assert summary[network]["top5"] == pytest.approx(100 * 6 / 7)
    assert summary["confused"] == [[0, 2, 2], [2, 9, 1], [6, 5, 1]]
    assert "* class 0 -> class 2: 2\n* class 2 -> class 9: 1\n" in result.stdout
    assert "ms per picture, 95th percentile of batches" in result.stdout  # not of pictures

    # the question that a table answers in one line, and the log's lines, which are cumulative
    wrong = Counter((r["label"], r["pytorch_class"]) for r in rows if r["pytorch_rank"] != "1")
    assert wrong.most_common(1) == [(("0", "2"), 2)]
    log = (folder / "logs" / "grey-build_log.txt").read_text()
    found = re.findall(r"^(\d) Accuracy for PyTorch: top-1 (\S+), top-5 (\S+)$", log, re.M)
    assert found == [("3", "66.67", "100.00"), ("6", "33.33", "83.33"), ("7", "42.86", "85.71")]


def test_probability_and_differences(grey, folder):
    """Of each picture, against the same in float64 here."""
    grey([("a.png", 3, 3), ("b.png", 7, 1)], "--batch_size", 1)
    for row, value in zip(read_table(folder, "grey-build"), (3, 7), strict=True):
        k = np.arange(10.0)
        logits = 2 * k * (value + 0.25) - k**2
        probability = np.exp(logits.max()) / np.exp(logits).sum()
        assert float(row["pytorch_probability"]) == pytest.approx(probability, rel=1e-4)
        assert float(row["opencv_probability"]) == pytest.approx(probability, rel=1e-4)
        assert float(row["peak"]) == pytest.approx(np.abs(logits).max(), rel=1e-5)
        assert 0 <= float(row["l1"]) <= float(row["l_inf"]) < 1e-3


def test_contact_sheet(grey, folder):
    """The wrong pictures; an older sheet goes when nothing is wrong any more."""
    pictures = [(f"{i}.png", 18 * i, 9) for i in range(14)]
    result = grey(pictures, classes=300)
    sheet = folder / "logs" / "grey-build_wrong.png"
    assert f"wrong pictures: logs/{sheet.name}" in result.stdout
    drawn = cv2.imread(str(sheet))
    assert drawn.shape[0] > 900 and drawn.shape[1] > 1000
    grey([(name, value, value) for name, value, _ in pictures], classes=300)
    assert not sheet.exists()


def test_odd_names(grey, folder):
    """A newline, a comma, a quote, a backslash: the table gives the names back."""
    for number, name in enumerate(["new\nline.png", 'a "b", c.png', "back\\slash.png", "é.png"]):
        path = folder / "set" / str(number) / name
        path.parent.mkdir(parents=True)
        cv2.imwrite(str(folder / "x.png"), np.full((40, 40, 3), number, np.uint8))
        shutil.move(folder / "x.png", path)
    result = grey([], "--img_root_dir", "set", "--batch_size", 2)
    assert result.returncode == 0, result.stderr
    rows = read_table(folder, "grey-build")
    assert [row["picture"] for row in rows] == [
        "0/new\nline.png",
        '1/a "b", c.png',
        "2/back\\slash.png",
        "3/é.png",
    ]
    assert [row["pytorch_rank"] for row in rows] == ["1"] * 4


def test_evaluation_is_right(run, folder, weights, squeezenet, get_logits):
    """Accuracy against labels chosen so that it is neither 0 nor 100, counted here by itself."""
    lines, top1, top5 = [], 0, 0
    for number, (name, _) in enumerate(LABELLED):
        order = np.argsort(-get_logits(squeezenet, PICTURES / name, centre_crop=True))
        rank = (0, 3, 7)[number % 3]
        top1, top5 = top1 + (rank < 1), top5 + (rank < 5)
        lines.append(f"{name} {order[rank]}\n")
    (folder / "labels.txt").write_text("".join(lines))
    shutil.copy(weights, folder / "own.pth")
    options = ["--model_name", "squeezenet1_1", "--weights", "own.pth", "--batch_size", "5"]
    options += ["--img_root_dir", PICTURES, "--img_cls_file", "labels.txt"]
    result = run("py_to_py_cls.py", *options)
    assert result.returncode == 0, result.stderr
    log = (folder / "logs" / "squeezenet1_1-own_log.txt").read_text()
    for k, right in ((1, top1), (5, top5)):
        figure = f" +{100 * right / 12:.2f}"
        for text in (result.stdout, log):
            assert len(re.findall(rf"^top-{k} accuracy, % of 12{figure}{figure}$", text, re.M)) == 1
    assert "same class 12 of 12" in result.stdout
    l1, l_inf = map(float, re.findall(r"L1 (\S+), L_inf (\S+),", log)[-1])
    assert 0 < l1 <= l_inf < 1e-3
    chart = cv2.imread(str(folder / "logs" / "squeezenet1_1-own_time.png"))
    assert chart.shape[0] > 400 and chart.std() > 10
    summary = json.loads((folder / "logs" / "squeezenet1_1-own_summary.json").read_text())
    for network in ("PyTorch", f"OpenCV {cv2.__version__}"):
        assert summary[network]["top1"] == 100 * top1 / 12
        assert summary[network]["ms_median"] <= summary[network]["ms_p95"]
    sha1 = hashlib.sha1((folder / "models" / "squeezenet1_1-own.onnx").read_bytes()).hexdigest()
    assert summary["onnx"] == {"sha1": sha1}


def test_evaluation_blob_is_torchvisions():
    """The true centre crop: torchvision's own transforms on the same resized picture."""
    from torchvision.transforms import v2

    from common import Preprocessing
    from evaluation import get_centre_blob

    path = PICTURES / "koala.jpg"
    rgb = cv2.resize(cv2.imread(str(path))[:, :, ::-1].astype(np.float32), (256, 256)) / 255
    transforms = v2.Compose(
        [v2.CenterCrop(224), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    expected = transforms(torch.from_numpy(rgb).permute(2, 0, 1))[None].numpy()
    mean, std = (123.675, 116.28, 103.53), (0.229, 0.224, 0.225)
    preprocessing = Preprocessing(1 / 255, mean, std, True, True, 224, 224, 256, 256)
    blob = get_centre_blob(cv2.imread(str(path)), preprocessing)
    assert blob.dtype == np.float32
    assert np.abs(blob - expected).max() < 1e-5


def test_preprocess_of_the_weights():
    """--preprocess torchvision: what torchvision makes of the picture that PIL reads."""
    from PIL import Image
    from torchvision import models

    from evaluation import get_torchvision_blob

    transforms = models.ResNet50_Weights.IMAGENET1K_V2.transforms()
    path = PICTURES / "koala.jpg"
    expected = transforms(Image.open(path))[None].numpy()
    blob = get_torchvision_blob(cv2.imread(str(path)), transforms)
    assert blob.shape == (1, 3, 224, 224)
    assert np.abs(blob - expected).mean() < 0.02


# --- odd requests and data ------------------------------------------------------------------------


def get_pictures(folder, names, config=None, named_labels=False, class_names=None):
    """evaluation.get_data of a folder of empty files."""
    from labelled_pictures import get_data
    from test_config import TestClsConfig

    for name in names:
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "set" / name).touch()
    config = TestClsConfig(img_root_dir=str(folder / "set"), **(config or {}))
    given = SimpleNamespace(
        img_root_dir=config.img_root_dir,
        img_cls_file=config.img_cls_file if named_labels else None,
        classes="names.txt" if class_names else None,
    )
    return get_data(config, given, class_names or IMAGENETS)


def check(data, outputs=1000, preprocess="tutorial", network=None, preprocessing=None, **given):
    """evaluation.check_evaluation for a torchvision network of `outputs` logits."""
    from torchvision import models

    from evaluation import check_evaluation
    from networks import read_transforms

    transforms = models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    own = preprocessing or read_transforms(transforms)
    network = network or SimpleNamespace(transforms=transforms, preprocessing=own)
    args = SimpleNamespace(preprocess=preprocess, classes=None, bgr_to_rgb=None)
    vars(args).update(given)
    check_evaluation(network, data, outputs, args)


def test_class_folders_named_by_numbers(folder):
    data = get_pictures(folder, ["1/a.jpg", "105/b.jpg", "387/c.jpg"])
    assert data.pictures == [("1/a.jpg", 1), ("105/b.jpg", 105), ("387/c.jpg", 387)]
    check(data)


@pytest.mark.parametrize("lines", ["n2 koala\nn0 cat, tom\nn1 dog\n", "n2\nn0\nn1\n"])
def test_class_folders_named_by_lines_of_classes(folder, capsys, lines):
    names = lines.splitlines()
    data = get_pictures(folder, ["n0/a.jpg", "n2/b.jpg"], class_names=names)
    assert data.pictures == [("n0/a.jpg", 1), ("n2/b.jpg", 0)]
    assert "2 pictures in 2 classes: folder n0 is class 1, ..., folder n2 is class 0" in (
        capsys.readouterr().out
    )
    check(data)


@pytest.mark.parametrize("names", [None, ["n0", "other"], ["n0", "n1", "n0"]])
def test_other_class_folders_are_all_classes_or_refused(folder, names):
    """Not among --classes, or ambiguous: in sorted order, if there is one for each output."""
    from classification import RequestError

    data = get_pictures(folder, ["n0/a.jpg", "n1/b.jpg"], class_names=names)
    assert data.pictures == [("n0/a.jpg", 0), ("n1/b.jpg", 1)]
    assert data.names == (names or ["n0", "n1"])
    check(data, outputs=2)
    with pytest.raises(RequestError, match="2 class folders for 1000 .* IDs .*--classes.*each"):
        check(data)


def test_class_folders_that_are_called_like_imagenets_classes(folder):
    """Without --classes nobody says that the network's classes are ImageNet's."""
    assert {"bison", "fig"} < {*IMAGENETS}
    data = get_pictures(folder, ["bison/a.jpg", "fig/b.jpg"])
    assert data.pictures == [("bison/a.jpg", 0), ("fig/b.jpg", 1)]


def test_class_folders_with_links_and_hidden_folders(folder, capsys):
    """A hidden folder isn't a class, a link isn't followed, and a stray picture has no class."""
    (folder / "set" / "a").mkdir(parents=True)
    (folder / "set" / "b").mkdir()
    os.symlink("..", folder / "set" / "a" / "loop")
    os.symlink("../a", folder / "set" / "b" / "again")
    names = [".cache/x.jpg", "a/1.jpg", "a/deep/2.jpg", "a/.cache/y.jpg", "b/3.JPG", "stray.jpg"]
    data = get_pictures(folder, names)
    assert data.pictures == [("a/1.jpg", 0), ("a/deep/2.jpg", 0), ("b/3.JPG", 1)]
    assert "3 pictures in 2 classes" in capsys.readouterr().out


def test_bundled_pictures_of_another_network(run, folder):
    """Refused before anything is exported."""
    (folder / "grey.py").write_text(GREY.replace("CLASSES", "10"))
    result = run("py_to_py_cls.py", "--model_name", "grey:build", "--scale", 1)
    check_one_line(result, "ImageNet's 1000", "has 10", "--img_root_dir", "--evaluate False")
    assert "exporting" not in result.stdout and not (folder / "models").exists()


def test_class_ids_out_of_range(folder):
    from classification import RequestError

    data = get_pictures(folder, ["1/a.jpg", "10/b.jpg"])
    check(data, outputs=11)
    with pytest.raises(RequestError, match="10/b.jpg has class ID 10, .* 0 to 9"):
        check(data, outputs=10)


def test_one_output_is_binary(grey, folder):
    """Its answer is 1 if the logit is above 0; the probability is the sigmoid's."""
    pictures = [("a.png", 3, 0), ("b.png", 6, 1), ("c.png", 4, 1), ("d.png", 9, 1)]
    result = grey(pictures, function="build_binary")
    assert result.returncode == 0, result.stderr
    rows = read_table(folder, "grey-build_binary")
    assert [row["pytorch_class"] for row in rows] == list("0101")
    assert [row["opencv_rank"] for row in rows] == list("1121")
    for row, logit in zip(rows, (-1.5, 1.5, -0.5, 4.5), strict=True):
        sigmoid = 1 / (1 + np.exp(-abs(logit)))
        assert float(row["pytorch_probability"]) == pytest.approx(sigmoid, rel=1e-4)
    assert read_summary(folder, "grey-build_binary")["PyTorch"]["top1"] == 75


def test_repeated_and_conflicting_labels(folder, capsys):
    from classification import RequestError

    labels = folder / "val.txt"
    config = {"img_cls_file": str(labels)}
    labels.write_text("a.jpg 3\nb.jpg 4\n\n./a.jpg 3\n")
    data = get_pictures(folder, ["a.jpg", "b.jpg"], config, named_labels=True)
    assert data.pictures == [("a.jpg", 3), ("b.jpg", 4)]
    assert "1 lines repeat others" in capsys.readouterr().out
    labels.write_text("a.jpg 3\nb.jpg 4\n\n./a.jpg 5\n")
    with pytest.raises(RequestError, match="a.jpg is class 3 in line 1, and 5 in line 4"):
        get_pictures(folder, [], config, named_labels=True)


@pytest.mark.parametrize(
    "lines, missing",
    [
        ("# 5\na.jpg 1\n", "#"),
        ('"a.jpg" 1\n', '"a.jpg"'),
        ("  a.jpg 1\n", "a.jpg"),
        ("a.jpg 1\nb.jpg 1\n", "b.jpg"),
    ],
)
def test_pictures_that_do_not_exist(start, folder, lines, missing):
    """Refused before torch is imported, which says so."""
    (folder / "a.jpg").touch()
    (folder / "val.txt").write_text(lines)
    result = start("py_to_py_cls.py", "--model_name", "squeezenet1_1", "--img_root_dir", ".")
    check_one_line(result, "val.txt", "don't exist", f": {missing}; ")
    assert "PyTorch" not in result.stdout


def test_a_few_pictures_that_do_not_exist(folder):
    labels = folder / "val.txt"
    labels.write_text("".join(f"{i}.jpg 1\n" for i in range(100)))
    config = {"img_cls_file": str(labels)}
    data = get_pictures(folder, [f"{i}.jpg" for i in range(99)], config, named_labels=True)
    assert len(data.pictures) == 100


def test_options_that_contradict_the_transforms(folder):
    """--preprocess torchvision takes options that say what it does anyhow, and no others."""
    from dataclasses import replace

    from torchvision import models

    from classification import RequestError
    from networks import read_transforms

    data = get_pictures(folder, ["1/a.jpg"])
    own = read_transforms(models.ResNet50_Weights.IMAGENET1K_V1.transforms())
    check(data, preprocess="torchvision", preprocessing=replace(own, scale=0.00392157))
    check(data, preprocess="torchvision", bgr_to_rgb=True)
    changes = [{"scale": 1.0}, {"mean": (0.0, 0.0, 0.0)}, {"std": (1.0, 1.0, 1.0)}]
    changes += [{"initial_width": 300}, {"width": 192, "height": 192}]
    for change in changes:
        with pytest.raises(RequestError, match="224 pixels, in RGB"):
            check(data, preprocess="torchvision", preprocessing=replace(own, **change))
    with pytest.raises(RequestError, match="in RGB"):
        check(data, preprocess="torchvision", bgr_to_rgb=False)
    network = SimpleNamespace(transforms=None, preprocessing=own)
    with pytest.raises(RequestError, match="torchvision's networks"):
        check(data, preprocess="torchvision", network=network)
    with pytest.raises(RequestError, match="--rsz_width"):
        check(data, preprocessing=replace(own, initial_width=200))


def test_order_of_the_channels(grey, folder):
    """--bgr_to_rgb False is said, and is part of the name of the results."""
    result = grey([("a.png", 3, 3)], "--bgr_to_rgb", "False")
    assert result.returncode == 0, result.stderr
    assert "channels in the order BGR" in result.stdout
    assert (folder / "logs" / "grey-build_BGR_pictures.csv").exists()
    assert "channels in the order RGB" in grey([("a.png", 3, 3)]).stdout


def test_pictures_that_cannot_be_read(grey, folder):
    """Skipped, counted and all in the table; ten are printed, before the figures of the others."""
    pictures = [(f"{i:02}.png", None if 5 <= i < 17 else 3, 3) for i in range(20)]
    result = grey(pictures, "--batch_size", 4)
    check_one_line(result, "12 of 20 pictures", code=1)
    log = (folder / "logs" / "grey-build_log.txt").read_text()
    for text in (result.stdout, log):
        assert "skipped: 12 pictures" in text
        assert text.count("truncated, or not a picture") == 10
        assert text.rindex("truncated") < text.index("8 of 20 pictures")
    rows = read_table(folder, "grey-build")
    assert len(rows) == 20 and sum(bool(row["skipped"]) for row in rows) == 12
    assert rows[5]["pytorch_class"] == rows[5]["l1"] == ""
    summary = read_summary(folder)
    assert summary["read"] == 8 and summary["PyTorch"]["top1"] == 100
    check_one_line(grey([("a.png", None, 3)]), "none of the 1 pictures can be read")


def test_odd_pictures(run, folder, trained):
    """Grey, CMYK, alpha, 16 bits, turned by EXIF, one pixel high."""
    from PIL import Image

    colour = Image.open(PICTURES / "koala.jpg").resize((300, 400))
    colour.save(folder / "plain.png")
    colour.convert("L").save(folder / "grey.jpg")
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    colour.convert("RGBA").save(folder / "alpha.png")
    deep = cv2.imread(str(folder / "plain.png")).astype(np.uint16) * 257
    cv2.imwrite(str(folder / "deep.png"), deep)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    colour.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif, quality=100)
    Image.new("RGB", (500, 1), (90, 120, 30)).save(folder / "flat.png")

    from classification import read_picture

    plain = read_picture(folder / "plain.png").astype(int)
    for name in ("alpha.png", "deep.png", "turned.jpg"):
        assert np.abs(read_picture(folder / name) - plain).mean() < 2, name

    names = sorted(p.name for p in folder.glob("*.*g"))
    assert len(names) == 7
    (folder / "val.txt").write_text("".join(f"{name} 1\n" for name in names))
    result = run("py_to_py_cls.py", *trained, "--img_root_dir", ".", "--img_cls_file", "val.txt")
    assert result.returncode == 0, result.stderr
    assert "same class 7 of 7" in result.stdout


# --- nothing lost ---------------------------------------------------------------------------------


def start(command, folder, env, **options):
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def find_running(folder):
    return sorted(folder.glob(f"logs/{NAME}_new_{'[0-9a-f]' * 12}"))


def count_batches(folder):
    return sum(len(list(running.glob("*.json"))) for running in find_running(folder))


def stop_after(process, folder, batches, signum):
    while count_batches(folder) < batches and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signum)
    return process.communicate(timeout=60)


@pytest.mark.slow
def test_killed_at_several_points(folder, env, command, whole):
    """SIGKILL twice, and a batch that was damaged: as if unbroken."""
    stop_after(start(command, folder, env), folder, 2, signal.SIGKILL)
    first = count_batches(folder)
    stop_after(start(command, folder, env), folder, first + 2, signal.SIGKILL)
    assert 4 <= count_batches(folder) < 10
    assert not (folder / "logs" / f"{NAME}_new_summary.json").exists()
    (running,) = find_running(folder)
    done = count_batches(folder)
    damaged = next(running.glob("1-*.json"))
    damaged.write_text(damaged.read_text().replace("0.", "1.", 1))
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"resuming after {4 * (done - 1)} of 40 pictures" in result.stdout
    assert read_figures(folder) == whole
    assert not find_running(folder)


def test_ctrl_c(folder, env, command, whole):
    """The results so far, under a name of their own: they don't replace a whole run's."""
    finished = folder / "logs" / f"{NAME}_new_log.txt"
    finished.parent.mkdir()
    finished.write_text("finished before")
    process = start(command, folder, env)
    stdout, stderr = stop_after(process, folder, 2, signal.SIGINT)
    assert process.returncode == 130
    assert stderr.splitlines() == ["py_to_py_cls.py: stopped by Ctrl-C"]
    assert "PARTIAL" in stdout
    assert "PARTIAL" in (folder / "logs" / f"{NAME}_new_partial_log.txt").read_text()
    rows = read_table(folder, f"{NAME}_new_partial")
    assert rows == whole["rows"][: len(rows)] and 0 < len(rows) < 40
    assert read_figures(folder, f"{NAME}_new_partial")["partial"]
    assert finished.read_text() == "finished before"


@pytest.mark.slow
def test_other_settings_take_nothing_over(folder, env, command):
    """What was stopped with others is left alone, and the user is told."""
    stop_after(start(command, folder, env), folder, 2, signal.SIGKILL)
    (running,) = find_running(folder)
    other = [*command, "--batch_size", "20"]
    result = subprocess.run(other, cwd=folder, env=env, capture_output=True, text=True)
    assert "resuming" not in result.stdout
    assert f"{running.relative_to(folder)}: stopped with other pictures" in result.stdout
    assert find_running(folder) == [running]
    anew = [*command, "--resume", "False"]
    result = subprocess.run(anew, cwd=folder, env=env, capture_output=True, text=True)
    assert "resuming" not in result.stdout
    assert not find_running(folder)


def test_batches_that_are_damaged(folder):
    """Cut, changed, or with zeros, as after a power failure: they don't count."""
    from evaluation import Row, read_batches, write_batch

    rows = [Row(i, f"{i}.jpg", 1, l1=i / 7, batch=i // 2, warm_up=False) for i in range(6)]
    rows[5] = rows[5]._replace(picture='new\nline, "x"\udcff', l1=float("nan"), skipped="é")
    batches = {number: rows[2 * number : 2 * number + 2] for number in (2, 0, 1)}
    for batch in batches.values():
        write_batch(folder / "running", batch)
    assert repr(read_batches(folder / "running")) == repr(dict(sorted(batches.items())))
    del batches[1]
    (path,) = (folder / "running").glob("1-*.json")
    whole = path.read_bytes()
    for damaged in (
        whole.replace(b"2.jpg", b"9.jpg"),
        whole.replace(b"2.jpg", b"\0\0\0\0\0"),
        whole.replace(b"2.jpg", b"\xff\n.jpg"),
        whole[:-9],
        b"",
    ):
        path.write_bytes(damaged)
        assert repr(read_batches(folder / "running")) == repr(dict(sorted(batches.items())))


def test_the_key_of_an_evaluation(folder):
    """Changed pictures of the same names and sizes are others, and so is another last digit."""
    from dataclasses import replace

    from evaluation import get_key
    from labelled_pictures import Data
    from networks import Request, read_own_preprocessing

    shutil.copy(PICTURES / "koala.jpg", folder)
    network = SimpleNamespace(request=Request("a"), weights="own")
    converted = SimpleNamespace(made_from="1", load_info={}, engines=["new"])
    config = SimpleNamespace(batch_size=5)
    args = SimpleNamespace(preprocess="tutorial", engine="auto")
    own, _ = read_own_preprocessing("a", None)

    def key(label=105, preprocessing=own):
        data = Data([("koala.jpg", label)], str(folder), [])
        return get_key(network, converted, preprocessing, data, config, args)

    before = key()
    assert key() == before
    assert key(label=106) != before
    assert key(preprocessing=replace(own, scale=0.00392157)) != before
    status = os.stat(folder / "koala.jpg")
    # another picture of the same size, and its times set back
    (folder / "koala.jpg").write_bytes(bytes(status.st_size))
    os.utime(folder / "koala.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert key() != before


@pytest.mark.slow
def test_full_disk(folder, env, command, whole):
    """A limit on the size of a file stands in for it: one line, and the state so far intact."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # noqa: E731
    process = start(command, folder, env, preexec_fn=limit)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert len(stderr.splitlines()) == 1 and "can't be written" in stderr
    assert count_batches(folder) >= 1
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert "resuming after" in result.stdout
    assert read_figures(folder) == whole


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def test_two_processes_give_the_figures_of_one(folder, env, command, whole):
    torchrun = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *command[1:]]
    result = subprocess.run(torchrun, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("same class 40 of 40") == 1
    assert read_figures(folder) == whole
    assert sorted(p.name for p in (folder / "logs").iterdir()) == [
        f"{NAME}_new_{e}" for e in RESULTS
    ]


@pytest.mark.slow
def test_two_machines_give_the_figures_of_one(folder, env, command, whole, free_port):
    """Two agents, as they are started on two machines, each in a folder of its own."""
    agents = []
    for rank in range(2):
        shutil.copytree(folder / "models", folder / f"machine{rank}" / "models")
        torchrun = [*TORCHRUN, "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
        torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(free_port), *command[1:]]
        agents.append(start(torchrun, folder / f"machine{rank}", env))
    for agent in agents:
        _, stderr = agent.communicate(timeout=300)
        assert agent.returncode == 0, stderr
    assert read_figures(folder / "machine0") == whole
    assert not list((folder / "machine1").glob("logs/*.json"))


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run(folder, env, command, whole):
    """With an error, no hang; and one process continues from what both have done."""
    agent = start([*TORCHRUN, "--standalone", "--nproc-per-node", "2", *command[1:]], folder, env)
    while count_batches(folder) < 2 and agent.poll() is None:
        time.sleep(0.005)
    ranks = subprocess.run(
        ["pgrep", "-P", str(agent.pid), "-f", "py_to_py_cls"], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    agent.communicate(timeout=120)
    assert agent.returncode != 0
    assert not (folder / "logs" / f"{NAME}_new_summary.json").exists()
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert "resuming after" in result.stdout
    assert read_figures(folder) == whole


@pytest.mark.slow
def test_results_that_cannot_be_written_under_torchrun(folder, env, command, whole):
    """The states of all processes are kept."""
    (folder / "logs" / f"{NAME}_new_log.txt").mkdir(parents=True)
    torchrun = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *command[1:]]
    result = subprocess.run(torchrun, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode != 0 and f"{NAME}_new_log.txt: can't be written" in result.stderr
    assert count_batches(folder) == 10
    (folder / "logs" / f"{NAME}_new_log.txt").rmdir()
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert "resuming after 40 of 40 pictures" in result.stdout
    assert read_figures(folder) == whole
