"""What bad input gets: one line on stderr, exit 2, nothing half-written."""

import os
import shutil
import subprocess

import cv2
import numpy as np
import pytest
from conftest import PICTURES, check_one_line, read_answer

KOALA = PICTURES / "koala.jpg"


def check_nothing_written(folder, *expected):
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found == set(expected)


def cut(source, target, size):
    target.write_bytes(source.read_bytes()[:size])


# --- classification.py --------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, words",
    [(None, "No such file"), *((n, "truncated") for n in (0, 100, 60_000))],
)
def test_picture(run, model, folder, size, words):
    if size is not None:
        cut(KOALA, folder / "koala.jpg", size)
    result = run("classification.py", "--input", model, "koala.jpg")
    check_one_line(result, "koala.jpg", words)
    check_nothing_written(folder, *([] if size is None else ["koala.jpg"]))


@pytest.mark.parametrize("suffix", ["bmp", "webp", "tif", "gif"])
def test_picture_of_another_format_cut_short(run, model, folder, suffix):
    cv2.imwrite(str(folder / f"whole.{suffix}"), cv2.imread(str(KOALA)))
    whole = folder / f"whole.{suffix}"
    cut(whole, folder / f"cut.{suffix}", whole.stat().st_size // 2)
    assert run("classification.py", "--input", model, whole).returncode == 0
    check_one_line(run("classification.py", "--input", model, f"cut.{suffix}"), f"cut.{suffix}")


def test_no_picture_at_all(run, model, folder):
    (folder / "note.txt").write_text("no picture\n")
    (folder / "empty").mkdir()
    check_one_line(
        run("classification.py", "--input", model, "note.txt"), "note.txt", "not a picture"
    )
    check_one_line(run("classification.py", "--input", model, "empty"), "empty", "no picture")


@pytest.mark.parametrize("size", [None, 0, 300, 30_000])
def test_model(run, model, folder, size):
    if size is not None:
        cut(model, folder / "net.onnx", size)
    result = run("classification.py", "--input", "net.onnx", KOALA)
    check_one_line(result, "net.onnx", "no such file" if size is None else "truncated")


@pytest.mark.parametrize("name", ["page.jpg", "page.png"])
def test_no_picture_but_named_like_one(run, model, folder, name):
    (folder / name).write_text("<html>404</html>")
    check_one_line(run("classification.py", "--input", model, name), name, "not a picture")


def test_no_model_and_two_models(run, model):
    check_one_line(run("classification.py", "--input", KOALA), "0 models")
    check_one_line(run("classification.py", "--input", model, "b.onnx", KOALA), "2 models")


def test_labels(run, model, folder):
    options = ["--input", model, KOALA, "--classes"]
    check_one_line(run("classification.py", *options, "nope.txt"), "nope.txt")
    (folder / "few.txt").write_text("cat\ndog\n")
    (folder / "none.txt").write_text("")
    for name, lines in (("few.txt", 2), ("none.txt", 0)):
        result = run("classification.py", *options, name)
        check_one_line(result, f"{name}: {lines} lines", "1000 outputs")
    check_one_line(run("classification.py", *options, KOALA), "not a text file")


@pytest.mark.parametrize(
    "options, words",
    [
        ("--mean 1 2", "--mean"),
        ("--mean 1 2 3 4", "4"),
        ("--mean a 2 3", "--mean: invalid finite value: 'a'"),
        ("--mean nan 2 3", "--mean: invalid finite value: 'nan'"),
        ("--std 1 2", "--std"),
        ("--std 1 0 1", "--std: invalid non_zero value: '0'"),
        ("--std 1 x 1", "--std: invalid non_zero value: 'x'"),
        ("--scale inf", "--scale: invalid non_zero value: 'inf'"),
        ("--width 0", "--width"),
        ("--initial_width 256", "go together"),
        ("--crop maybe", "'maybe'"),
        ("--top_k 0", "--top_k"),
        ("--engine fast", "--engine"),
        ("--engine ort", "--engine: invalid choice: 'ort'"),
        ("--backend cuda --target cuda", "no --target cuda"),
        ("--modle x", "--modle"),
    ],
)
def test_options(run, model, options, words):
    result = run("classification.py", "--model", model, *options.split(), "--input", KOALA)
    check_one_line(result, words)


def test_wrong_size_for_the_network(run, folder):
    """A network with a fixed input size."""
    import torch

    path = folder / "fixed.onnx"
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5)).eval()
    torch.onnx.export(network, torch.zeros(1, 3, 8, 8), str(path), dynamo=False)
    result = run("classification.py", "--input", path, KOALA)
    check_one_line(result, "224x224", "--width")
    assert (
        run("classification.py", "--input", path, KOALA, "--width", 8, "--height", 8).returncode
        == 0
    )


def test_not_a_classifier(run, folder):
    """Two outputs, of which OpenCV's engines would return different ones."""
    import torch

    class Two(torch.nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3)), x.amax(dim=(2, 3))

    torch.onnx.export(Two(), torch.zeros(1, 3, 8, 8), str(folder / "two.onnx"), dynamo=False)
    options = ["--width", 8, "--height", 8, "--classes", folder / "labels.txt"]
    (folder / "labels.txt").write_text("a\nb\nc\n")
    result = run("classification.py", "--input", "two.onnx", KOALA, *options)
    check_one_line(result, "not a classifier")


def test_no_camera(run, model):
    check_one_line(run("classification.py", "--input", model, "0"), "camera 0")
    check_one_line(run("classification.py", "--input", model, "99999999999"), "OpenCV")


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


@pytest.mark.parametrize("content", ["truncated", "empty"])
def test_a_video_that_is_none(start, model, folder, content):
    """Not a picture that can't be read."""
    writer = cv2.VideoWriter(
        str(folder / "whole.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48)
    )
    writer.write(cv2.resize(cv2.imread(str(KOALA)), (64, 48)))
    writer.release()
    data = (folder / "whole.mp4").read_bytes()
    (folder / "in.mp4").write_bytes(data[: len(data) // 2] if content == "truncated" else b"")
    result = start("classification.py", "--input", model, "in.mp4")
    check_one_line(result, "in.mp4: 0 of 0 frames can be read", "truncated")
    assert "picture" not in result.stderr


def test_a_float_picture_is_not_truncated(run, model, folder):
    cv2.imwrite(str(folder / "f.tiff"), np.full((9, 9, 3), 0.5, np.float32))
    result = run("classification.py", "--input", model, "f.tiff")
    check_one_line(result, "f.tiff", "float32")
    assert "truncated" not in result.stderr


@pytest.mark.parametrize("output", ["x.png", "x.pgm", "results.d/x.jpg"])
def test_a_video_needs_the_file_of_a_video(run, model, folder, output):
    """It is said before the first frame."""
    (folder / "in.mp4").write_bytes(b"no video")
    result = run("classification.py", "--input", model, "in.mp4", "--output", output)
    check_one_line(result, output, ".mp4 or .avi")
    check_nothing_written(folder, "in.mp4")


def test_a_trailing_slash_is_a_folder(run, model, folder):
    result = run("classification.py", "--input", model, KOALA, "--output", "some.dir/")
    assert result.returncode == 0, result.stderr
    check_nothing_written(folder, "some.dir/koala_small.jpg")


def test_a_pipe(start, model, folder):
    """It is read, as a file is; what isn't a picture is said."""
    os.mkfifo(folder / "pipe.jpg")
    with subprocess.Popen(["cp", KOALA, folder / "pipe.jpg"]):
        result = start("classification.py", "--input", model, "pipe.jpg")
    assert result.returncode == 0, result.stderr
    of_the_file = start("classification.py", "--input", model, KOALA)
    assert read_answer(result.stdout) == read_answer(of_the_file.stdout)
    check_one_line(start("classification.py", "--input", model, "/dev/null"), "not a picture")


@pytest.mark.parametrize("suffix", ["pgm", "ppm", "bmp", "webp", "tif", "gif"])
def test_every_format_has_a_result(run, model, folder, suffix):
    picture = cv2.imread(str(KOALA), cv2.IMREAD_GRAYSCALE if suffix == "pgm" else 1)
    cv2.imwrite(str(folder / f"koala.{suffix}"), picture)
    assert run("classification.py", "--input", model, f"koala.{suffix}").returncode == 0
    (result,) = (folder / "results").iterdir()
    assert cv2.imread(str(result)) is not None


@pytest.mark.parametrize("shape", [(3000, 1, 3), (1, 500, 3), (1, 1, 3)])
def test_picture_without_room_for_the_text(run, model, folder, shape):
    cv2.imwrite(str(folder / "thin.png"), np.full(shape, 99, np.uint8))
    assert run("classification.py", "--input", model, "thin.png").returncode == 0
    assert cv2.imread(str(folder / "results" / "thin_small.png")) is not None


def test_sizes_that_no_memory_holds(run, model):
    options = ["--input", model, KOALA, "--width", "60000", "--height", "60000"]
    assert run("classification.py", *options).returncode == 2


def test_output_that_cannot_be_written(run, model, folder):
    (folder / "results").write_text("a file where the folder should be")
    check_one_line(run("classification.py", "--input", model, KOALA), "results", "File exists")
    check_nothing_written(folder, "results")
    options = ["--input", model, KOALA, "--output"]
    for name in ("a.xyz", "a.pgm", "a.mp4"):
        check_one_line(
            run("classification.py", *options, name), name, "a picture needs .png or .jpg"
        )
    check_one_line(run("classification.py", *options, "/dev/full/a.png"), "/dev/full")
    cv2.imwrite(str(folder / "wide.png"), np.zeros((1, 70000, 3), np.uint8))  # JPEG ends at 65535
    options = ["--input", model, "wide.png", "--output", "wide.jpg"]
    check_one_line(run("classification.py", *options), "wide.jpg", "try .png")
    assert not (folder / "wide.jpg").exists()


# --- py_to_py_cls.py: before torch is imported ----------------------------------------------


@pytest.mark.parametrize(
    "name, near", [("resnet51", "resnet50"), ("vgg", "vgg19"), ("qqq", "alexnet")]
)
def test_unknown_network(run, name, near):
    check_one_line(run("py_to_py_cls.py", "--model_name", name), name, near)


@pytest.mark.parametrize(
    "options, words",
    [
        ("--model_nmae resnet18", "--model_nmae"),
        ("--test perhaps", "'perhaps'"),
        ("--batch_size 0", "--batch_size"),
        (
            "--weights random --rsz_width 200 --rsz_height 200",
            "--rsz_height is less than 224x224 pixels",
        ),
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
    ],
)
def test_request(run, folder, options, words):
    name = [] if "model_n" in options else ["--model_name", "squeezenet1_1"]
    check_one_line(run("py_to_py_cls.py", *name, *options.split()), words)
    if "--rsz" not in options:  # the network's own frame size is known once it is loaded
        check_nothing_written(folder)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no pictures"),
        ("koala.jpg 105\nbison.jpg\n", "line 2"),
        ("koala.jpg 105\nbison.jpg many\n", "line 2"),
        ("koala.jpg -5\n", "line 1"),
        ("koala.jpg ²\n", "line 1"),
    ],
)
def test_label_file(run, folder, text, words):
    (folder / "val.txt").write_text(text)
    options = ["--model_name", "resnet18", "--img_root_dir", PICTURES]
    check_one_line(run("py_to_py_cls.py", *options), "val.txt", words)
    check_nothing_written(folder, "val.txt")


def test_no_network(run):
    check_one_line(run("py_to_py_cls.py"), "--model_name is missing")


def test_empty_option(run):
    result = run("py_to_py_cls.py", "--model_name", "resnet18", "--rsz_height", "")
    check_one_line(result, "--rsz_height", "''")


# --- py_to_py_cls.py: torch needed -----------------------------------------------------------


def test_classes_that_the_network_does_not_have(run, folder, weights, converted):
    (folder / "val.txt").write_text("koala.jpg 1000\n")
    options = ["--model_name", "squeezenet1_1", "--img_root_dir", PICTURES, "--weights", weights]
    shutil.copytree(converted, folder / "models")
    result = run("py_to_py_cls.py", *options)
    check_one_line(result, "koala.jpg", "1000", "999")
    (folder / "val.txt").write_text("koala.jpg 1\n")
    (folder / "few.txt").write_text("cat\ndog\n")
    result = run("py_to_py_cls.py", *options, "--classes", "few.txt")
    check_one_line(result, "few.txt", "2 lines", "1000 outputs")
    assert not (folder / "logs").exists()


def test_size_that_the_network_cannot_take(run):
    options = ["--weights", "random", "--evaluate", "False", "--frame_size", "200"]
    result = run("py_to_py_cls.py", "--model_name", "vit_b_32", *options)
    check_one_line(result, "200x200")
    assert result.stdout == ""


def test_size_that_fails_in_the_network():
    from classification import RequestError
    from networks import Request, load_network

    with pytest.raises(RequestError, match="can't take a 200x200 picture.*--frame_size"):
        load_network(Request("maxvit_t", "random", width=200, height=200))


def test_folder_that_cannot_be_written(run, folder, weights):
    (folder / "models").write_text("a file where the folder should be")
    options = ["--model_name", "squeezenet1_1", "--weights", weights, "--evaluate", "False"]
    check_one_line(run("py_to_py_cls.py", *options), "models")


def test_picture_for_the_walk_through(run, folder):
    check_one_line(run("py_to_py_resnet50.py", "--input_img", "nope.jpg"), "nope.jpg")
    check_nothing_written(folder)


@pytest.mark.parametrize(
    "options, words",
    [
        ("--crop True", "--crop and --rgb have no effect on an evaluation"),
        ("--rgb False", "--crop and --rgb have no effect on an evaluation"),
        ("--weights_key model_ema", "--weights_key has no effect"),
    ],
)
def test_options_without_effect_are_refused(run, folder, options, words):
    result = run("py_to_py_cls.py", "--model_name", "squeezenet1_1", *options.split())
    check_one_line(result, words)
    check_nothing_written(folder)


@pytest.mark.parametrize(
    "option",
    ["--mean 1 2 3", "--std 1 2 3", "--scale 2", "--rsz_width 300 --rsz_height 300",
     "--bgr_to_rgb False", "--frame_size 192"],
)  # fmt: skip
def test_options_that_contradict_torchvisions_transforms(run, folder, option):
    options = ["--weights", "random", "--preprocess", "torchvision", *option.split()]
    result = run("py_to_py_cls.py", "--model_name", "squeezenet1_1", *options)
    check_one_line(result, "leave out the options that say otherwise")
    check_nothing_written(folder)
