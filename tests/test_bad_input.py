"""What bad input gets: one line on stderr, exit 2, nothing half-written."""

import os
import shlex
import shutil
import subprocess

import cv2
import numpy as np
import pytest
from conftest import PICTURES, check_one_line, get_output, read_answer, slow

from classification import RequestError
from networks import Request, load_network

KOALA = PICTURES / "koala.jpg"


def check_nothing_written(folder, *expected):
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found == set(expected)


@pytest.fixture(scope="session")
def bad(model, tmp_path_factory):
    """A folder of files that are damaged, or not what their names say."""
    import torch
    from torch import nn

    class Two(nn.Module):
        """Two outputs, of which OpenCV's engines would return different ones."""

        def forward(self, x):
            return x.mean(dim=(2, 3)), x.amax(dim=(2, 3))

    bad = tmp_path_factory.mktemp("bad")
    picture = cv2.imread(str(KOALA))
    for source, sizes in ((KOALA, (0, 100, 60_000)), (model, (0, 300, 30_000))):
        for size in sizes:
            (bad / f"{size}{source.suffix}").write_bytes(source.read_bytes()[:size])
    for suffix in ("bmp", "webp", "tif", "gif"):
        data = cv2.imencode(f".{suffix}", picture)[1].tobytes()
        (bad / f"half.{suffix}").write_bytes(data[: len(data) // 2])
    for name in ("page.jpg", "page.png", "note.txt", "no.mp4"):
        (bad / name).write_text("<html>404</html>")
    (bad / "long.txt").write_text("a line of text\n" * 300)
    (bad / "empty").mkdir()
    (bad / "three.txt").write_text("cat\ndog\nfox\n")
    cv2.imwrite(str(bad / "float.tiff"), np.full((9, 9, 3), 0.5, np.float32))
    cv2.imwrite(str(bad / "wide.png"), np.zeros((1, 70000, 3), np.uint8))  # JPEG ends at 65535
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)).eval()
    # the answer of the third is finite even if a picture is infinite
    clipped = nn.Sequential(nn.ReLU6(), nn.AvgPool2d(8), nn.Flatten())
    for name, network in (("fixed", fixed), ("two", Two()), ("clipped", clipped)):
        torch.onnx.export(network, torch.zeros(1, 3, 8, 8), str(bad / f"{name}.onnx"), dynamo=False)
    return bad


# --- classification.py --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ("MODEL koala.jpg", "No such file ... koala.jpg"),
        *((f"MODEL BAD/{n}.jpg", f"{n}.jpg: truncated") for n in (0, 100, 60_000)),
        *((f"MODEL BAD/half.{end}", f"half.{end}: ") for end in ("bmp", "webp", "tif", "gif")),
        *((f"MODEL BAD/page.{end}", f"page.{end} ... not a picture") for end in ("jpg", "png")),
        ("MODEL BAD/note.txt", "note.txt ... not a picture"),
        ("MODEL BAD/long.txt", "long.txt ... not a picture, video"),  # of FFmpeg's letters
        ("MODEL BAD/empty", "empty: no picture"),
        ("MODEL BAD/float.tiff", "float.tiff: ... as 8 bits"),
        ("MODEL 0", "0: truncated, or not ... camera"),
        ("MODEL 99999999999", "OpenCV"),
        ("net.onnx KOALA", "net.onnx: no such file"),
        *((f"BAD/{n}.onnx KOALA", f"{n}.onnx: ... truncated") for n in (0, 300, 30_000)),
        ("BAD/fixed.onnx KOALA", "224x224 ... --width"),
        ("BAD/two.onnx KOALA --width 8 --height 8 --classes BAD/three.txt", "not a classifier"),
        ("KOALA", "0 models"),
        ("MODEL b.onnx KOALA", "2 models"),
        ("MODEL KOALA --classes nope.txt", "nope.txt"),
        ("MODEL KOALA --config \udcff", "rename it"),
        ("BAD/clipped.onnx KOALA --scale 1e38 --width 8 --height 8", "nan or inf"),
        ("MODEL KOALA --classes BAD/three.txt", "three.txt: 3 lines ... 1000 outputs"),
        ("MODEL KOALA --classes /dev/null", "/dev/null: 0 lines ... 1000 outputs"),
        ("MODEL KOALA --classes KOALA", "not a text file"),
        # said before the first frame
        ("MODEL BAD/no.mp4 --output x.png", "x.png ... .mp4 or .avi"),
        ("MODEL BAD/no.mp4 --output x.pgm", "x.pgm ... .mp4 or .avi"),
        ("MODEL BAD/no.mp4 --output results.d/x.jpg", "results.d/x.jpg ... .mp4 or .avi"),
        *((f"MODEL KOALA --output a.{end}", f"a.{end}: a picture needs .png or .jpg")
          for end in ("xyz", "pgm", "mp4")),
        ("MODEL KOALA --output /dev/full/a.png", "/dev/full"),
        ("MODEL BAD/wide.png --output wide.jpg", "wide.jpg ... try .png"),
        ("MODEL KOALA --mean 1 2", "--mean"),
        ("MODEL KOALA --mean 1 2 3 4", "4"),
        ("MODEL KOALA --mean a 2 3", "--mean: invalid finite value: 'a'"),
        ("MODEL KOALA --mean nan 2 3", "--mean: invalid finite value: 'nan'"),
        ("MODEL KOALA --std 1 2", "--std"),
        ("MODEL KOALA --std 1 0 1", "--std: invalid non_zero value: '0'"),
        ("MODEL KOALA --std 1 x 1", "--std: invalid non_zero value: 'x'"),
        ("MODEL KOALA --scale inf", "--scale: invalid non_zero value: 'inf'"),
        ("MODEL KOALA --width 0", "--width"),
        ("MODEL KOALA --initial_width 256", "go together"),
        ("MODEL KOALA --resize 256 --crop True", "--crop excludes --resize"),
        ("MODEL KOALA --resize 1 2 3", "--resize takes the shorter side"),
        ("MODEL KOALA --resize 256 --center first", "--center first needs --resize 224 224"),
        ("MODEL KOALA --crop --interpolation bicubic", "--interpolation needs --resize"),
        ("MODEL KOALA --mean 0.5 0.5 0.5 --scale 0.0039", "give --mean 127.5 127.5 127.5"),
        ("MODEL KOALA --crop maybe", "--crop: invalid boolean value: 'maybe'"),
        ("MODEL KOALA --top_k 0", "--top_k"),
        ("MODEL KOALA --engine fast", "--engine"),
        ("MODEL KOALA --engine ort", "--engine: invalid choice: 'ort'"),
        ("MODEL KOALA --backend cuda --target cuda", "no --target cuda"),
        ("MODEL KOALA --modle x", "--modle"),
        # no memory holds it
        ("MODEL KOALA --width 60000 --height 60000", "--width: must be from 1 to 8192"),
        ("MODEL KOALA --resize 60000 --interpolation cv2-area", "8192, not 60000"),
        ("MODEL KOALA --initial_width 60000 --initial_height 60000", "8192, not 60000"),
    ],
)  # fmt: skip
def test_classification(run, folder, model, bad, options, words):
    for name, path in (("MODEL", model), ("KOALA", KOALA), ("BAD", bad)):
        options = options.replace(name, str(path))
    check_one_line(run("classification.py", "--input", *options.split()), *words.split(" ... "))
    check_nothing_written(folder)


@pytest.mark.parametrize("suffix", [".jpg", ".mp4"])
def test_file_name_that_is_not_utf8(start, model, folder, suffix):
    """OpenCV 5.0.0 dies on it. It is one unreadable picture, and the others go on."""
    name = b"bad\xff" + suffix.encode()
    (folder / "in").mkdir()
    for path in (b"/in/" + name, b"/in/a.jpg", b"/in/z.jpg"):
        shutil.copy(KOALA, os.fsencode(folder) + path)
    options = ["--input", model, f"in/{os.fsdecode(name)}"]
    check_one_line(start("classification.py", *options), "rename it")
    result = start("classification.py", *options, "in/a.jpg", "in/z.jpg")
    check_one_line(result, "rename it", code=1)
    assert result.stdout.count("* class ID") == result.stdout.count("* saved") == 2
    if suffix == ".jpg":
        result = start("classification.py", "--input", model, "in")
        check_one_line(result, "rename it", code=1)
        assert result.stdout.count("* class ID") == 2


def test_a_pipe(start, model, folder):
    """It is read, as a file is; what isn't a picture is said."""
    os.mkfifo(folder / "pipe.jpg")
    with subprocess.Popen(["cp", KOALA, folder / "pipe.jpg"]):
        result = start("classification.py", "--input", model, "pipe.jpg")
    of_the_file = start("classification.py", "--input", model, KOALA)
    assert read_answer(result) == read_answer(of_the_file)
    check_one_line(start("classification.py", "--input", model, "/dev/null"), "not a picture")


@pytest.mark.parametrize("suffix", ["pgm", "ppm", "bmp", "webp", "tif", "gif"])
def test_every_format_has_a_result(run, model, folder, suffix):
    picture = cv2.imread(str(KOALA), cv2.IMREAD_GRAYSCALE if suffix == "pgm" else 1)
    # and those without room for the text
    for number, part in enumerate((picture, picture[:, :1], picture[:1], picture[:1, :1])):
        cv2.imwrite(str(folder / f"{number}.{suffix}"), part)
        get_output(run("classification.py", "--input", model, f"{number}.{suffix}"))
    results = [cv2.imread(str(result)) for result in (folder / "results").iterdir()]
    assert len(results) == 4 and not any(result is None for result in results)
    assert {result.suffix for result in (folder / "results").iterdir()} == {".png"}


def test_files_where_the_folders_should_be(run, model, folder, weights):
    for name in ("models", "results"):
        (folder / name).write_text("a file")
    options = ["--model_name", "squeezenet1_1", "--weights", weights, "--evaluate", "False"]
    check_one_line(run("py_to_py_cls.py", *options), "models", "File exists")
    check_one_line(run("classification.py", "--input", model, KOALA), "results", "Not a directory")
    check_nothing_written(folder, "models", "results")


# --- py_to_py_cls.py: before torch is imported ----------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ("--model_nmae resnet18", "--model_nmae"),
        ("--model_name ''", "--model_name is missing"),
        ("--test perhaps", "'perhaps'"),
        ("--batch_size 0", "--batch_size"),
        ("--rsz_height ''", "--rsz_height ... ''"),
        ("--test True --mean 1 2", "--mean"),
        ("--test True --std 0 1 1", "--std"),
        ("--test True --crop perhaps", "'perhaps'"),
        ("--test True --test_module_path nope.py", "nope.py"),
        ("--test True --classes nope.txt", "nope.txt"),
        ("--mean 1 2 nan", "'nan'"),
        ("--test True --input_img nope.jpg", "nope.jpg"),
        ("--img_root_dir nope", "nope"),
        ("--img_root_dir .", "no pictures in folders"),
        ("--img_cls_file nope.txt", "ILSVRC2012_img_val"),
        ("--rsz_width 300 --rsz_height 300", "need --preprocess tutorial or"),
        ("--preprocess tutorial --rsz_width 300", "go together"),
        ("--preprocess tutorial --crop True", "leave out --crop"),
        ("--resize 256 --crop True", "leave one out"),
        ("--transform a:b --mean 1 2 3", "leave out --mean"),
        ("--transform a:b --default_img_preprocess False", "leave out --default_img_preprocess"),
        ("--weights_key model_ema", "--weights_key needs --weights FILE; '' isn't a file"),
    ],
)
def test_request(run, folder, monkeypatch, options, words):
    monkeypatch.setattr("py_to_py_cls.get_converted", None)
    name = [] if "model_n" in options else ["--model_name", "squeezenet1_1"]
    result = run("py_to_py_cls.py", *name, *shlex.split(options))
    check_one_line(result, *words.split(" ... "))
    check_nothing_written(folder)


@pytest.mark.parametrize(
    "text, words",
    [
        ("koala.jpg 105\nbison.jpg many\n", "line 2"),
        ("  nope.jpg 1\n", "don't exist ... : nope.jpg; "),
    ],
)
def test_label_file(run, folder, monkeypatch, text, words):
    monkeypatch.setattr("py_to_py_cls.get_converted", None)
    (folder / "val.txt").write_text(text)
    options = ["--model_name", "resnet18", "--img_root_dir", PICTURES, "--img_cls_file", "val.txt"]
    check_one_line(run("py_to_py_cls.py", *options), "val.txt", *words.split(" ... "))
    check_nothing_written(folder, "val.txt")


# --- py_to_py_cls.py: torch needed -----------------------------------------------------------


def test_classes_that_the_network_does_not_have(run, folder, trained):
    (folder / "val.txt").write_text("koala.jpg 1000\n")
    options = [*trained, "--img_root_dir", PICTURES, "--img_cls_file", "val.txt"]
    check_one_line(run("py_to_py_cls.py", *options), "koala.jpg", "1000", "999")
    (folder / "val.txt").write_text("koala.jpg 1\n")
    (folder / "few.txt").write_text("cat\ndog\n")
    result = run("py_to_py_cls.py", *options, "--classes", "few.txt")
    check_one_line(result, "few.txt", "2 lines", "1000 outputs")
    assert not (folder / "logs").exists()


@pytest.mark.parametrize(
    "name, words", [("vit_b_32", "200x200 pictures"), slow("maxvit_t", "fails")]
)
def test_size_that_the_network_cannot_take(name, words):
    with pytest.raises(RequestError, match=f"{words}.*--frame_size"):
        load_network(Request(name, "random", width=200, height=200))


@pytest.mark.parametrize(
    "options, words",
    [
        ("--model_name resnet51", "resnet51 ... resnet50"),
        ("--model_name vgg", "vgg ... vgg19"),
        ("--model_name qqq", "qqq ... alexnet"),
        ("--preprocess tutorial --rsz_width 200 --rsz_height 200", "is less than 224x224"),
        ("--preprocess transform --frame_size 192", "transform needs one for this size"),
        ("--mean 0.485 0.456 0.406", "give --mean 123.675 116.28 103.53"),
        ("--resize 1 2 3", "--resize takes the shorter side"),
        ("--center first", "--center first needs --resize 224 224"),
    ],
)
def test_request_that_does_not_fit_the_network(run, folder, monkeypatch, options, words):
    monkeypatch.setattr("networks.set_preprocessing", lambda *_: None)  # other tests' concern
    name = [] if "model_n" in options else ["--model_name", "squeezenet1_1"]
    result = run("py_to_py_cls.py", *name, "--weights", "random", *options.split())
    check_one_line(result, *words.split(" ... "))
    check_nothing_written(folder)
