"""classification.py: its answers, what it saves, and that it stands alone."""

import ast
import os
import shutil
import signal
import subprocess
import sys

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
    result = run("classification.py", "--input", KOALA, model, *options.split())
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
    shutil.copy(KOALA, folder / "koala.jpg")
    result = run("classification.py", "--input", model, "koala.jpg", "--output", "koala.jpg")
    check_one_line(result, "koala.jpg", "input")
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


def test_only_common_imports_from_classification():
    """The sample is copied by itself; the other scripts have one door to it."""
    importers = set()
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            if "classification" in names:
                importers.add(path.name)
    assert importers == {"common.py"}


def test_a_file_that_was_changed_is_refused(run, folder, converted):
    """One byte in the middle of the weights gives other answers; the entry has the SHA-1."""
    from common import TORCHVISION_PREPROCESSING, add_to_zoo
    from conversion import Converted

    path = folder / "net.onnx"
    data = bytearray(converted.read_bytes())
    path.write_bytes(data)
    add_to_zoo("net", Converted(path, ["new"], 1000), TORCHVISION_PREPROCESSING, None)
    assert run("classification.py", "--input", path, KOALA).returncode == 0
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    for arguments in (["net", "--zoo", folder / "models.yml", "--input", KOALA], ["--input", path]):
        check_one_line(run("classification.py", *arguments), "net.onnx", "convert it again")


def test_one_bad_picture_of_several(run, model, folder):
    """It is reported, the others are classified, and the exit code is 1."""
    (folder / "pictures").mkdir()
    for name in ("a.jpg", "c.jpg"):
        shutil.copy(KOALA, folder / "pictures" / name)
    (folder / "pictures" / "b.jpg").write_bytes(KOALA.read_bytes()[:500])
    result = run("classification.py", "--input", model, "pictures")
    check_one_line(result, "b.jpg", "truncated", code=1)
    assert result.stdout.count("* class ID") == 2


@pytest.mark.parametrize("stdout", ["| head -1", ">&-"])
def test_a_reader_that_has_seen_enough(folder, env, model, stdout):
    """Nothing on stderr, and no traceback: the exit code of a broken pipe, or a closed stdout."""
    script = [sys.executable, ROOT / "classification.py", "--input", model, PICTURES]
    command = f"{' '.join(map(str, script))} {stdout}; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True
    )
    assert result.stderr == ""
    assert result.returncode == (141 if "head" in stdout else 0)


def test_quoted_lists(run, model):
    options = ["--input", model, KOALA, "--scale", "0.01", "--std", "1", "2", "3"]
    plain = run("classification.py", *options, "--mean", "10", "20", "30")
    quoted = run("classification.py", *options, "--mean", "10 20 30")
    assert "mean 10 20 30" in plain.stdout and plain.returncode == 0
    assert read_answer(quoted.stdout) == read_answer(plain.stdout)


@pytest.mark.parametrize("width", [100, 320, 640, 800, 1280, 1920, 4000])
def test_a_long_line_ends_within_the_picture(width):
    """The warning of random weights, the longest of our own, has a margin at its right."""
    lines = ["fig: 2.0103", "Inference time: 115.5 ms", classification.RANDOM_WARNING]
    picture = classification.annotate(np.zeros((width, width, 3), np.uint8), lines)
    columns = np.nonzero(picture.any(axis=(0, 2)))[0]
    assert width / 4 < columns.max() < width - 1


def test_video_is_annotated_frame_by_frame(run, model, folder):
    frames = [
        cv2.resize(cv2.imread(str(PICTURES / n)), (640, 480)) for n in ("koala.jpg", "bison.jpg")
    ]
    fourcc = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(folder / "in.mp4"), fourcc, 10, (640, 480))
    for frame in frames * 3:
        writer.write(frame)
    writer.release()
    result = run("classification.py", "--input", "in.mp4", model)
    assert result.returncode == 0, result.stderr
    assert "6 of 6 frames, " in result.stdout and " frames per second" in result.stdout
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


def test_window_is_closed_by_any_key(folder, env, model, display):
    command = [sys.executable, str(ROOT / "classification.py"), "--input", str(model), str(KOALA)]
    env = env | {"DISPLAY": display}
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    search = [
        "xdotool",
        "search",
        "--sync",
        "--onlyvisible",
        "--name",
        "Classification with OpenCV",
    ]
    window = subprocess.run(search, env=env, capture_output=True, text=True, timeout=60).stdout
    # saved before it is shown, and shown until a key is pressed
    assert (folder / "results" / "koala_small.jpg").is_file()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    key = ["xdotool", "key", "--window", window.split()[0], "space"]
    subprocess.run(key, env=env, check=True, timeout=60)
    assert process.wait(timeout=60) == 0


def test_ctrl_c_with_a_window(folder, env, model, display):
    command = [sys.executable, str(ROOT / "classification.py"), "--input", str(model), str(KOALA)]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env | {"DISPLAY": display},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "saved" in line:
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr and "Ctrl-C" in stderr
