"""classification.py: its answers, what it saves, and that it stands alone."""

import ctypes
import ctypes.util
import hashlib
import os
import re
import runpy
import select
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import PICTURES, ROOT, check_one_line, read_answer

import classification

KOALA = PICTURES / "koala.jpg"
LABELS = (PICTURES / "imagenet_classes.txt").read_text().splitlines()
TORCHVISION = "--scale 0.00392156862745098 --mean 123.675 116.28 103.53 --std 0.229 0.224 0.225"
TORCHVISION += " --crop --rgb --initial_width 256 --initial_height 256"


@pytest.mark.parametrize("options", ["", TORCHVISION, TORCHVISION + " --width 224 --height 224"])
def test_answer_is_pytorchs(run, model, small, get_logits, options):
    expected = get_logits(small, KOALA, centre_crop=False)
    labels = ["--classes", PICTURES / "imagenet_classes.txt"]
    result = run("classification.py", "--input", KOALA, model, *labels, *options.split())
    assert result.returncode == 0, result.stderr
    class_id, confidence = read_answer(result.stdout)
    assert class_id == expected.argmax()
    assert confidence == pytest.approx(expected.max(), abs=1e-4)
    assert f"class ID: {class_id}, label: {LABELS[class_id]}" in result.stdout


def test_engines_agree(run, model):
    answers = [
        read_answer(run("classification.py", "--input", model, KOALA, "--engine", engine).stdout)
        for engine in ("auto", "new", "classic")
    ]
    assert answers[0][0] == answers[1][0] == answers[2][0]
    assert answers[1][1] == pytest.approx(answers[2][1], abs=1e-4)


@pytest.mark.parametrize("said", ["YES (ver 1.25.1)", "NO"])
def test_onnx_runtime_is_offered_where_it_is(monkeypatch, said):
    """OpenCV 5.0.0 names the engine in every build, and takes another one without a word."""
    build = re.sub(r"(ONNX Runtime: +)NO", rf"\g<1>{said}", cv2.getBuildInformation())
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: build)
    engines = runpy.run_path(str(ROOT / "classification.py"))["ENGINES"]
    assert ("ort" in engines) == said.startswith("YES")


def test_opencv_sample_defaults_if_pixel_values_are_given(run, model, small):
    """--mean alone: scale 1, BGR, no crop, as in OpenCV's sample."""
    import torch

    bgr = cv2.resize(cv2.imread(str(KOALA)).astype(np.float32), (224, 224)) - [104, 117, 123]
    with torch.no_grad():
        tensor = torch.from_numpy(bgr.astype(np.float32)).permute(2, 0, 1)[None]
        expected = small(tensor)[0].numpy()
    options = ["--model", model, "--input", KOALA, "--mean", "104", "117", "123"]
    class_id, confidence = read_answer(run("classification.py", *options).stdout)
    assert class_id == expected.argmax()
    assert confidence == pytest.approx(expected.max(), rel=1e-4)


@pytest.mark.parametrize("no", ["False", "false", "no", "0"])
def test_crop_false_means_false(run, model, no):
    """A portrait that is stretched or cropped gives other logits."""
    options = ["--input", model, KOALA, "--initial_width", "600", "--initial_height", "800"]
    cropped = [run("classification.py", *options, "--crop", *v) for v in ([], ["True"])]
    stretched = run("classification.py", *options, "--crop", no)
    assert read_answer(cropped[0].stdout) == read_answer(cropped[1].stdout)
    assert read_answer(stretched.stdout) != read_answer(cropped[0].stdout)


def test_rgb_bare_and_with_a_value(run, model):
    answers = [
        read_answer(run("classification.py", "--input", model, KOALA, "--rgb", *value).stdout)
        for value in ([], ["True"], ["False"])
    ]
    assert answers[0] == answers[1] != answers[2]


def test_top_k_is_sorted(run, model, small, get_logits):
    expected = np.argsort(-get_logits(small, KOALA, centre_crop=False))[:3]
    result = run("classification.py", "--input", model, KOALA, "--top_k", "3")
    ids = [line.split()[3] for line in result.stdout.splitlines() if "class ID" in line]
    assert ids == [f"{i}," for i in expected]


def test_model_alone_classifies_the_bundled_picture(run, model, folder):
    result = run("classification.py", "--input", model)
    assert result.returncode == 0
    assert (folder / "results" / "red_panda_small.jpg").is_file()


def test_folder_and_several_pictures(run, model, folder):
    result = run("classification.py", "--input", PICTURES, model)
    assert result.returncode == 0
    pictures = sorted(PICTURES.glob("*.jpg"))
    assert result.stdout.count("* class ID") == len(pictures) == 12
    for picture in pictures:
        saved = cv2.imread(str(folder / "results" / f"{picture.stem}_small.jpg"))
        assert saved.shape[1] >= 320


@pytest.mark.parametrize("width", [60, 200, 800, 4000])
def test_text_is_legible_in_the_corner(run, model, folder, width):
    """Green text on a dark box in the top left corner, no smaller than 1/50 of the width."""
    original = cv2.resize(cv2.imread(str(KOALA)), (width, width * 4 // 3))
    cv2.imwrite(str(folder / "koala.png"), original)
    (folder / "names.txt").write_text("Kangaroo\n" * 1000)
    options = ["--input", model, "koala.png", "--classes", "names.txt"]
    assert run("classification.py", *options).returncode == 0
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


def test_output_file_and_folder(run, model, folder):
    assert run("classification.py", "--input", model, KOALA, "--output", "a/b.png").returncode == 0
    assert (folder / "a" / "b.png").read_bytes().startswith(b"\x89PNG")
    assert run("classification.py", "--input", model, KOALA, "--output", "c").returncode == 0
    assert (folder / "c" / "koala_small.jpg").is_file()


def test_no_input_is_overwritten(run, model, folder):
    """--output that names it, or two results, gets a number."""
    shutil.copy(KOALA, folder / "koala.jpg")
    options = ["--output", "koala.jpg"]
    result = run("classification.py", "--input", model, "koala.jpg", KOALA, *options)
    saved = re.findall(r"\* saved: (.*)", result.stdout)
    assert saved == ["koala_1.jpg", "koala_2.jpg"]
    assert sorted(p.name for p in folder.iterdir()) == ["koala.jpg", *saved]
    assert (folder / "koala.jpg").read_bytes() == KOALA.read_bytes()


def test_alone_in_an_empty_folder(folder, env, model, small, get_logits):
    """The script, a model and a picture; -I -S would hide cv2, so the imports are looked at."""
    for file in (ROOT / "classification.py", model, KOALA):
        shutil.copy(file, folder)
    command = [sys.executable, "-X", "importtime", "classification.py"]
    command += ["--input", "small.onnx", "koala.jpg"]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = get_logits(small, KOALA, centre_crop=False).argmax()
    assert f"* class ID: {expected}, label: Class #{expected}" in result.stdout
    imported = {
        line.rpartition("|")[2].strip().split(".")[0] for line in result.stderr.splitlines()
    }
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
    assert run("classification.py", "--input", "net.onnx", KOALA).returncode == 0
    data[len(data) // 2] ^= 0x40
    (folder / "net.onnx").write_bytes(data)
    for arguments in (["net", "--input", KOALA], ["--input", "net.onnx", KOALA]):
        check_one_line(run("classification.py", *arguments), "net.onnx", "convert it again")
    # OpenCV's own entries have other hashes, googlenet's that of an empty file
    (folder / "models.yml").write_text(f"%YAML 1.0\n---\nnet:\n{entry}")
    assert run("classification.py", "net", "--input", KOALA).returncode == 0


def test_one_bad_picture_of_several(run, model, folder):
    """It is reported, the others are classified, and the exit code is 1; 2 if all are bad."""
    (folder / "pictures").mkdir()
    for name in ("a.jpg", "c.jpg"):
        shutil.copy(KOALA, folder / "pictures" / name)
    (folder / "pictures" / "b.jpg").write_bytes(KOALA.read_bytes()[:500])
    result = run("classification.py", "--input", model, "pictures")
    check_one_line(result, "b.jpg", "truncated", code=1)
    assert result.stdout.count("* class ID") == 2
    result = run("classification.py", "--input", model, "nope.jpg", KOALA)
    check_one_line(result, "nope.jpg", code=1)
    assert result.stdout.count("* class ID") == 1
    result = run("classification.py", "--input", model, "nope.jpg", "pictures/b.jpg")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 2)


def test_a_reader_that_has_seen_enough(folder, env, model):
    """Nothing on stderr, and no traceback: the exit code of a broken pipe."""
    script = [sys.executable, ROOT / "classification.py", "--input", model, PICTURES]
    command = f"{' '.join(map(str, script))} | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (141, "")


SIZES = [(1280, 720), (720, 1280), (4000, 3000), (300, 2000), (1, 1), (20000, 50)]


@pytest.mark.parametrize("size", SIZES)
def test_every_name_is_legible_in_every_size(size):
    """Green letters of 9 px or more, none in the last column or row; the first synonym only."""
    for class_id, label in enumerate(LABELS):
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
            assert lines.pop() == f"... and {count - len(lines)} more"
        assert (
            lines[: count - 1] == [f"answer {i}" for i in range(count)][: len(lines)][: count - 1]
        )


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


def test_probability_is_softmax(run, model, small, get_logits):
    logits = get_logits(small, KOALA, centre_crop=False).astype(float)
    expected = 100 * np.exp(logits.max()) / np.exp(logits).sum()
    lines = run("classification.py", "--input", model, KOALA).stdout.splitlines()
    confidence = next(i for i, line in enumerate(lines) if line.startswith("* confidence"))
    assert lines[confidence + 1] == f"* probability: {expected:.1f} %"


@pytest.mark.parametrize(
    "outputs, softmax, expected",
    [
        ([0.1, 0.7, 0.2], False, "* confidence: 0.7000\n* probability: 70.0 %\n"),
        ([-1.0, 3.0, 0.0], False, "* confidence: 3.0000\n* probability: 93.6 %\n"),
        ([-1.0, 3.0, 0.0], True, "* confidence: 0.9362\n* probability: 93.6 %\n"),
        ([0.1, 0.7, 0.3], False, "* confidence: 0.7000\n* probability: 45.1 %\n"),
        ([-0.25], False, "x.png:\n* value: -0.2500\n* inference"),
    ],
)
def test_outputs_of_every_kind(run, folder, outputs, softmax, expected):
    """Probabilities are taken as they are; a single output has no class."""
    import torch
    from torch import nn

    class Constant(nn.Module):
        def forward(self, x):
            out = 0 * x.mean(dim=(1, 2, 3), keepdim=True).flatten(1) + torch.tensor([outputs])
            return out.softmax(1) if softmax else out

    torch.onnx.export(Constant(), torch.zeros(1, 3, 8, 8), str(folder / "c.onnx"), dynamo=False)
    cv2.imwrite(str(folder / "x.png"), np.zeros((8, 8, 3), np.uint8))
    result = run("classification.py", "--input", "c.onnx", "x.png", "--width", 8, "--height", 8)
    assert expected in result.stdout, result.stderr
    assert ("class ID" in result.stdout) == (len(outputs) > 1)


def test_results_never_overwrite_each_other(run, model, folder):
    """Nor an input, and nothing is said to be saved that isn't there."""
    for name in ("a/cat.png", "b/cat.png", "b/cat.bmp", "b/Cat.png", "results/cat_small.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / name), np.full((9, 9, 3), len(name), np.uint8))
    before = (folder / "results" / "cat_small.png").read_bytes()
    sources = ["a/cat.png", "b", "results/cat_small.png", "a/cat.png"]
    result = run("classification.py", "--input", model, *sources)
    saved = re.findall(r"\* saved: (.*)", result.stdout)
    assert len(saved) == len({name.lower() for name in saved}) == 6
    assert {str(p.relative_to(folder)) for p in (folder / "results").iterdir()} == {
        *saved,
        "results/cat_small.png",
    }
    assert (folder / "results" / "cat_small.png").read_bytes() == before


def write_video(path, count):
    """Koala and tripod in turn, 10 frames a second; return the two."""
    names = ("koala.jpg", "camera_tripod.jpg")
    frames = [cv2.resize(cv2.imread(str(PICTURES / name)), (640, 480)) for name in names]
    fourcc = cv2.VideoWriter_fourcc(*("MJPG" if path.suffix == ".avi" else "mp4v"))
    writer = cv2.VideoWriter(str(path), fourcc, 10, (640, 480))
    for number in range(count):
        writer.write(frames[number % 2])
    writer.release()
    return frames


@pytest.mark.parametrize("keep", [0.4, 0.7, 1])
def test_a_truncated_video_is_said(start, model, folder, keep):
    """What can be read is classified and saved; the last line says how much that is."""
    write_video(folder / "whole.avi", 24)
    data = (folder / "whole.avi").read_bytes()
    (folder / "in.avi").write_bytes(data[: int(keep * len(data))])
    result = start("classification.py", "--input", model, "in.avi")
    capture = cv2.VideoCapture(str(folder / "results" / "in_small.avi"))
    saved = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if keep == 1:
        assert (result.returncode, result.stderr, saved) == (0, "", 24)
    else:
        check_one_line(result, "in.avi", "truncated", f"{saved} of 24 frames", code=1)
        assert 5 < saved < 20


def test_video_is_annotated_frame_by_frame(run, model, folder):
    frames = write_video(folder / "in.mp4", 6)
    result = run("classification.py", "--input", "in.mp4", model)
    assert result.returncode == 0, result.stderr
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
    assert result.returncode == 0
    assert result.stderr == ""
    assert "* saved: results/koala_small.jpg" in result.stdout
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

    class ClientMessage(ctypes.Structure):  # XClientMessageEvent, as large as XEvent
        _fields_ = [
            ("type", ctypes.c_int),
            ("serial", ctypes.c_ulong),
            ("send_event", ctypes.c_int),
            ("display", ctypes.c_void_p),
            ("window", ctypes.c_ulong),
            ("message_type", ctypes.c_ulong),
            ("format", ctypes.c_int),
            ("data", ctypes.c_long * 20),
        ]

    x11 = ctypes.CDLL(ctypes.util.find_library("X11"))
    x11.XOpenDisplay.restype, x11.XInternAtom.restype = ctypes.c_void_p, ctypes.c_ulong
    connection = ctypes.c_void_p(x11.XOpenDisplay(display.encode()))
    protocols, delete = (
        x11.XInternAtom(connection, name, 0) for name in (b"WM_PROTOCOLS", b"WM_DELETE_WINDOW")
    )
    event = ClientMessage(33, 0, 1, connection, window, protocols, 32)
    event.data[0] = delete
    x11.XSendEvent(connection, ctypes.c_ulong(window), 0, ctypes.c_long(0), ctypes.byref(event))
    x11.XCloseDisplay(connection)


@pytest.fixture
def in_window(folder, env, model, display):
    """in_window(*sources): the running program once it shows its window, with press(key)."""
    processes = []

    def start(*sources):
        command = [sys.executable, "-u", ROOT / "classification.py", "--input", model, *sources]
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            env=env | {"DISPLAY": display},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        processes.append(process)

        def xdotool(*arguments):
            result = subprocess.run(
                ["xdotool", *arguments],
                env=env | {"DISPLAY": display},
                capture_output=True,
                text=True,
                timeout=60,
            )
            return result.stdout.split()

        def read_until(text):
            lines = []
            while not lines or text not in lines[-1]:
                lines.append(process.stdout.readline().decode())
                assert lines[-1], process.stderr.read().decode()
            return lines

        def is_silent():
            """Whether nothing more is printed for a while, after what is in the pipe."""
            while select.select([process.stdout], [], [], 1.5)[0]:
                if not process.stdout.readline():  # the end
                    return False
            return process.poll() is None

        search = ("search", "--sync", "--onlyvisible", "--name", classification.WINDOW)
        # xdotool gives up if the probe's window goes while it looks
        while not (found := xdotool(*search)):
            assert process.poll() is None, process.stderr.read().decode()
        window = found[0]
        return SimpleNamespace(
            process=process,
            read_until=read_until,
            is_silent=is_silent,
            press=lambda key: xdotool("key", "--window", window, key),
            close=lambda: click_close_button(display, int(window)),
        )

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("key", ["x", "space", "q", "Escape", None])
def test_a_picture_is_shown_until_a_key_or_the_close_button(in_window, folder, key):
    shown = in_window(KOALA)
    lines = shown.read_until("saved")
    assert sum(line.startswith("keys in the window: q or Esc") for line in lines) == 1
    assert (folder / "results" / "koala_small.jpg").is_file()
    for modifier in ("Shift_L", "Control_R", "Alt_L", "Super_L", "ISO_Level3_Shift", "Caps_Lock"):
        shown.press(modifier)
    assert shown.is_silent()
    if key:
        shown.press(key)
    else:
        shown.close()
    assert shown.process.wait(timeout=60) == 0
    assert shown.process.stderr.read() == b""


@pytest.mark.parametrize("key", ["q", "Escape", None])
def test_quitting_ends_the_program_not_the_picture(in_window, key):
    shown = in_window(PICTURES)
    shown.read_until("saved")
    if key:
        shown.press(key)
    else:
        shown.close()
    assert shown.process.wait(timeout=60) == 0
    assert shown.process.stdout.read().count(b"class ID") < 11


def test_a_folder_advances_and_space_pauses(in_window):
    shown = in_window(PICTURES)
    shown.read_until("saved")
    shown.read_until("saved")  # without a key
    shown.press("space")
    assert shown.is_silent()
    shown.press("x")
    shown.read_until("frying_pan.jpg:")
    for _ in range(12):  # faster than a second each
        shown.press("x")
    assert shown.process.wait(timeout=60) == 0


def test_space_pauses_a_video(in_window, folder):
    write_video(folder / "in.avi", 400)
    shown = in_window("in.avi")
    shown.read_until("frame 3:")
    shown.press("space")
    assert shown.is_silent()
    shown.press("Shift_L")
    assert shown.is_silent()
    shown.press("x")
    shown.read_until("inference time")
    shown.press("q")
    assert shown.process.wait(timeout=60) == 0
    assert not (folder / "results").exists()


def test_ctrl_c_with_a_window(in_window):
    shown = in_window(KOALA)
    shown.read_until("saved")
    shown.process.send_signal(signal.SIGINT)
    assert shown.process.wait(timeout=60) == 130
    assert shown.process.stderr.read() == b"classification.py: stopped by Ctrl-C\n"
