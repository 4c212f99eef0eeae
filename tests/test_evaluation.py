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
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import PICTURES, ROOT, check_one_line, get_output
from filelock import FileLock
from PIL import Image
from torchvision.transforms import v2

import evaluation
from classification import RequestError, read_picture
from evaluation import Row, read_batches
from labelled_pictures import Data, get_data
from networks import IMAGENET, Request
from test_config import TestClsConfig

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


def read_table(folder, name=f"{NAME}_new", times=False):
    """The rows of the table, without the times."""
    with open(folder / "logs" / f"{name}_pictures.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows if not times else ():
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
            path.write_bytes(b"broken" if value is None else encode(value))
        if "--img_root_dir" not in options:
            lines = [f"{name} {label}\n" for name, _, label in pictures]
            (folder / "val.txt").write_text("".join(lines))
            options += ("--img_root_dir", "set", "--img_cls_file", "val.txt")
        preprocessing = ["--scale", 1, "--mean", 0, 0, 0, "--std", 1, 1, 1]
        return run("py_to_py_cls.py", "--model_name", f"grey:{function}", *preprocessing, *options)

    return grey


def encode(value):
    return cv2.imencode(".png", np.full((40, 40, 3), value, np.uint8))[1].tobytes()


def read_summary(folder, name="grey-build"):
    return json.loads((folder / "logs" / f"{name}_summary.json").read_text())


# --- the table and the figures --------------------------------------------------------------------


def test_figures_known_beforehand(grey, folder):
    """Accuracy, ranks, confusions, probabilities; the class nearest to the value + 1/4 is first."""
    # the picture's value, its label, and the label's rank: for 2, the order is 2, 3, 1, 4, 0, 5
    values = [(3, 3, 1), (4, 4, 1), (2, 0, 5), (2, 0, 5), (2, 5, 6), (5, 6, 2), (1, 1, 1)]
    pictures = [(f"{i:02}.png", value, label) for i, (value, label, _) in enumerate(values)]
    output = get_output(grey(pictures, "--batch_size", 3))
    rows = read_table(folder, "grey-build")
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
    for network in ("PyTorch", f"OpenCV {cv2.__version__}"):
        assert summary[network]["top1"] == pytest.approx(100 * 3 / 7)
        assert summary[network]["top5"] == pytest.approx(100 * 6 / 7)
    assert summary["confused"] == [[0, 2, 2], [5, 2, 1], [6, 5, 1]]
    assert "* class 0 -> class 2: 2\n* class 5 -> class 2: 1\n" in output
    assert "ms per picture, 95th percentile of batches" in output  # not of pictures

    # the question that a table answers in one line, and the log's lines, which are cumulative
    wrong = Counter((r["label"], r["pytorch_class"]) for r in rows if r["pytorch_rank"] != "1")
    assert wrong.most_common(1) == [(("0", "2"), 2)]
    log = (folder / "logs" / "grey-build_log.txt").read_text()
    found = re.findall(r"^(\d) Accuracy for PyTorch: top-1 (\S+), top-5 (\S+)$", log, re.M)
    assert found == [("3", "66.67", "100.00"), ("6", "33.33", "83.33"), ("7", "42.86", "85.71")]


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
    names = ["new\nline.png", 'a "b", c.png', "back\\slash.png", "é.png"]
    pictures = [(f"{number}/{name}", number, None) for number, name in enumerate(names)]
    get_output(grey(pictures, "--img_root_dir", "set", "--batch_size", 2))
    rows = read_table(folder, "grey-build")
    assert [row["picture"] for row in rows] == [name for name, _, _ in pictures]
    assert [row["pytorch_rank"] for row in rows] == ["1"] * 4


def test_evaluation_is_right(run, folder, weights, squeezenet, get_logits):
    """Accuracy against labels of which every third is first, fourth, and eighth."""
    lines = []
    for number, (name, _) in enumerate(LABELLED):
        order = np.argsort(-get_logits(squeezenet, PICTURES / name))
        lines.append(f"{name} {order[(0, 3, 7)[number % 3]]}\n")
    (folder / "labels.txt").write_text("".join(lines))
    shutil.copy(weights, folder / "own.pth")
    options = ["--model_name", "squeezenet1_1", "--weights", "own.pth", "--batch_size", "5"]
    options += ["--img_root_dir", PICTURES, "--img_cls_file", "labels.txt"]
    output = get_output(run("py_to_py_cls.py", *options))
    log = (folder / "logs" / "squeezenet1_1-own_log.txt").read_text()
    for line in (
        r"top-1 accuracy, % of 12 +33\.33 +33\.33",
        r"top-5 accuracy, % of 12 +66\.67 +66\.67",
    ):
        for text in (output, log):
            assert len(re.findall(f"^{line}$", text, re.M)) == 1
    assert "same class 12 of 12" in output
    l1, l_inf = map(float, re.findall(r"L1 (\S+), L_inf (\S+),", log)[-1])
    assert 0 < l1 <= l_inf < 1e-3
    chart = cv2.imread(str(folder / "logs" / "squeezenet1_1-own_time.png"))
    assert chart.shape[0] > 400 and chart.std() > 10
    summary = json.loads((folder / "logs" / "squeezenet1_1-own_summary.json").read_text())
    for network in ("PyTorch", f"OpenCV {cv2.__version__}"):
        assert summary[network]["top1"] == 100 * 4 / 12
        assert summary[network]["ms_median"] <= summary[network]["ms_p95"]
    sha1 = hashlib.sha1((folder / "models" / "squeezenet1_1-own.onnx").read_bytes()).hexdigest()
    assert summary["onnx"] == {"sha1": sha1}


def test_evaluation_with_the_tutorials_preprocessing():
    """The true centre of 256x256 pixels, which blobFromImage's crop would shrink."""
    picture = cv2.imread(str(PICTURES / "koala.jpg"))
    rgb = cv2.resize(picture[:, :, ::-1].astype(np.float32), (256, 256)) / 255
    normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = v2.Compose([v2.CenterCrop(224), normalize])(torch.from_numpy(rgb).permute(2, 0, 1))
    p = replace(IMAGENET, resize=(), initial_width=256, initial_height=256)
    blob = evaluation.get_tutorial_blob(PICTURES / "koala.jpg", p)
    assert blob.dtype == np.float32
    assert np.abs(blob - expected.numpy()).max() < 1e-5


# --- odd requests and data ------------------------------------------------------------------------


def get_pictures(folder, names, config=None, named_labels=False, class_names=None):
    """evaluation.get_data of a folder of empty files."""
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


def check(data, outputs=1000, preprocess="own", network=None, preprocessing=IMAGENET, **given):
    """evaluation.check_evaluation for a torchvision network of `outputs` logits."""
    network = network or SimpleNamespace(transform=None, preprocessing=preprocessing)
    args = {"preprocess": preprocess, "classes": None, "preprocessing": preprocessing} | given
    evaluation.check_evaluation(network, data, outputs, SimpleNamespace(**args))


@pytest.mark.parametrize(
    "folders, lines, ids",
    [
        (["1", "105", "387"], None, [1, 105, 387]),
        (["n0", "n2"], ["n2 koala", "n0 cat, tom", "n1 dog"], [1, 0]),
        (["n0", "n2"], ["n2", "n0", "n1"], [1, 0]),
        # no such lines, or ambiguous: in sorted order, if there is one for each output
        (["n0", "n1"], None, [0, 1]),
        (["n0", "n1"], ["n0", "other"], [0, 1]),
        (["n0", "n1"], ["n0", "n1", "n0"], [0, 1]),
        # without --classes nobody says that the network's classes are ImageNet's
        (["bison", "fig"], None, [0, 1]),
    ],
)
def test_class_folders(folder, capsys, folders, lines, ids):
    """Named by numbers, or by lines of --classes or their first words; or all the classes."""
    names = [f"{name}/a.jpg" for name in folders]
    data = get_pictures(folder, names, class_names=lines)
    assert data.pictures == list(zip(names, ids, strict=True))
    ends = [f"folder {folders[i]} is class {ids[i]}" for i in (0, -1)]
    said = f"{len(ids)} pictures in {len(ids)} classes: {', ..., '.join(ends)}\n"
    assert said in capsys.readouterr().out
    if ids != [0, 1]:
        assert data.names == (lines or IMAGENETS)
        check(data)
        return
    assert data.names == (lines or folders)
    check(data, outputs=2)
    with pytest.raises(RequestError, match="2 class folders for 1000 .* IDs .*--classes.*each"):
        check(data)


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
    data = get_pictures(folder, ["1/a.jpg", "10/b.jpg"])
    check(data, outputs=11)
    with pytest.raises(RequestError, match="10/b.jpg has class ID 10, .* 0 to 9"):
        check(data, outputs=10)


def test_one_output_is_binary(grey, folder):
    """Its answer is 1 if the logit is above 0; the probability is the sigmoid's."""
    pictures = [("a.png", 3, 0), ("b.png", 6, 1), ("c.png", 4, 1), ("d.png", 9, 1)]
    get_output(grey(pictures, function="build_binary"))
    rows = read_table(folder, "grey-build_binary")
    assert [row["pytorch_class"] for row in rows] == list("0101")
    assert [row["opencv_rank"] for row in rows] == list("1121")
    for row, logit in zip(rows, (-1.5, 1.5, -0.5, 4.5), strict=True):
        sigmoid = 1 / (1 + np.exp(-abs(logit)))
        assert float(row["pytorch_probability"]) == pytest.approx(sigmoid, rel=1e-4)
    assert read_summary(folder, "grey-build_binary")["PyTorch"]["top1"] == 75


def test_label_files(folder, capsys):
    """Lines that repeat others, that conflict, and one in a hundred pictures that doesn't exist."""
    labels = folder / "val.txt"
    config = {"img_cls_file": str(labels)}
    labels.write_text("a.jpg 3\nb.jpg 4\n\n./a.jpg 3\n")
    data = get_pictures(folder, ["a.jpg", "b.jpg"], config, named_labels=True)
    assert data.pictures == [("a.jpg", 3), ("b.jpg", 4)]
    assert "1 lines repeat others" in capsys.readouterr().out
    labels.write_text("a.jpg 3\nb.jpg 4\n\n./a.jpg 5\n")
    with pytest.raises(RequestError, match="a.jpg is class 3 in line 1, and 5 in line 4"):
        get_pictures(folder, [], config, named_labels=True)
    labels.write_text("".join(f"{i}.jpg 1\n" for i in range(100)))
    data = get_pictures(folder, [f"{i}.jpg" for i in range(99)], config, named_labels=True)
    assert len(data.pictures) == 100


def test_order_of_the_channels(grey, folder):
    """--bgr_to_rgb False is said, and is part of the name of the results."""
    output = get_output(grey([("a.png", 3, 3)], "--bgr_to_rgb", "False"))
    assert "channels in the order BGR" in output
    assert (folder / "logs" / "grey-build_BGR_pictures.csv").exists()
    assert "channels in the order RGB" in grey([("a.png", 3, 3)]).stdout


def test_pictures_that_cannot_be_read(grey, folder):
    """Skipped, counted and all in the table, and no other gets their label; ten are printed."""
    pictures = [(f"{i:02}.png", None if 5 <= i < 17 else i % 10, i % 10) for i in range(20)]
    result = grey(pictures, "--batch_size", 4)
    check_one_line(result, "12 of 20 pictures", code=1)
    log = (folder / "logs" / "grey-build_log.txt").read_text()
    for text in (result.stdout, log):
        assert "skipped: 12 pictures" in text
        assert text.count("truncated, or not a picture") == 10
        assert text.rindex("truncated") < text.index("8 of 20 pictures")
    rows = read_table(folder, "grey-build", times=True)
    assert len(rows) == 20
    for i, (row, (_, value, label)) in enumerate(zip(rows, pictures, strict=True)):
        skipped = value is None
        assert row["label"] == str(label) and bool(row["skipped"]) == skipped
        assert row["pytorch_class"] == row["opencv_class"] == ("" if skipped else str(value))
        assert row["opencv_rank"] == ("" if skipped else "1") and (row["l1"] == "") == skipped
        assert row["warm_up"] == str(i < 4)
    summary = read_summary(folder)
    assert summary["read"] == 8 and summary["PyTorch"]["top1"] == 100
    check_one_line(grey([("a.png", None, 3)]), "none of the 1 pictures can be read")


def test_odd_pictures(run, folder, trained):
    """Grey, CMYK, alpha, 16 bits, turned by EXIF, one pixel high."""
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
    return sorted(folder.glob(f"logs/{NAME}_new_{'[0-9a-f]' * 12}"))


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
    assert not (folder / "logs" / f"{NAME}_new_summary.json").exists()
    (running,) = find_running(folder)
    damaged = next(running.glob("1-*.json"))
    damaged.write_text(damaged.read_text().replace("0.", "1.", 1))
    check_resumed(f"{4 * (count_batches(folder) - 1)} of 40 pictures")


def test_ctrl_c(folder, begin, whole):
    """The results so far, under a name of their own: they don't replace a whole run's."""
    finished = folder / "logs" / f"{NAME}_new_log.txt"
    finished.parent.mkdir()
    finished.write_text("finished before")
    process = begin()
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
def test_other_settings_take_nothing_over(folder, begin, evaluate):
    """What was stopped with others is left alone, and the user is told."""
    stop_after(begin(), folder, 2, signal.SIGKILL)
    (running,) = find_running(folder)
    output = get_output(evaluate("--batch_size", "20"))
    assert "resuming" not in output
    assert f"{running.relative_to(folder)}: stopped with other pictures" in output
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
    shutil.copy(PICTURES / "koala.jpg", folder)
    network = SimpleNamespace(request=Request("a"), weights="own")
    converted = SimpleNamespace(made_from="1", load_info={}, engines=["new"])
    config = SimpleNamespace(batch_size=5)
    args = SimpleNamespace(preprocess="tutorial", engine="auto")

    def key(label=105, preprocessing=IMAGENET):
        data = Data([("koala.jpg", label)], str(folder), [])
        return evaluation.get_key(network, converted, preprocessing, data, config, args)

    before = key()
    assert key() == before
    assert key(label=106) != before
    assert key(preprocessing=replace(IMAGENET, scale=0.00392157)) != before
    status = os.stat(folder / "koala.jpg")
    # another picture of the same size, and its times set back
    (folder / "koala.jpg").write_bytes(bytes(status.st_size))
    os.utime(folder / "koala.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert key() != before


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


def test_two_processes_give_the_figures_of_one(folder, evaluate, whole):
    output = get_output(evaluate(launcher=TWO_PROCESSES))
    assert output.count("same class 40 of 40") == 1
    assert read_figures(folder) == whole
    found = sorted(p.name for p in (folder / "logs").iterdir())
    assert found == [f"{NAME}_new_{end}" for end in RESULTS]


@pytest.mark.slow
def test_two_machines_give_the_figures_of_one(folder, begin, whole):
    """Two agents, as they are started on two machines, each in a folder of its own."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    agents = []
    for rank in range(2):
        shutil.copytree(folder / "models", folder / f"machine{rank}" / "models")
        launcher = [*TORCHRUN, "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
        launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        agents.append(begin(*launcher, cwd=folder / f"machine{rank}"))
    for agent in agents:
        _, stderr = agent.communicate(timeout=300)
        assert agent.returncode == 0, stderr
    assert read_figures(folder / "machine0") == whole
    assert not list((folder / "machine1").glob("logs/*.json"))


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
    assert not (folder / "logs" / f"{NAME}_new_summary.json").exists()
    check_resumed()


@pytest.mark.slow
def test_results_that_cannot_be_written_under_torchrun(folder, evaluate, check_resumed):
    """The states of all processes are kept."""
    log = folder / "logs" / f"{NAME}_new_log.txt"
    log.mkdir(parents=True)
    result = evaluate(launcher=TWO_PROCESSES)
    assert result.returncode != 0 and f"{log.name}: can't be written" in result.stderr
    assert count_batches(folder) == 10
    log.rmdir()
    check_resumed("40 of 40 pictures")
