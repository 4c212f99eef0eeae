"""classification.py: its answers, what it saves, and that it stands alone."""

import ctypes
import ctypes.util
import hashlib
import http.server
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import PICTURES, ROOT, check_one_line, get_output, near, read_answer, run_picture

import classification

KOALA = PICTURES / "koala.jpg"
LABELS = (PICTURES / "imagenet_classes.txt").read_text().splitlines()
CPP = classification.TORCHVISION | {"initial_width": 256, "initial_height": 256}  # of README
CPP |= {"crop": True, "resize": ()}
TORCHVISION = "--scale 0.00392156862745098 --mean 123.675 116.28 103.53 --std 0.229 0.224 0.225"
TORCHVISION += " --rgb --resize 256"


@pytest.fixture
def classify(run, model):
    """classify("picture", options ...): with the small network, in this process."""
    return partial(run, "classification.py", "--input", model)


@pytest.mark.parametrize("options", ["", TORCHVISION, TORCHVISION + " --width 224 --height 224"])
def test_answer_is_pytorchs(classify, small, get_logits, options):
    expected = get_logits(small, KOALA)
    labels = ["--classes", PICTURES / "imagenet_classes.txt"]
    result = classify(KOALA, *labels, *options.split())
    assert read_answer(result) == near(expected)
    class_id = expected.argmax()
    assert f"class ID: {class_id}, label: {LABELS[class_id]}" in result.stdout
    probability = 100 / np.exp(expected.astype(float) - expected.max()).sum()
    lines = result.stdout.splitlines()
    confidence = next(i for i, line in enumerate(lines) if line.startswith("* confidence"))
    assert lines[confidence + 1] == f"* probability: {probability:.1f} %"


def test_engines_agree(classify):
    class_id, confidence = read_answer(classify(KOALA))
    for engine in classification.ENGINES:
        answer = read_answer(classify(KOALA, "--engine", engine))
        assert answer == (class_id, pytest.approx(confidence, abs=1e-4))


def test_a_backend_needs_the_classic_engine(classify, monkeypatch):
    """Which OpenCV's next release has not."""
    engines = {name: n for name, n in classification.ENGINES.items() if name != "classic"}
    monkeypatch.setattr(classification, "ENGINES", engines)
    result = classify(KOALA, "--backend", "opencv")
    check_one_line(result, "--backend opencv", "classic engine", "--engine new")
    assert read_answer(classify(KOALA)) == read_answer(classify(KOALA, "--engine", "new"))


def test_opencv_sample_defaults_if_pixel_values_are_given(run, model, small):
    """--mean alone: scale 1, BGR, no crop, as in OpenCV's sample."""
    bgr = cv2.resize(cv2.imread(str(KOALA)).astype(np.float32), (224, 224)) - [104, 117, 123]
    options = ["--model", model, "--input", KOALA, "--mean", "104", "117", "123"]
    assert read_answer(run("classification.py", *options)) == near(
        run_picture(small, bgr), rel=1e-4
    )


@pytest.mark.parametrize("option", ["--rgb", "--crop"])
def test_switches(classify, option):
    """Bare and with a value; a portrait that is stretched or cropped gives other logits."""
    options = [KOALA, "--initial_width", "600", "--initial_height", "800", option]
    bare, true, *others = (
        read_answer(classify(*options, *value.split()))
        for value in ("", "True", "False", "false", "no", "0")
    )
    assert bare == true != others[0] and others == others[:1] * 4


def test_top_k_is_sorted(classify, small, get_logits):
    expected = np.argsort(-get_logits(small, KOALA))[:3]
    output = get_output(classify(KOALA, "--top_k", "3"))
    assert re.findall(r"class ID: (\d+),", output) == [str(i) for i in expected]


@pytest.mark.parametrize("width", [60, 200, 800, 1600])
def test_text_is_legible_in_the_corner(classify, folder, width):
    """Green text on a dark box in the top left corner, no smaller than 1/50 of the width."""
    original = cv2.resize(cv2.imread(str(KOALA)), (width, width * 4 // 3))
    cv2.imwrite(str(folder / "koala.png"), original)
    (folder / "names.txt").write_text("Kangaroo\n" * 1000)
    get_output(classify("koala.png", "--classes", "names.txt"))
    result = cv2.imread(str(folder / "results" / "koala_small.png")).astype(int)
    blue, green, red = result.transpose(2, 0, 1)
    text = (green > 200) & (blue < 100) & (red < 100)
    rows, columns = np.nonzero(text)
    assert len(rows) > 100
    assert rows.max() < result.shape[0] / 2
    assert columns.min() < result.shape[1] / 20
    filled = text.any(axis=1)
    first_row_height = np.argmin(filled[rows.min() :])
    assert first_row_height >= max(9, result.shape[1] / 50)
    # the rest of the picture is untouched
    size = (result.shape[1], result.shape[0])
    scaled = cv2.resize(original, size, interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(result[-50:] - scaled[-50:]).max() <= 1


def test_random_weights_are_recognized_by_the_name(run, model, folder):
    shutil.copy(model, folder / "net-random.onnx")
    run("classification.py", "--input", "net-random.onnx", KOALA)
    run("classification.py", "--input", model, KOALA)
    marked = cv2.imread(str(folder / "results" / "koala_net-random.jpg")).astype(int)
    plain = cv2.imread(str(folder / "results" / "koala_small.jpg")).astype(int)
    assert (np.abs(marked - plain) > 60).sum() > 500


def test_output_file_and_folder(classify, folder):
    get_output(classify(KOALA, "--output", "a/b.png"))
    assert (folder / "a" / "b.png").read_bytes().startswith(b"\x89PNG")
    for output in ("c", "some.dir/"):
        get_output(classify(KOALA, "--output", output))
        assert (folder / output / "koala_small.jpg").is_file()


def test_no_input_is_overwritten(classify, folder):
    """--output that names it, or two results, gets a number."""
    shutil.copy(KOALA, folder / "koala.jpg")
    output = get_output(classify("koala.jpg", KOALA, "--output", "koala.jpg"))
    saved = re.findall(r"\* saved: (.*)", output)
    assert saved == ["koala_1.jpg", "koala_2.jpg"]
    assert sorted(p.name for p in folder.iterdir()) == ["koala.jpg", *saved]
    assert (folder / "koala.jpg").read_bytes() == KOALA.read_bytes()


@pytest.mark.slow
def test_the_readmes_cpp(folder, execute, model):
    """It compiles against the system's OpenCV, and gives our answer to all pictures."""
    include = Path("/usr/include/opencv4")
    if not (shutil.which("g++") and include.is_dir()):
        pytest.skip("needs g++ and libopencv-dev")
    text = (ROOT / "README.md").read_text()
    (folder / "cls.cpp").write_text(re.search(r"^```cpp\n(.*?)^```$", text, re.M | re.S)[1])
    libraries = [f"-lopencv_{name}" for name in ("dnn", "imgcodecs", "imgproc", "core")]
    get_output(execute("g++", "cls.cpp", "-o", "cls", f"-I{include}", *libraries))
    net, how = cv2.dnn.readNet(str(model)), SimpleNamespace(**CPP)
    pictures = sorted(PICTURES.glob("*.jpg"))
    assert len(pictures) == 12
    for path in pictures:
        net.setInput(classification.get_blob(classification.read_picture(path), how))
        logits = net.forward()[0]
        output = get_output(execute(folder / "cls", model, path))
        class_id, confidence = re.fullmatch(r"class ID: (\d+), confidence: (.*)\n", output).groups()
        assert (int(class_id), float(confidence)) == near(logits, abs=1e-5)


# --- results ------------------------------------------------------------------------------


@pytest.fixture
def small_disk(folder):
    """The folder "small", which is on a disk of 120 KB."""
    (folder / "small").mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", folder / "small"]
    if not shutil.which("mount") or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder / "small"
    subprocess.run(["umount", folder / "small"], check=True)


@pytest.mark.parametrize("suffix, frames", [("avi", 6), ("avi", 60), ("mp4", 60)])
def test_a_video_on_a_full_disk(run, model, folder, small_disk, suffix, frames):
    """An older result stays, and nothing is said to be saved; cv2.VideoWriter says nothing.

    A short .avi names the right number of frames, although it lacks some.
    """
    write_video(folder / "in.avi", frames)
    older = small_disk / f"a.{suffix}"
    older.write_bytes(b"older")
    for cut in (1, 0.7):  # also if the input breaks off
        data = (folder / "in.avi").read_bytes()
        (folder / "in.avi").write_bytes(data[: int(cut * len(data))])
        result = run("classification.py", "--input", model, "in.avi", "--output", older)
        check_one_line(result, f"a.{suffix}: can't be written whole", "disk full", code=1)
        assert "saved" not in result.stdout
        assert [(p.name, p.read_bytes()) for p in small_disk.iterdir()] == [(older.name, b"older")]


def test_pictures_on_a_full_disk(classify, folder, small_disk):
    """No half file; the message names the result; smaller pictures after it are saved."""
    (small_disk / "older_small.png").write_bytes(b"older")
    noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    for name in ("a_large", "older"):
        cv2.imwrite(str(folder / f"{name}.png"), noise)
    cv2.imwrite(str(folder / "z_little.png"), np.zeros((480, 640, 3), np.uint8))
    result = classify("a_large.png", "older.png", "z_little.png", "--output", "small")
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and result.stdout.count("class ID") == 3
    for name, line in zip(("a_large", "older"), lines, strict=True):
        assert f"small/{name}_small.png: can't be written: No space" in line
    assert re.findall("saved: (.*)", result.stdout) == ["small/z_little_small.png"]
    assert {p.name for p in small_disk.iterdir()} == {"older_small.png", "z_little_small.png"}
    assert (small_disk / "older_small.png").read_bytes() == b"older"
    check_one_line(classify("a_large.png", "--output", "small"), "a_large_small.png")


def test_a_result_that_cannot_be_written_is_one_of_several(classify, folder):
    """A folder has its name: the others go on; 2 if there are no others."""
    (folder / "results" / "koala_small.jpg").mkdir(parents=True)
    result = classify(KOALA, PICTURES / "bison.jpg")
    check_one_line(result, "results/koala_small.jpg: can't be written: Is a directory", code=1)
    assert re.findall("saved: (.*)", result.stdout) == ["results/bison_small.jpg"]
    check_one_line(classify(KOALA), "koala_small.jpg")
    assert {p.name for p in (folder / "results").iterdir()} == {
        "koala_small.jpg",
        "bison_small.jpg",
    }


def test_a_name_that_gets_too_long(run, folder, model):
    """75 Chinese letters are 225 bytes; with the model's name, more than file systems take."""
    shutil.copy(model, folder / "a_model_whose_name_is_long.onnx")
    for name in ("猫" * 75, "猫" * 74 + "狗"):
        shutil.copy(KOALA, folder / f"{name}.jpg")
    output = get_output(run("classification.py", "--input", "a_model_whose_name_is_long.onnx", "."))
    saved = re.findall(r"saved: results/(.*)", output)
    assert len(set(saved)) == 2 == len(list((folder / "results").iterdir()))
    for name in saved:
        assert re.fullmatch("猫{60,75}_a_model_whose_name_is_long(_2)?.jpg", name)


def test_no_results(classify, folder):
    write_video(folder / "in.avi", 2)
    output = get_output(classify(KOALA, "in.avi", "--output", "none"))
    assert output.count("class ID") >= 2 and "saved" not in output
    assert [p.name for p in folder.iterdir()] == ["in.avi"]
    get_output(classify(KOALA, "--output", "2024.05.01/"))
    assert (folder / "2024.05.01" / "koala_small.jpg").is_file()
    check_one_line(classify(KOALA, "--output", "2024.05.02"), "a folder a slash at its end")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_names_that_the_terminal_cannot_write(start, model, folder, encoding):
    (folder / "names.txt").write_text("考拉\n" * 1000, "utf-8")
    for name in ("猫.jpg", "b.jpg"):
        shutil.copy(KOALA, folder / name)
    options = ["--input", model, "猫.jpg", "b.jpg", "nope猫.jpg", "--classes", "names.txt"]
    result = start("classification.py", *options, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    check_one_line(result, "nope\\u732b.jpg", code=1)
    assert result.stdout.count("label: \\u8003\\u62c9\n") == 2
    assert "saved: results/\\u732b_small.jpg" in result.stdout
    assert {p.name for p in (folder / "results").iterdir()} == {"猫_small.jpg", "b_small.jpg"}


def test_alone_in_an_empty_folder(folder, execute, model, small, get_logits):
    """The script, a model and a picture; -I -S would hide cv2, so the imports are looked at."""
    for file in (ROOT / "classification.py", model, KOALA):
        shutil.copy(file, folder)
    options = ["-X", "importtime", "classification.py", "--input", "small.onnx", "koala.jpg"]
    result = execute(sys.executable, *options)
    expected = get_logits(small, KOALA).argmax()
    assert f"* class ID: {expected}, label: Class #{expected}" in get_output(result)
    imported = set(re.findall(r"^import time:.*\| +(\w+)", result.stderr, re.M))
    assert "cv2" in imported
    assert not imported & {"torch", "torchvision", "onnx", "matplotlib", "common", "test_config"}
    left = sorted(p.name for p in folder.iterdir() if p.name != "__pycache__")
    assert left == ["classification.py", "koala.jpg", "results", "small.onnx"]


def test_a_file_that_was_changed_is_refused(run, folder, model):
    """One byte in the middle of the weights gives other answers; our entries have the SHA-1."""
    data = bytearray(model.read_bytes())
    (folder / "net.onnx").write_bytes(data)
    entry = f'  load_info: {{ sha1: "{hashlib.sha1(data).hexdigest()}" }}\n'
    entry += '  model: "net.onnx"\n  sample: "classification"\n'
    zoo = f'%YAML 1.0\n---\nnet:\n{entry}  made_from: {{ file: "1", entry: "2" }}\n'
    (folder / "models.yml").write_text(zoo)
    get_output(run("classification.py", "--input", "net.onnx", KOALA))
    data[len(data) // 2] ^= 0x40
    (folder / "net.onnx").write_bytes(data)
    for arguments in (["net", "--input", KOALA], ["--input", "net.onnx", KOALA]):
        check_one_line(run("classification.py", *arguments), "net.onnx", "convert it again")
    # OpenCV's own entries have other hashes, googlenet's that of an empty file
    (folder / "models.yml").write_text(f"%YAML 1.0\n---\nnet:\n{entry}")
    get_output(run("classification.py", "net", "--input", KOALA))


def test_what_no_picture_can_change_is_said_once(classify, folder):
    """Names of other classes end the run; empty lines at the end of the file are no names."""
    (folder / "names.txt").write_text("a name\n" * 1001)
    result = classify(PICTURES, "--classes", "names.txt")
    check_one_line(result, "names.txt: 1001 lines, but the network has 1000 outputs")
    assert "class ID" not in result.stdout
    (folder / "names.txt").write_text("a name\n" * 1000 + "\n\n \n")
    assert "label: a name\n" in get_output(classify(KOALA, "--classes", "names.txt"))
    result = classify(PICTURES, "--classes", "/dev/null")
    check_one_line(result, "/dev/null: 0 lines, but the network has 1000 outputs")


def test_inputs_add_up(classify):
    output = get_output(classify(KOALA, "--input", PICTURES / "bison.jpg", "--input", KOALA))
    assert output.count("* class ID") == 3


def test_a_model_without_its_entry(classify, run, folder, model):
    """Renamed, or moved beside others: what is assumed is said."""
    shutil.copy(model, folder / "new.onnx")
    entry = 'old:\n  model: "old.onnx"\n  sample: "classification"\n'
    (folder / "models.yml").write_text(f"%YAML 1.0\n---\n{entry}")
    result = run("classification.py", "--input", "new.onnx", KOALA)
    check_one_line(result, "NOTE: no entry 'new.onnx' in models.yml: assuming", code=0)
    assert run("classification.py", "old", "--input", KOALA, "new.onnx").stderr == ""
    assert classify(KOALA).stderr == ""  # there is no models.yml


def test_one_bad_picture_of_several(classify, folder):
    """It is reported, the others are classified, and the exit code is 1; 2 if all are bad."""
    (folder / "pictures").mkdir()
    for name in ("a.jpg", "c.jpg"):
        shutil.copy(KOALA, folder / "pictures" / name)
    (folder / "pictures" / "b.jpg").write_bytes(KOALA.read_bytes()[:500])
    result = classify("pictures")
    check_one_line(result, "b.jpg", "truncated", code=1)
    assert result.stdout.count("* class ID") == 2
    result = classify("nope.jpg", KOALA)
    check_one_line(result, "nope.jpg", code=1)
    assert result.stdout.count("* class ID") == 1
    result = classify("nope.jpg", "pictures/b.jpg")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 2)


def test_a_reader_that_has_seen_enough(execute, model):
    """Nothing on stderr, and no traceback: the exit code of a broken pipe."""
    command = f"{sys.executable} {ROOT}/classification.py --input {model} {PICTURES} | head -1"
    result = execute("bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}")
    assert (result.returncode, result.stderr) == (141, "")


SIZES = [(1280, 720), (720, 1280), (4000, 3000), (300, 2000), (1, 1), (20000, 50)]


@pytest.mark.parametrize("size", SIZES)
def test_names_are_legible_in_every_size(size):
    """Green letters of 9 px or more, none in the last column or row; the first synonym only."""
    # the longest, the shortest, and some between
    by_length = sorted(range(1000), key=lambda class_id: len(LABELS[class_id].split(",")[0]))
    for class_id in by_length[:5] + by_length[::50] + by_length[-20:]:
        label = LABELS[class_id]
        logits = np.zeros(1000, np.float32)
        logits[class_id] = 20
        ((_, text),) = classification.get_answers(logits, LABELS, 1)
        assert text == f"{label.split(',')[0]}: 100.0 %"
        picture = np.zeros((size[1], size[0], 3), np.uint8)
        picture = classification.fit(picture, (640, 480), max)
        classification.annotate(picture, [text, "Inference time: 1234.5 ms"])
        assert not picture[-1].any() and not picture[:, -1].any()
        filled = picture[:200, :, 1].max(axis=1) > 200
        first = np.argmax(filled)
        assert filled[first] and np.argmin(filled[first:]) >= 9


@pytest.mark.parametrize("size", SIZES)
def test_as_many_answers_as_fit(size, monkeypatch):
    lines = []
    monkeypatch.setattr(cv2, "putText", lambda picture, text, *args: lines.append(text))
    for count in (1, 5, 40, 5000):
        picture = np.zeros((size[1], size[0], 3), np.uint8)
        picture = classification.fit(picture, (640, 480), max)
        lines.clear()
        classification.annotate(picture, [*(f"answer {i}" for i in range(count)), "time"])
        assert 0 < len(lines) <= picture.shape[0] / 13
        if len(lines) < count + 1:  # nearly all lines that have room
            assert len(lines) > picture.shape[0] / 15 - 1
        kept = lines[: count - 1]
        assert kept == [f"answer {i}" for i in range(len(kept))]


def test_a_line_that_is_cut_says_so(monkeypatch):
    """Or "91.2 %" would be read as "9"."""
    lines = []
    monkeypatch.setattr(cv2, "putText", lambda picture, text, *args: lines.append(text))
    text = "great white shark: 91.2 %"
    for width in (320, 120, 60, 40):
        classification.annotate(np.zeros((480, width, 3), np.uint8), [text])
    assert lines[0] == text
    for line in lines[1:]:
        assert line.endswith("...") and text.startswith(line[:-3])


@pytest.mark.parametrize(
    "outputs, softmax, expected",
    [
        ([0.1, 0.7, 0.2], False, "* confidence: 0.7000\n* probability: 70.0 %\n"),
        ([-1.0, 3.0, 0.0], False, "* confidence: 3.0000\n* probability: 93.6 %\n"),
        ([-1.0, 3.0, 0.0], True, "* confidence: 0.9362\n* probability: 93.6 %\n"),
        ([0.1, 0.7, 0.3], False, "* confidence: 0.7000\n* probability: 45.1 %\n"),
        ([-0.25], False, "x.png:\n* value: -0.2500\n* inference"),
        ([0.25, 0.5526, 0.3], "sigmoid", "* confidence: 0.5526\n* probability: 55.3 %\n"),
        ([0.5526], "sigmoid", "x.png:\n* probability: 55.3 %\n* inference"),
        ([0.1, 0.7, 0.3], "softmax", "* confidence: 0.7000\n* probability: 70.0 %\n"),
    ],
)
def test_outputs_of_every_kind(run, folder, outputs, softmax, expected):
    """Probabilities are taken as they are, and those that an entry says; one has no class."""
    import torch
    from torch import nn

    class Constant(nn.Module):
        def forward(self, x):
            out = 0 * x.mean(dim=(1, 2, 3), keepdim=True).flatten(1) + torch.tensor([outputs])
            return out.softmax(1) if softmax is True else out

    torch.onnx.export(Constant(), torch.zeros(1, 3, 8, 8), str(folder / "c.onnx"), dynamo=False)
    cv2.imwrite(str(folder / "x.png"), np.zeros((8, 8, 3), np.uint8))
    if isinstance(softmax, str):
        entry = f'c:\n  model: "c.onnx"\n  activation: "{softmax}"\n  sample: "classification"\n'
        (folder / "models.yml").write_text(f"%YAML 1.0\n---\n{entry}")
    result = run("classification.py", "--input", "c.onnx", "x.png", "--width", 8, "--height", 8)
    assert expected in result.stdout, result.stderr
    assert ("class ID" in result.stdout) == (len(outputs) > 1)


def test_results_never_overwrite_each_other(classify, folder):
    """Nor an input, and nothing is said to be saved that isn't there."""
    for name in ("a/cat.png", "b/cat.png", "b/cat.bmp", "b/Cat.png", "results/cat_small.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / name), np.full((9, 9, 3), len(name), np.uint8))
    before = (folder / "results" / "cat_small.png").read_bytes()
    sources = ["a/cat.png", "b", "results/cat_small.png", "a/cat.png"]
    saved = re.findall(r"\* saved: (.*)", classify(*sources).stdout)
    assert len(saved) == len({name.lower() for name in saved}) == 6
    found = {str(p.relative_to(folder)) for p in (folder / "results").iterdir()}
    assert found == {*saved, "results/cat_small.png"}
    assert (folder / "results" / "cat_small.png").read_bytes() == before
    saved = re.findall(
        r"\* saved: (.*)", classify("a/cat.png", "b/Cat.png", "--output", "c").stdout
    )
    assert saved == ["c/cat_small.png", "c/Cat_small_2.png"]


def write_video(path, count):
    """Koala and frying pan in turn, 10 frames a second; return the two."""
    names = ("koala.jpg", "frying_pan.jpg")
    frames = [cv2.resize(cv2.imread(str(PICTURES / name)), (640, 480)) for name in names]
    fourcc = cv2.VideoWriter_fourcc(*("MJPG" if path.suffix == ".avi" else "mp4v"))
    writer = cv2.VideoWriter(str(path), fourcc, 10, (640, 480))
    for number in range(count):
        writer.write(frames[number % 2])
    writer.release()
    return frames


@pytest.mark.parametrize(
    "name, keep", [("in.avi", 0.4), ("in.avi", 0.7), ("in.avi", 1), ("in.mp4", 0.5), ("in.mp4", 0)]
)
def test_a_truncated_video_is_said(run, model, folder, name, keep):
    """What can be read is classified and saved; the last line says how much that is."""
    write_video(folder / name, 24)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(keep * len(data))])
    result = run("classification.py", "--input", model, name)
    if name == "in.mp4":  # its index is at the end
        check_one_line(result, "in.mp4: truncated, or not a picture, video or camera")
        return
    capture = cv2.VideoCapture(str(folder / "results" / "in_small.avi"))
    saved = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if keep == 1:
        assert (result.returncode, result.stderr, saved) == (0, "", 24)
    else:
        check_one_line(result, "in.avi", "truncated", f"{saved} of 24 frames", code=1)
        assert 5 < saved < 20


def vary_rate(path):
    """Take the frames 4 to 19 out of an .avi of 24; as for other containers, its header stays."""
    data = path.read_bytes()
    start = data.index(b"movi") + 4
    place, chunks = start, []
    while data[place : place + 4] == b"00dc":
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        chunks.append(data[place : place + 8 + size + size % 2])
        place += len(chunks[-1])
    assert len(chunks) == 24
    movi = b"".join(b"00dc\0\0\0\0" if 4 <= n < 20 else chunk for n, chunk in enumerate(chunks))
    head = data[: start - 8] + (4 + len(movi)).to_bytes(4, "little") + b"movi"
    path.write_bytes(head[:4] + (len(head + movi) - 8).to_bytes(4, "little") + head[8:] + movi)


def test_a_video_of_variable_rate_is_complete(run, model, folder):
    """It has 8 of the promised 24 frames, and the last one stands at its end."""
    write_video(folder / "in.avi", 24)
    vary_rate(folder / "in.avi")
    capture = cv2.VideoCapture(str(folder / "in.avi"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 24
    result = run("classification.py", "--input", model, "in.avi")
    assert (get_output(result).count("saved"), result.stderr) == (1, "")
    capture = cv2.VideoCapture(str(folder / "results" / "in_small.avi"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 8
    data = (folder / "in.avi").read_bytes()
    (folder / "in.avi").write_bytes(data[: len(data) // 2])
    result = run("classification.py", "--input", model, "in.avi")
    check_one_line(result, "in.avi: truncated: ", " of 24 frames", code=1)


def test_a_video_of_any_name(classify, folder):
    """What isn't a picture is a video; its name is the result's, in a format that OpenCV writes."""
    write_video(folder / "in.avi", 6)
    for name in ("video", "v.ts", "v.jpg"):
        shutil.copy(folder / "in.avi", folder / name)
        output = get_output(classify(name))
        assert f"{name}, frame 1:" in output and re.search(
            r"saved: results/vi?d?e?o?_small", output
        )
    shutil.copy(KOALA, folder / "picture.mp4")
    assert "saved: results/picture_small.png" in get_output(classify("picture.mp4"))
    for number in range(3):
        cv2.imwrite(str(folder / f"img_{number:03d}.png"), cv2.imread(str(KOALA)))
    assert "img_%03d.png, frame 1:" in get_output(classify("img_%03d.png"))
    capture = cv2.VideoCapture(str(folder / "results" / "img_%03d_small.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    check_one_line(classify("no_%03d.png"), "no_%03d.png: truncated, or not a picture, video")


@pytest.fixture
def server(folder, env):
    """The address of a server of the folder, with a user and a password."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        env["no_proxy"] = "127.0.0.1"
        yield f"http://me:secret@127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_stream(start, model, folder, server):
    write_video(folder / "in.avi", 6)
    url = f"{server}/in.avi?token=a/b#c"
    result = start("classification.py", "--input", model, url)
    assert (
        f"{url}, frame 1:" in get_output(result) and "saved: results/in_small.mp4" in result.stdout
    )
    capture = cv2.VideoCapture(str(folder / "results" / "in_small.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 6
    result = start("classification.py", "--input", model, f"{server}/nope.avi", KOALA)
    check_one_line(result, "/nope.avi: truncated, or not a picture, video or camera", code=1)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("rtsp://me:p@ss@cam.org:554/live/one?a=/b&token=c", "one_net.png"),
        ("rtsp://me:secret@cam/", "cam_net.png"),
        ("rtspsrc location=rtsp://me:secret@cam/live user-pw=secret ! appsink", "live_net.png"),
        ("/dev/video0", "video0_net.png"),
        ("é" * 200, "é" * 116 + "_net.png"),
    ],
)
def test_the_name_of_a_result(name, expected):
    """Without password and query, and 240 bytes at most."""
    assert classification.get_result_name(name, "_net.png") == expected


def test_the_pictures_of_a_folder(classify, folder):
    """All suffixes that OpenCV reads, in any case; nothing hidden, no video."""
    (folder / "in").mkdir()
    picture = cv2.resize(cv2.imread(str(KOALA)), (80, 60))
    names = [f"a{suffix}" for suffix in classification.PICTURES]
    for name in ["B.JPG", *names]:
        kind = ".jp2" if name in ("a.j2c", "a.j2k", "a.jpc", "a.jpf", "a.jpx") else ".png"
        real = Path(name).suffix.lower()
        kind = real if real in (".avif", ".hdr", ".ras", ".tiff", ".webp", ".gif") else kind
        (folder / "in" / name).write_bytes(cv2.imencode(kind, picture)[1])
    for name in ("._a.jpg", "a.mp4", "a.txt", "a.exr"):
        (folder / "in" / name).write_text("no picture")
    output = get_output(classify("in", "--output", "none"))
    assert re.findall("^in/(.*):", output, re.M) == sorted(["B.JPG", *names])


def test_the_systems_reason_comes_first(run, folder, model):
    """Also if --output is of the other kind."""
    shutil.copy(model, folder)
    for name in ("nope.jpg", "nope.mp4", "nope"):
        for output in ("a.png", "a.mp4", "results"):
            result = run("classification.py", "--input", "small.onnx", name, "--output", output)
            check_one_line(result, f"No such file or directory: '{name}'")


def test_a_file_that_may_not_be_read(execute, folder, model):
    command = [sys.executable, ROOT / "classification.py", "--input", model]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may read everything; setpriv would take that right away")
        rights = "-dac_override,-dac_read_search"
        command = ["setpriv", "--bounding-set", rights, "--inh-caps", rights, *command]
    for name in ("denied.jpg", "denied.mp4"):
        shutil.copy(KOALA, folder / name)
        (folder / name).chmod(0)
        check_one_line(execute(*command, name), f"Permission denied: '{name}'")


def test_video_is_annotated_frame_by_frame(run, model, folder):
    frames = write_video(folder / "in.mp4", 6)
    get_output(run("classification.py", "--input", "in.mp4", model))
    capture = cv2.VideoCapture(str(folder / "results" / "in_small.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    saved = []
    while (got := capture.read())[0]:
        saved.append(got[1])
    assert len(saved) == 6
    for number, picture in enumerate(saved):
        # dark box in the corner, the picture itself below, in its order
        frame, other = frames[number % 2], frames[1 - number % 2]
        assert picture[:20, :20].mean() < frame[:20, :20].mean() / 2
        assert np.abs(picture[-100:].astype(int) - frame[-100:]).mean() < 15
        assert np.abs(picture[-100:].astype(int) - other[-100:]).mean() > 30
    (folder / "other" / "in_small.mp4").mkdir(parents=True)
    result = run("classification.py", "--input", "in.mp4", model, "--output", "other")
    check_one_line(result, "in_small.mp4", "can't write this video")


@pytest.mark.parametrize("display", ["", ":77"])
def test_without_a_display_the_result_is_saved(start, model, folder, display):
    """Unset, and set to a server that isn't there: Qt would abort the process at both."""
    result = start("classification.py", "--input", model, KOALA, DISPLAY=display)
    assert "* saved: results/koala_small.jpg" in get_output(result)
    assert result.stderr == ""
    assert (folder / "results" / "koala_small.jpg").is_file()


@pytest.fixture
def display():
    """A virtual display; skipped where there is none, but never in CI."""
    if not (shutil.which("Xvfb") and shutil.which("xdotool")):
        if os.environ.get("CI"):
            pytest.fail("CI needs Xvfb and xdotool")
        pytest.skip("needs Xvfb and xdotool")
    read_end, write_end = os.pipe()
    command = ["Xvfb", "-displayfd", str(write_end), "-screen", "0", "1600x1000x24"]
    server = subprocess.Popen(command, pass_fds=[write_end], stderr=subprocess.DEVNULL)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        yield f":{pipe.readline().strip()}"
    server.terminate()
    server.wait()


def click_close_button(display, window):
    """Send what a window manager sends when its close button is clicked; xdotool can't."""
    x11 = ctypes.CDLL(ctypes.util.find_library("X11"))
    x11.XOpenDisplay.restype, x11.XInternAtom.restype = ctypes.c_void_p, ctypes.c_ulong
    connection = ctypes.c_void_p(x11.XOpenDisplay(display.encode()))
    protocols, delete = (
        x11.XInternAtom(connection, name, 0) for name in (b"WM_PROTOCOLS", b"WM_DELETE_WINDOW")
    )
    # an XClientMessageEvent, in the size of an XEvent
    values = (33, 0, 1, connection.value, window, protocols, 32, delete)
    event = struct.pack("iLiPLLil", *values).ljust(192, b"\0")
    x11.XSendEvent(connection, ctypes.c_ulong(window), 0, ctypes.c_long(0), event)
    x11.XCloseDisplay(connection)


class Shown:
    """The running program, once it shows its window."""

    def __init__(self, process, execute, display):
        self.process, self.display = process, display
        self.xdotool = partial(execute, "xdotool", DISPLAY=display)
        search = ("search", "--sync", "--onlyvisible", "--name", classification.WINDOW)
        # xdotool gives up if the probe's window goes while it looks
        while not (found := self.xdotool(*search).stdout.split()):
            assert process.poll() is None, process.stderr.read().decode()
        self.window = found[0]

    def press(self, key):
        """None: the close button."""
        if key:
            self.xdotool("key", "--window", self.window, key)
        else:
            click_close_button(self.display, int(self.window))

    def read_until(self, text):
        lines = []
        while not lines or text not in lines[-1]:
            lines.append(self.process.stdout.readline().decode())
            assert lines[-1], self.process.stderr.read().decode()
        return lines

    def is_silent(self):
        """Whether nothing more is printed for a while, after what is in the pipe."""
        while select.select([self.process.stdout], [], [], 1.5)[0]:
            if not self.process.stdout.readline():  # the end
                return False
        return self.process.poll() is None

    def check_end(self, code=0, stderr=b""):
        """The program ends by itself; returns what is left of its output."""
        assert self.process.wait(timeout=60) == code
        assert self.process.stderr.read() == stderr
        return self.process.stdout.read()


@pytest.fixture
def in_window(folder, env, execute, model, display):
    """in_window(*sources): the Shown program."""
    processes = []

    def start(*sources):
        command = [sys.executable, "-u", ROOT / "classification.py", "--input", model, *sources]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
        env["DISPLAY"] = display
        processes.append(subprocess.Popen(command, cwd=folder, env=env, **pipes))
        return Shown(processes[0], execute, display)

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("key", ["x", "space"])
def test_a_picture_is_shown_until_a_key(in_window, folder, key):
    shown = in_window(KOALA)
    shown.read_until("saved")
    assert (folder / "results" / "koala_small.jpg").is_file()
    assert shown.is_silent()
    shown.press(key)
    shown.check_end()


@pytest.mark.parametrize("key", ["q", "Escape", None])
def test_quitting_ends_the_program_not_the_picture(in_window, key):
    """q, Esc, and the close button."""
    shown = in_window(PICTURES)
    shown.read_until("saved")
    shown.press(key)
    assert shown.check_end().count(b"class ID") < 11


def test_a_folder_advances(in_window):
    shown = in_window(PICTURES)
    shown.read_until("saved")
    shown.read_until("frying_pan.jpg:")  # without a key
    while shown.process.poll() is None:  # a slow machine takes several keys for one
        shown.press("x")
    shown.check_end()


def test_a_video_is_shown(in_window, folder):
    write_video(folder / "in.avi", 400)
    shown = in_window("in.avi")
    shown.read_until("frame 3:")
    shown.press("x")
    shown.read_until("inference time")
    shown.press("q")
    shown.check_end()
    assert not (folder / "results").exists()


def test_nothing_is_shown_if_you_say_so(execute, model, display):
    command = [sys.executable, ROOT / "classification.py", "--input", model, PICTURES]
    output = get_output(execute(*command, "--show", "False", DISPLAY=display))
    assert output.count("saved") == 12


def test_ctrl_c_with_a_window(in_window):
    shown = in_window(KOALA)
    shown.read_until("saved")
    shown.process.send_signal(signal.SIGINT)
    shown.check_end(130, b"classification.py: stopped by Ctrl-C\n")
