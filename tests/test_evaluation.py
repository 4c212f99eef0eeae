"""The evaluation: its table and figures, what it does with odd data, and that nothing is lost."""

import csv
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import PICTURES, ROOT, check_one_line, find_result, get_output, run_torch
from filelock import FileLock
from PIL import Image
from torchvision import models
from torchvision.transforms import v2

import conversion
import evaluation
import results
from classification import RequestError, read_picture, read_zoo
from evaluation import Plan, Row, gather_batches
from labelled_pictures import Data
from networks import IMAGENET, Request
from test_config import TestClsConfig

LABELLED = [line.split() for line in (PICTURES / "val.txt").read_text().splitlines()]
IMAGENETS = (PICTURES / "imagenet_classes.txt").read_text().splitlines()
CLS = str(ROOT / "py_to_py_cls.py")
NAME = "squeezenet1_1-trained"
RESULTS = ["log.txt", "pictures.csv", "summary.json", "time.png", "wrong.png"]
TIMES = ("pytorch_ms", "opencv_ms", "warm_up")


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
def command(data, trained):
    """An evaluation in ten batches, on one engine, without a conversion.

    From the class folders, while `whole` is from the label file: so each test that compares the
    two shows as well that the lines of --classes say which class a folder is.
    """
    return [CLS, *trained, *get_options(data)]


def get_options(data):
    names = data / "classes.txt"
    names.write_text("".join(f"class{number} of many\n" for number in range(1000)))
    options = ["--img_root_dir", data / "folders", "--classes", names]
    return [*map(str, options), "--batch_size", "4", "--engine", "new"]


def read_table(folder, times=False, start=""):
    """The rows of the newest table, without the times."""
    path = find_result(folder, f"{start}pictures.csv")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if times or k not in TIMES} for row in rows]


def read_figures(folder, start=""):
    """The figures and rows that must not depend on how the run went."""
    summary = read_summary(folder, start)
    for network in ("pytorch", "opencv"):
        for time_ in ("ms_mean", "ms_median", "ms_p95"):
            assert summary[network].pop(time_) > 0
    about = ("seconds", "processes", "threads")
    about += ("pictures_root", "pictures_sha256")  # of a worker's own copy
    summary = {k: v for k, v in summary.items() if k not in about}
    return summary | {"rows": read_table(folder, start=start)}


def list_logs(folder):
    """What the evaluations of a folder have left, without the hashes."""
    found = (str(path.relative_to(folder / "logs")) for path in folder.glob("logs/**/*"))
    return sorted(re.sub(r"_[0-9a-f]{12}", "", path) for path in found)


@pytest.fixture(scope="session")
def whole(shared, data, weights, converted):
    """Figures of a run that was never stopped, from the label file; made by one worker for all."""
    folder = shared / "whole"
    with FileLock(f"{folder}.lock"):
        if not list(folder.glob("logs/*/summary.json")):
            folder.mkdir(exist_ok=True)
            shutil.copytree(converted, folder / "models")
            options = ["--model_name", "squeezenet1_1", "--weights", str(weights)]
            options += [*get_options(data), "--img_cls_file", str(data / "labels.txt")]
            subprocess.run([sys.executable, CLS, *options], cwd=folder, check=True)
    assert list_logs(folder)[1:] == [f"{list_logs(folder)[0]}/{end}" for end in RESULTS]
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


class Nan(nn.Module):
    \"\"\"The same, but nan for pictures of the value 7.\"\"\"

    def __init__(self):
        super().__init__()
        self.net = build()

    def forward(self, x):
        logits = self.net(x)
        return torch.where(x.mean((1, 2, 3))[:, None] == 7, logits * float("nan"), logits)


def build_sigmoid():
    \"\"\"The probability of class 1 of the network below.\"\"\"
    return nn.Sequential(build_binary(), nn.Sigmoid())


def build_labels():
    \"\"\"Four probabilities that don't add up to 1: sigmoids of x - 1, 2 - x, 0 and x - 6.\"\"\"
    head = nn.Linear(3, 4)
    with torch.no_grad():
        head.weight[:] = 0
        head.weight[:, 1] = torch.tensor([1.0, -1.0, 0.0, 1.0])
        head.bias[:] = torch.tensor([-1.0, 2.0, 0.0, -6.0])
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head, nn.Sigmoid())


def build_binary():
    \"\"\"A single logit, x - 4.5.\"\"\"
    head = nn.Linear(3, 1)
    with torch.no_grad():
        head.weight[:] = torch.tensor([0.0, 1.0, 0.0])
        head.bias[:] = -4.5
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
"""


@pytest.fixture
def grey(run, folder, monkeypatch):
    """grey(pictures, *options): evaluates a network that names the grey value of a picture.

    pictures: [(name, value, label)]; value None: not a picture. So all figures are known.
    """

    # both engines are right, and nothing branches: other tests are about that
    monkeypatch.setattr(conversion, "verify", lambda *_: (["new", "classic"], {}))
    monkeypatch.setattr(conversion, "check_branches", lambda *_: None)
    draw = results.draw

    def grey(pictures, *options, function="build", classes=10, plain=True, make=True, draws=False):
        monkeypatch.setattr(results, "draw", draw if draws else lambda *_: None)
        (folder / "grey.py").write_text(GREY.replace("CLASSES", str(classes)))
        (folder / "set").mkdir(exist_ok=True)
        for name, value, _ in pictures:
            path = folder / "set" / name
            path.parent.mkdir(exist_ok=True)
            if make and not (value is None and path.exists()):
                path.write_bytes(b"broken" if value is None else encode(value))
        if "--img_root_dir" not in options:
            lines = [f"{name} {label}\n" for name, _, label in pictures]
            (folder / "val.txt").write_text("".join(lines))
            options += ("--img_root_dir", "set", "--img_cls_file", "val.txt")
        options += ("--scale", 1, "--mean", 0, 0, 0, "--std", 1, 1, 1) if plain else ()
        return run("py_to_py_cls.py", "--model_name", f"grey:{function}", *options)

    return grey


def encode(value):
    return cv2.imencode(".png", np.full((40, 40, 3), value, np.uint8))[1].tobytes()


def read_summary(folder, start=""):
    return json.loads(find_result(folder, f"{start}summary.json").read_text())


# --- the table and the figures --------------------------------------------------------------------


def test_figures_known_beforehand(grey, folder):
    """Accuracy, ranks, confusions, probabilities; the class nearest to the value + 1/4 is first."""
    # the picture's value, its label, and the label's rank: for 2, the order is 2, 3, 1, 4, 0, 5
    values = [(3, 3, 1), (4, 4, 1), (2, 0, 5), (2, 0, 5), (2, 5, 6), (5, 6, 2), (1, 1, 1)]
    pictures = [(f"{i:02}.png", value, label) for i, (value, label, _) in enumerate(values)]
    output = get_output(grey(pictures, "--batch_size", 3))
    rows = read_table(folder)
    for row, (value, _, rank) in zip(rows, values, strict=True):
        assert row["pytorch_class"] == row["opencv_class"] == str(value)
        assert row["pytorch_rank"] == row["opencv_rank"] == str(rank)
        k = np.arange(10.0)
        logits = 2 * k * (value + 0.25) - k**2
        probability = np.exp(logits.max()) / np.exp(logits).sum()
        assert float(row["pytorch_probability"]) == pytest.approx(probability, rel=1e-4)
        assert float(row["opencv_probability"]) == pytest.approx(probability, rel=1e-4)
        assert float(row["peak"]) == pytest.approx(np.abs(logits).max(), rel=1e-5)
        assert 0 <= float(row["l1"]) <= float(row["l_inf"]) < 1e-3
    assert [row["batch"] for row in rows] == list("0001112")
    summary = read_summary(folder)
    for network in ("pytorch", "opencv"):
        assert summary[network]["top1"] == pytest.approx(100 * 3 / 7)
        assert summary[network]["top5"] == pytest.approx(100 * 6 / 7)
    assert summary["confused"] == [[0, 2, 2]]  # the others occur once
    assert "* class 0 -> class 2: 2\n" in output
    assert "ms per picture, 95th percentile of batches" in output  # not of pictures

    # the question that a table answers in one line, and the log's lines, which are cumulative
    wrong = Counter((r["label"], r["pytorch_class"]) for r in rows if r["pytorch_rank"] != "1")
    assert wrong.most_common(1) == [(("0", "2"), 2)]
    log = find_result(folder, "log.txt").read_text()
    found = re.findall(r"^(\d) Accuracy for PyTorch: top-1 (\S+), top-5 (\S+)$", log, re.M)
    assert found == [("3", "66.67", "100.00"), ("6", "33.33", "83.33"), ("7", "42.86", "85.71")]


def test_contact_sheet(grey, folder):
    """The wrong pictures; there is none when nothing is wrong."""
    pictures = [(f"{i}.png", 18 * i, 9) for i in range(14)]
    result = grey(pictures, classes=300, draws=True)
    sheet = find_result(folder, "wrong.png")
    assert f"wrong pictures: logs/{sheet.parent.name}/{sheet.name}" in result.stdout
    drawn = cv2.imread(str(sheet))
    assert drawn.shape[0] > 900 and drawn.shape[1] > 1000
    grey([(name, value, value) for name, value, _ in pictures], classes=300, draws=True)
    assert not find_result(folder, "time.png").with_name("wrong.png").exists()


def test_odd_names(grey, folder):
    """A newline, a comma, a quote, a backslash: the table gives the names back."""
    names = ["new\nline.png", 'a "b", c.png', "back\\slash.png", "é.png"]
    pictures = [(f"{number}/{name}", number, None) for number, name in enumerate(names)]
    get_output(grey(pictures, "--img_root_dir", "set", "--batch_size", 2))
    rows = read_table(folder)
    assert [row["picture"] for row in rows] == [name for name, _, _ in pictures]
    assert [row["pytorch_rank"] for row in rows] == ["1"] * 4


def test_evaluation_is_right(run, folder, trained, squeezenet):
    """Accuracy against labels of which every third is first, fourth, and eighth for PyTorch.

    Behind torchvision's transforms of the pictures that PIL reads.
    """
    transforms, lines = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms(), []
    for number, (name, _) in enumerate(LABELLED):
        blob = transforms(Image.open(PICTURES / name))[None].numpy()
        order = np.argsort(-run_torch(squeezenet, blob)[0])
        lines.append(f"{name} {order[(0, 3, 7)[number % 3]]}\n")
    (folder / "labels.txt").write_text("".join(lines))
    options = ["--batch_size", "5", "--img_root_dir", PICTURES, "--img_cls_file", "labels.txt"]
    output = get_output(run("py_to_py_cls.py", *trained, *options))
    log = find_result(folder, "log.txt", NAME).read_text()
    for line in (
        r"top-1 accuracy, % of 12 +33\.33 +33\.33",
        r"top-5 accuracy, % of 12 +66\.67 +66\.67",
    ):
        for text in (output, log):
            assert len(re.findall(f"^{line}$", text, re.M)) == 1
    assert "same class 12 of 12" in output
    l1, l_inf = map(float, re.findall(r"L1 (\S+), L_inf (\S+),", log)[-1])
    assert 0 < l1 <= l_inf < 1e-3
    chart = cv2.imread(str(find_result(folder, "time.png")))
    assert chart.shape[0] > 400 and chart.std() > 10
    summary = read_summary(folder)
    assert summary["versions"]["opencv"] == cv2.__version__
    for network in ("pytorch", "opencv"):
        assert summary[network]["top1"] == 100 * 4 / 12
        assert summary[network]["ms_median"] <= summary[network]["ms_p95"]
    sha1 = hashlib.sha1((folder / "models" / f"{NAME}.onnx").read_bytes()).hexdigest()
    assert summary["onnx"] == {"sha1": sha1}


def test_tutorials_blob():
    """The true centre crop: torchvision's own transforms on the same resized picture."""
    picture = cv2.imread(str(PICTURES / "koala.jpg"))
    rgb = cv2.resize(picture[:, :, ::-1].astype(np.float32), (256, 256)) / 255
    normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    transforms = v2.Compose([v2.CenterCrop(224), normalize])
    expected = transforms(torch.from_numpy(rgb).permute(2, 0, 1)).numpy()
    tutorials = replace(IMAGENET, resize=(), initial_width=256, initial_height=256)
    plan = Plan("tutorial", tutorials, "", "RGB", "new", 1)
    (blob,) = evaluation.get_blobs(PICTURES / "koala.jpg", plan, None)
    assert blob.dtype == np.float32
    assert np.abs(blob - expected).max() < 1e-5


@pytest.mark.parametrize(
    "options, size, initial",
    [
        ({}, 224, (256, 256)),
        ({"rsz_width": 300, "rsz_height": 240}, 224, (300, 240)),
        ({}, 112, (128, 128)),
    ],
)
def test_the_plan_of_the_tutorial(options, size, initial):
    plan = make_plan(size, preprocess="tutorial", **options)
    p = plan.preprocessing
    assert (p.resize, p.initial_width, p.initial_height) == ((), *initial)
    assert (p.mean, p.std, plan.transform) == (IMAGENET.mean, IMAGENET.std, "")


def make_plan(size=224, transform=None, **options):
    """The plan of an evaluation of one picture with these options."""
    p = replace(IMAGENET, width=size, height=size)
    network = SimpleNamespace(transform=transform, transform_name="mine", class_names=[])
    args = {"preprocess": "own", "engine": "auto", "rsz_width": None, "rsz_height": None}
    args = SimpleNamespace(**args | options, preprocessing=p)
    data = Data(".", [("a.jpg", 3)], IMAGENETS)
    return evaluation.make_plan(network, data, 1000, TestClsConfig(), args)


def test_plans_that_are_refused():
    with pytest.raises(RequestError, match="--rsz_width or --rsz_height is less than 224x224"):
        make_plan(preprocess="tutorial", rsz_width=300, rsz_height=200)
    with pytest.raises(RequestError, match="--preprocess transform .*give --transform"):
        make_plan(preprocess="transform")
    assert make_plan(preprocess="transform", transform=abs).transform == "mine"
    assert make_plan(transform=abs).transform == ""  # both get the same pictures
    assert make_plan().batch_size == 1


TRANSFORM = """
from PIL import Image
from torchvision import transforms


class Transform:
    \"\"\"A picture a grey level brighter than it is, if it is of 200 or more.\"\"\"

    def __call__(self, picture):
        x = transforms.Compose([transforms.Resize(8), transforms.CenterCrop(8),
                                transforms.PILToTensor()])(picture).float()
        return x + SHIFT * (x.min() == x.max()).float()
"""


def test_from_end_to_end(grey, folder):
    """PyTorch's pictures by the transform, OpenCV's by ours: reported, and not judged."""
    (folder / "mine.py").write_text(TRANSFORM.replace("SHIFT", "0"))
    pictures = [(f"{i}.png", i, i) for i in range(5)]
    options = ["--transform", "mine:Transform", "--frame_size", 8, "--preprocess", "transform"]
    output = get_output(grey(pictures, *options, plain=False))
    assert "PyTorch's are prepared by mine:Transform" in output
    assert "same class 5 of 5" in output
    # what the measurement doesn't see: pictures of one grey level between its own
    (folder / "mine.py").write_text(TRANSFORM.replace("SHIFT", "(0 < x.max() < 9)"))
    output = get_output(grey(pictures, *options, plain=False))
    summary = read_summary(folder)
    assert summary["difference"]["same_class"] == 1
    assert (summary["pytorch"]["top1"], summary["opencv"]["top1"]) == (20, 100)
    assert "not the same class: 4 pictures" in output and "not judged" in output
    # a picture that the transform fails on is skipped, and no other gets its label
    (folder / "mine.py").write_text(TRANSFORM.replace("SHIFT", "(0 // int(x.max() != 3))"))
    result = grey(pictures, *options, plain=False)
    check_one_line(result, "1 of 5 pictures", code=1)
    assert "skipped: 1 pictures\n* set/3.png: it fails with ZeroDivisionError: " in result.stdout
    rows = read_table(folder)
    assert [row["pytorch_class"] for row in rows] == ["0", "1", "2", "", "4"]
    assert [row["opencv_class"] for row in rows] == ["0", "1", "2", "", "4"]


# --- odd requests and data ------------------------------------------------------------------------


def test_bundled_pictures_of_another_network(run, folder):
    """Refused before anything is exported."""
    (folder / "grey.py").write_text(GREY.replace("CLASSES", "10"))
    result = run("py_to_py_cls.py", "--model_name", "grey:build", "--scale", 1)
    check_one_line(result, "ImageNet's 1000", "has 10", "--img_root_dir", "--evaluate False")
    assert "exporting" not in result.stdout and not (folder / "models").exists()


def test_one_output_is_binary(grey, folder):
    """Its answer is 1 if the logit is above 0; the probability is the sigmoid's."""
    pictures = [("a.png", 3, 0), ("b.png", 6, 1), ("c.png", 4, 1), ("d.png", 9, 1)]
    get_output(grey(pictures, function="build_binary"))
    rows = read_table(folder)
    assert [row["pytorch_class"] for row in rows] == list("0101")
    assert [row["opencv_rank"] for row in rows] == list("1121")
    for row, logit in zip(rows, (-1.5, 1.5, -0.5, 4.5), strict=True):
        sigmoid = 1 / (1 + np.exp(-abs(logit)))
        assert float(row["pytorch_probability"]) == pytest.approx(sigmoid, rel=1e-4)
    assert read_summary(folder)["pytorch"]["top1"] == 75


def test_outputs_that_are_probabilities(grey, folder):
    """One has the threshold 0.5; several that don't add up to 1 are taken as they are."""
    pictures = [("a.png", 3, 0), ("b.png", 6, 1), ("c.png", 4, 1), ("d.png", 9, 1)]
    output = get_output(grey(pictures, function="build_sigmoid"))
    assert "the answer is class 1 if it is above 0.5\n" in output and "top-5" not in output
    for row, logit in zip(read_table(folder), (-1.5, 1.5, -0.5, 4.5), strict=True):
        p = 1 / (1 + np.exp(-logit))
        assert row["pytorch_class"] == str(int(p > 0.5))
        assert float(row["opencv_probability"]) == pytest.approx(max(p, 1 - p), rel=1e-4)
        of_label = p if row["label"] == "1" else 1 - p
        assert float(row["pytorch_label_probability"]) == pytest.approx(of_label, rel=1e-4)
    assert read_summary(folder)["opencv"]["top1"] == 75

    pictures = [("a.png", 0, 1), ("b.png", 9, 2), ("c.png", 2, 1)]
    get_output(grey(pictures, function="build_labels"))
    for row, value in zip(read_table(folder), (0, 9, 2), strict=True):
        p = 1 / (1 + np.exp(-np.array([value - 1.0, 2.0 - value, 0, value - 6.0])))
        assert row["pytorch_class"] == str(p.argmax())
        assert float(row["pytorch_probability"]) == pytest.approx(p.max(), rel=1e-4)
        of_label = float(row["opencv_label_probability"])
        assert of_label == pytest.approx(p[int(row["label"])], rel=1e-4)
    zoo = read_zoo("models/models.yml")
    assert zoo["grey-build_sigmoid"]["activation"] == zoo["grey-build_labels"]["activation"]
    assert 'activation: "sigmoid"' in (folder / "models" / "models.yml").read_text()


def test_nan_is_a_wrong_answer(grey, folder):
    """In both networks, also of class 0; the pictures are named, and the JSON has no NaN."""
    result = grey([("a.png", 3, 3), ("b.png", 7, 0), ("c.png", 7, 7)], function="Nan")
    check_one_line(result, "2 pictures are nan", "b.png", code=1)
    assert "the logits are nan: 2 pictures\n* b.png\n* c.png\n" in result.stdout
    rows = read_table(folder)
    assert [row["pytorch_name"] for row in rows] == ["class 3", "nan", "nan"]
    assert [row["opencv_rank"] for row in rows] == ["1", "11", "11"]
    text = find_result(folder, "summary.json").read_text()
    summary = json.loads(text, parse_constant=pytest.fail)
    assert summary["pytorch"]["top1"] == summary["opencv"]["top5"] == pytest.approx(100 / 3)
    assert summary["nan"] == ["b.png", "c.png"] and summary["difference"]["l1"] is None
    assert summary["difference"]["same_class"] == 1


def test_lines_without_a_terminal(grey, monkeypatch):
    """Every minute: done, of how many, the time left."""
    assert evaluation.REPORT_EVERY == 60
    monkeypatch.setattr(evaluation, "REPORT_EVERY", 0)
    output = get_output(grey([(f"{i}.png", i, i) for i in range(4)], "--batch_size", 1))
    done = re.findall(r"^(\d) of 4 pictures, (\d+:\d\d:\d\d) left$", output, re.M)
    assert [number for number, _ in done] == list("1234") and done[-1][1] == "0:00:00"


def test_a_sheet_of_odd_pictures_and_names(grey, folder):
    """Pictures that are a line, long names, formulas, letters that no font has: no warning."""
    names = ["costs $5 or $6", "小熊猫", "W" * 90, "$a$ _b^{", *"56789A"]
    (folder / "odd.txt").write_text("\n".join(names), "utf-8")
    pictures = [("a.png", 1, 0), ("b.png", 2, 1), (f"{'c' * 99}.png", 3, 2), ("$x$ _y^{.png", 2, 3)]
    (folder / "set").mkdir()
    for number, size in enumerate([(2, 3000, 3), (3000, 2, 3)]):
        cv2.imwrite(str(folder / "set" / f"line{number}.png"), np.full(size, 5, np.uint8))
        pictures.append((f"line{number}.png", None, 4))
    result = grey(pictures, "--classes", "odd.txt", draws=True)
    sheet = cv2.imread(str(find_result(folder, "wrong.png")))
    assert result.stderr == "" and sheet.shape[0] > 600
    assert result.stdout.count("missing from font(s)") <= 1
    for column in range(1, 4):  # nothing is drawn across the gaps between the pictures
        assert (sheet[60:, 300 * column - 1 : 300 * column + 1] == 255).all()
    assert read_table(folder)[1]["label_name"] == names[1]


def test_what_cannot_be_drawn(grey, folder, monkeypatch):
    """It costs a line: the figures are written and printed before."""
    monkeypatch.setattr(results, "draw_times", lambda *_: 1 / 0)
    read = results.read_picture
    monkeypatch.setattr(results, "read_picture", lambda path: read(path.with_name("gone.png")))
    output = get_output(grey([("a.png", 3, 3), ("b.png", 4, 3)], draws=True))
    assert output.index("top-1 accuracy") < output.index("time.png: left out: ZeroDivisionError")
    assert re.search("wrong.png: left out: .*gone.png", output)
    names = ["log.txt", "pictures.csv", "summary.json"]
    assert sorted(path.name for path in folder.glob("logs/*/*")) == names


def test_another_run_of_the_same_command(grey, folder, monkeypatch):
    """It has ended meanwhile, and has removed the rows of both: nothing is written."""
    run_batches = evaluation.run_batches

    def run(*arguments):
        interrupted = run_batches(*arguments)
        next(folder.glob("logs/*/batches/0-*.json")).unlink()
        return interrupted

    monkeypatch.setattr(evaluation, "run_batches", run)
    result = grey([(f"{i}.png", i, i) for i in range(5)], "--batch_size", 2)
    check_one_line(result, "rows of 2 pictures are gone", "another run")
    assert [path.name for path in folder.glob("logs/*/*")] == ["batches"]


def test_order_of_the_channels(grey, folder):
    """--bgr_to_rgb False is said, and its results have a folder of their own."""
    output = get_output(grey([("a.png", 3, 3)], "--bgr_to_rgb", "False"))
    assert "channels in the order BGR" in output
    assert "channels in the order RGB" in grey([("a.png", 3, 3)]).stdout
    assert len(list(folder.glob("logs/*/pictures.csv"))) == 2


def test_pictures_that_cannot_be_read(grey, folder):
    """Skipped, counted and all in the table, and no other gets their label; ten are printed."""
    pictures = [(f"{i:02}.png", None if 5 <= i < 17 else i % 10, i % 10) for i in range(20)]
    result = grey(pictures, "--batch_size", 4)
    check_one_line(result, "12 of 20 pictures", code=1)
    log = find_result(folder, "log.txt").read_text()
    for text in (result.stdout, log):
        assert "skipped: 12 pictures" in text
        assert text.count("truncated, or not a picture") == 10
        assert text.rindex("truncated") < text.index("8 of 20 pictures")
    rows = read_table(folder, times=True)
    assert len(rows) == 20
    for i, (row, (_, value, label)) in enumerate(zip(rows, pictures, strict=True)):
        skipped = value is None
        assert row["label"] == str(label) and bool(row["skipped"]) == skipped
        assert row["pytorch_class"] == row["opencv_class"] == ("" if skipped else str(value))
        assert row["opencv_rank"] == ("" if skipped else "1") and (row["l1"] == "") == skipped
        assert row["warm_up"] == str(i < 4)
    summary = read_summary(folder)
    assert summary["read"] == 8 and summary["pytorch"]["top1"] == 100
    check_one_line(grey([("a.png", None, 3)]), "none of the 1 pictures can be read")


def test_odd_pictures(run, folder, trained, monkeypatch):
    """Grey, CMYK, alpha, 16 bits, turned by EXIF, one pixel high."""
    monkeypatch.setattr(results, "draw", lambda *_: None)
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

    plain = read_picture(folder / "plain.png").astype(int)
    for name in ("alpha.png", "deep.png", "turned.jpg"):
        assert np.abs(read_picture(folder / name) - plain).mean() < 2, name

    names = sorted(p.name for p in folder.glob("*.*g"))
    assert len(names) == 7
    (folder / "val.txt").write_text("".join(f"{name} 1\n" for name in names))
    options = [*trained, "--img_root_dir", ".", "--img_cls_file", "val.txt"]
    assert "same class 7 of 7" in get_output(run("py_to_py_cls.py", *options))


# --- nothing lost ---------------------------------------------------------------------------------


@pytest.fixture
def begin(folder, env, command):
    """begin("torchrun's options" ...): the evaluation's process, which has just started."""

    def begin(*launcher, cwd=folder, **options):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        program = [sys.executable, *launcher, *command]
        return subprocess.Popen(program, cwd=cwd, env=env, **options)

    return begin


@pytest.fixture
def evaluate(execute, command):
    """evaluate("an option" ...): the same, finished."""
    return lambda *options, launcher=(): execute(sys.executable, *launcher, *command, *options)


@pytest.fixture
def check_resumed(evaluate, folder, whole):
    """check_resumed(words): the same command goes on, and ends as if it had never been stopped."""

    def check_resumed(words=""):
        assert f"resuming after {words}" in get_output(evaluate())
        assert read_figures(folder) == whole
        assert not find_running(folder)

    return check_resumed


def find_running(folder):
    return sorted(folder.glob(f"logs/{NAME}_*/batches"))


def count_batches(folder):
    return sum(len(list(running.glob("*.json"))) for running in find_running(folder))


def stop_after(process, folder, batches, signum):
    while count_batches(folder) < batches and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signum)
    return process.communicate(timeout=60)


@pytest.mark.slow
def test_killed_at_several_points(folder, begin, check_resumed):
    """SIGKILL twice, and a batch that was damaged: as if unbroken."""
    stop_after(begin(), folder, 2, signal.SIGKILL)
    stop_after(begin(), folder, count_batches(folder) + 2, signal.SIGKILL)
    assert 4 <= count_batches(folder) < 10
    assert not list(folder.glob("logs/*/summary.json"))
    (running,) = find_running(folder)
    damaged = next(running.glob("1-*.json"))
    damaged.write_text(damaged.read_text().replace("0.", "1.", 1))
    check_resumed(f"{4 * (count_batches(folder) - 1)} of 40 pictures")


def test_stopped_and_resumed(grey, folder, monkeypatch):
    """Ctrl-C: the results so far, under names of their own; they go when the whole ones come."""
    write_batch = evaluation.write_batch

    def write(kept, rows):
        if rows[0].batch == 2:
            raise KeyboardInterrupt
        write_batch(kept, rows)

    pictures = [(f"{i}.png", i, i - i % 2) for i in range(9)]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_batch", write)
        result = grey(pictures, "--batch_size", 2, draws=True)
    check_one_line(result, "stopped by Ctrl-C", code=130)
    assert "PARTIAL: 4 of 9 pictures" in result.stdout
    assert "PARTIAL" in find_result(folder, "partial_log.txt").read_text()
    rows, figures = read_table(folder, start="partial_"), read_figures(folder, "partial_")
    assert len(rows) == 4 and figures["partial"] and figures["pytorch"]["top1"] == 50
    parts = sorted(path.name for path in folder.glob("logs/*/*"))
    assert parts == ["batches", *(f"partial_{end}" for end in RESULTS)]

    output = get_output(grey(pictures, "--batch_size", 2, make=False, draws=True))
    assert "resuming after 4 of 9 pictures" in output
    assert list_logs(folder)[1:] == [f"{list_logs(folder)[0]}/{end}" for end in RESULTS]
    resumed = read_figures(folder)
    assert resumed["rows"][:4] == rows and resumed["pytorch"]["top1"] == 100 * 5 / 9
    get_output(grey(pictures, "--batch_size", 2, "--resume", "False", make=False))
    assert read_figures(folder) == resumed

    # a whole result stays until there is another whole one
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_batch", write)
        assert grey(pictures, "--batch_size", 2, make=False).returncode == 130
    assert read_figures(folder) == resumed and read_figures(folder, "partial_")["partial"]


@pytest.mark.slow
def test_ctrl_c(folder, begin, whole, check_resumed):
    """The same of a process."""
    process = begin()
    stdout, stderr = stop_after(process, folder, 2, signal.SIGINT)
    assert process.returncode == 130
    assert stderr.splitlines() == ["py_to_py_cls.py: stopped by Ctrl-C"]
    assert "PARTIAL" in stdout
    partial = find_result(folder, "partial_log.txt")
    assert "PARTIAL" in partial.read_text()
    rows = read_table(folder, start="partial_")
    assert rows == whole["rows"][: len(rows)] and 0 < len(rows) < 40
    assert read_figures(folder, "partial_")["partial"]
    assert not partial.with_name("log.txt").exists()
    check_resumed(f"{len(rows)} of 40 pictures")
    assert not partial.exists() and partial.with_name("log.txt").exists()


@pytest.mark.slow
def test_other_settings_take_nothing_over(folder, begin, evaluate):
    """What was stopped with others is left alone, and the user is told."""
    stop_after(begin(), folder, 2, signal.SIGKILL)
    (running,) = find_running(folder)
    output = get_output(evaluate("--batch_size", "20"))
    assert "resuming" not in output
    assert f"{running.parent.relative_to(folder)}: belongs to an interrupted run" in output
    assert find_running(folder) == [running]
    assert "resuming" not in get_output(evaluate("--resume", "False"))
    assert not find_running(folder)


def test_batches_that_are_damaged(folder):
    """Cut, changed, or with zeros, as after a power failure: they don't count."""
    rows = [Row(i, f"{i}.jpg", 1, l1=i / 7, batch=i // 2, warm_up=False) for i in range(6)]
    rows[5] = rows[5]._replace(picture='new\nline, "x"\udcff', l1=float("nan"), skipped="é")
    batches = {number: rows[2 * number : 2 * number + 2] for number in (2, 0, 1)}
    for batch in batches.values():
        evaluation.write_batch(folder / "running", batch)
    assert repr(gather_batches(folder / "running")) == repr(dict(sorted(batches.items())))
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
        assert repr(gather_batches(folder / "running")) == repr(dict(sorted(batches.items())))


def get_key(data, **changed):
    """The key of an evaluation of this data, with what is changed in its plan."""
    network = SimpleNamespace(request=Request("a"), weights="own")
    converted = SimpleNamespace(sha256="1", load_info={}, activation=None)
    plan = replace(Plan("own", IMAGENET, "", "RGB", "new", 5), **changed)
    return evaluation.get_key(network, converted, data, plan)


def test_the_key_of_an_evaluation(folder):
    """Changed pictures of the same names and sizes are others, and so is another last digit."""
    shutil.copy(PICTURES / "koala.jpg", folder)

    def key(label=105, **changed):
        return get_key(Data(str(folder), [("koala.jpg", label)], []), **changed)

    before = key()
    assert key() == before
    assert key(label=106) != before
    assert key(preprocessing=replace(IMAGENET, scale=0.00392157)) != before
    other = {"preprocess": "tutorial", "transform": "a", "channels": "BGR"}
    other |= {"engine": "classic", "batch_size": 4}
    assert other.keys() | {"preprocessing"} == {field.name for field in fields(Plan)}
    assert all(key(**{name: value}) != before for name, value in other.items())
    status = os.stat(folder / "koala.jpg")
    # another picture of the same size, and its times set back
    (folder / "koala.jpg").write_bytes(bytes(status.st_size))
    os.utime(folder / "koala.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert key() != before


def test_a_key_knows_what_a_row_is(monkeypatch):
    """A column more, or another meaning, and older batches aren't read as if they had it."""
    before = get_key(Data(".", [], []))
    for name, value in (
        ("ROWS_VERSION", evaluation.ROWS_VERSION + 1),
        ("Row", SimpleNamespace(_fields=("number", "new", *Row._fields[1:]))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, name, value)
            assert get_key(Data(".", [], [])) != before
    assert get_key(Data(".", [], [])) == before


@pytest.mark.slow
def test_full_disk(folder, begin, check_resumed):
    """A limit on the size of a file stands in for it: one line, and the state so far intact."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # noqa: E731
    process = begin(preexec_fn=limit)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert len(stderr.splitlines()) == 1 and "can't be written" in stderr
    assert count_batches(folder) >= 1
    check_resumed()


TORCHRUN = ["-m", "torch.distributed.run"]
TWO_PROCESSES = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]


# As torchrun starts them, but PyTorch is imported once for both.
TWO_RANKS = """
import os, runpy, sys
import torch, torchvision
rank = "0" if os.fork() else "1"
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def find_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def test_two_ranks_give_the_figures_of_one(grey, folder, execute):
    """The first converts, each evaluates its batches, and one of them writes."""
    pictures = [(f"{i}.png", i, i - i % 3) for i in range(9)]
    get_output(grey(pictures, "--batch_size", 2, "--engine", "new"))
    command, one = sys.argv, read_figures(folder)
    shutil.rmtree(folder / "logs")
    shutil.rmtree(folder / "models")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_port()}
    output = get_output(execute(sys.executable, "-c", TWO_RANKS, *command, **address))
    assert output.count("exporting") == output.count("same class 9 of 9") == 1
    assert "in each of 2 processes" in output
    assert read_figures(folder) == one and read_summary(folder)["processes"] == 2
    assert {row["warm_up"] for row in read_table(folder, times=True)[:4]} == {"True"}


@pytest.mark.slow
def test_two_machines_give_the_figures_of_one(folder, begin, whole):
    """Two agents, as they are started on two machines, each in a folder of its own."""
    agents, port = [], find_port()
    for rank in range(2):
        shutil.copytree(folder / "models", folder / f"machine{rank}" / "models")
        launcher = [*TORCHRUN, "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
        launcher += ["--master-addr", "127.0.0.1", "--master-port", port]
        agents.append(begin(*launcher, cwd=folder / f"machine{rank}"))
    for agent in agents:
        _, stderr = agent.communicate(timeout=300)
        assert agent.returncode == 0, stderr
    assert read_figures(folder / "machine0") == whole
    assert list((folder / "machine1" / "logs").iterdir()) == []


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run(folder, execute, begin, check_resumed):
    """With an error, no hang; and one process continues from what both have done."""
    agent = begin(*TWO_PROCESSES)
    while count_batches(folder) < 2 and agent.poll() is None:
        time.sleep(0.005)
    ranks = get_output(execute("pgrep", "-P", agent.pid, "-f", "py_to_py_cls")).split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    agent.communicate(timeout=120)
    assert agent.returncode != 0
    assert not list(folder.glob("logs/*/summary.json"))
    check_resumed()


@pytest.mark.slow
def test_results_that_cannot_be_written_under_torchrun(folder, begin, evaluate, check_resumed):
    """The states of all processes are kept."""
    stop_after(begin(), folder, 2, signal.SIGKILL)
    (running,) = find_running(folder)
    log = running.with_name("log.txt")
    log.mkdir()
    result = evaluate(launcher=TWO_PROCESSES)
    assert result.returncode != 0 and f"{log.name}: can't be written" in result.stderr
    assert count_batches(folder) == 10
    log.rmdir()
    check_resumed("40 of 40 pictures")
