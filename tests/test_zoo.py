"""models.yml: what a conversion writes, and classification.py by name."""

import copy
import hashlib
import re
import shutil
from pathlib import Path

import pytest
from conftest import PICTURES, ROOT, check_one_line, get_output, read_answer
from torchvision import models

from classification import read_zoo
from common import Preprocessing, read_fields
from entries import Converted, write_entry
from networks import IMAGENET
from verify import EACH_ENGINE

KOALA = PICTURES / "koala.jpg"
CONVERT = ["--model_name", "squeezenet1_1", "--evaluate", "False"]


def read_raw(path, name):
    """The lines of an entry."""
    return re.search(rf"^{name}:\n((?: .*\n)+)", path.read_text(), re.M).group(1)


def test_entry_of_a_converted_network(run, start, folder, weights):
    """One entry per file, named like it; it has all that OpenCV's samples and ours need."""
    result = run("py_to_py_cls.py", *CONVERT, "--weights", weights)
    name = "squeezenet1_1-trained"
    assert f"models/models.yml: python classification.py {name}" in result.stdout
    path = folder / "models" / "models.yml"
    entry = read_zoo(path)[name]
    classes = folder / "models" / entry["classes"]
    assert classes.read_bytes() == (PICTURES / "imagenet_classes.txt").read_bytes()
    engines, made_from = entry.pop("engines"), entry.pop("made_from")
    assert sorted(engines) == sorted(EACH_ENGINE)
    assert made_from["sha256"] and len(made_from) == 4
    sha1 = hashlib.sha1((folder / "models" / f"{name}.onnx").read_bytes()).hexdigest()
    assert entry == {
        "load_info": {"sha1": sha1},
        "model": f"{name}.onnx",
        "scale": pytest.approx(1 / 255),
        "mean": [123.675, 116.28, 103.53],
        "std": [0.229, 0.224, 0.225],
        "rgb": 1,
        "crop": 1,
        "width": 224,
        "height": 224,
        "resize": [256],
        "interpolation": "bilinear",
        "center": "round",
        "engine": engines[0],
        "outputs": 1000,
        "sample": "classification",
        "classes": f"{name}_imagenet_classes.txt",
        "labels": f"{name}_imagenet_classes.txt",
    }
    raw = read_raw(path, name)
    assert f'  load_info: {{sha1: "{sha1}"}}\n' in raw and "  rgb: true\n" in raw

    # random weights have an entry of their own
    result = run("py_to_py_cls.py", *CONVERT, "--weights", "random")
    assert "models/models.yml: python classification.py squeezenet1_1-random" in result.stdout
    assert read_raw(path, name) == raw
    entries = read_zoo(path)
    assert entries.keys() == {name, "squeezenet1_1-random"}
    assert entries["squeezenet1_1-random"]["model"] == "squeezenet1_1-random.onnx"
    assert entries["squeezenet1_1-random"]["weights"] == "random"

    by_name = run("classification.py", name, "--input", KOALA)
    by_file = run("classification.py", "--input", f"models/{name}.onnx", KOALA)
    assert read_answer(by_name) == read_answer(by_file)
    assert "RANDOM" not in by_name.stdout
    assert "RANDOM" in run("classification.py", "squeezenet1_1-random").stdout

    # the folder can be taken elsewhere, and the entry is found beside the script from any folder
    shutil.move(folder / "models", folder.parent / "elsewhere")
    shutil.copy(ROOT / "classification.py", folder.parent / "elsewhere")
    moved = start(folder.parent / "elsewhere" / "classification.py", name, "--input", KOALA)
    assert read_answer(moved) == read_answer(by_name)


@pytest.fixture
def zoo(folder, model):
    """A models.yml as OpenCV's samples have it, beside its model, in another folder."""
    (folder / "zoo").mkdir()
    shutil.copy(model, folder / "zoo" / "net.onnx")
    (folder / "zoo" / "names.txt").write_text("".join(f"name {i}\n" for i in range(1000)))
    path = folder / "zoo" / "models.yml"
    sha1 = hashlib.sha1(model.read_bytes()).hexdigest()
    path.write_text(
        '%YAML 1.0\n---\nnote: "not an entry"\n'
        f'net:\n  load_info:\n    sha1: "{sha1}"\n  model: "net.onnx"\n'
        "  mean: [104, 117, 123]\n  scale: 0.5\n  width: 192\n  height: 160\n  rgb: true\n"
        '  classes: "names.txt"\n  sample: "classification"\n'
        'face:\n  model: "face.onnx"\n  sample: "object_detection"\n'
        'half:\n  model: "net.onnx"\n  initial_width: 256\n  sample: "classification"\n'
        'odd:\n  model: "net.onnx"\n  mean: [1, "x", 3]\n  sample: "classification"\n'
        'first:\n  model: "second"\n  sample: "classification"\n'
        'second:\n  sample: "classification"\n'
    )
    for name, line in (
        ("two", 'width: "a"'),
        ("three", "height: [8, 7]"),
        ("four", "std: [1, 2]"),
        ("five", "mean: [1, 2, 3, 4]"),
        ("six", "resize: [1, 2, 3]"),
        ("inf", "scale: .inf"),
        ("ort", 'engine: "ort"'),
        ("alone", 'engine: "ort"\n  engines: ["ort"]'),
        ("next", 'engine: "ort"\n  engines: ["ort", "new"]'),
        ("word", 'engine: "ort"\n  engines: new'),
        ("vgg16-random", "scale: 1.0"),
        ("tiny", "std: []\n  mean: [-1e-05, -2, 0.5]\n  scale: -1.5e-05\n  rgb: 1"),
        ("empty", 'mean: []\n  weights: "random"'),
    ):
        entry = f'{name}:\n  {line}\n  model: "net.onnx"\n  sample: "classification"\n'
        path.write_text(path.read_text() + entry)
    return path


def test_entry_of_opencvs_samples(run, zoo):
    """What it leaves out is what it is in the samples: no std, no crop, no initial resize."""
    options = ["--input", KOALA, "--zoo", zoo]
    by_name = run("classification.py", "net", *options)
    spelled = ["--mean", 104, 117, 123, "--scale", 0.5, "--width", 192, "--height", 160, "--rgb"]
    spelled += ["--model", zoo.parent / "net.onnx", "--input", KOALA]
    spelled += ["--classes", zoo.parent / "names.txt"]
    assert read_answer(by_name) == read_answer(run("classification.py", *spelled))
    assert "label: name " in by_name.stdout
    assert "scale 0.5, mean [104.0, 117.0, 123.0], std None, rgb True, crop False" in by_name.stdout

    # options on the command line win
    changed = run("classification.py", "net", *options, "--mean", "0", "0", "0", "--rgb", "False")
    assert "scale 0.5, mean [0.0, 0.0, 0.0], std None, rgb False, crop False" in changed.stdout
    assert read_answer(changed) != read_answer(by_name)
    other = run("classification.py", "net", "--zoo", zoo, "--input", "other.onnx", KOALA)
    check_one_line(other, "other.onnx", "no such file")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["face"], ["models.yml", "no entry 'face'"]),
        (["koala.jpg"], ["no entry 'koala.jpg'", "--input"]),
        (["half"], ["--initial_width and --initial_height go together"]),
        (["net", "--initial_width", "256"], ["initial_width", "go together"]),
        (["odd"], ["models.yml: odd: error: argument --mean: invalid finite value: ' x'"]),
        (["two"], ["models.yml: two: error: argument --width", "'a'"]),
        (["three"], ["three: error: argument --height: invalid positive_int value: '[8, 7]'"]),
        (["four"], ["models.yml: four: error: argument --std: expected 3 arguments"]),
        (["five"], ["models.yml: five: error: unrecognized arguments:  4"]),
        (["six"], ["--resize takes the shorter side, or a width and a height"]),
        (["second"], ["the model of second: no such file"]),
        (["inf"], ["models.yml: inf: error: argument --scale: invalid non_zero value: 'inf'"]),
        (["alone"], ["no ort engine for net.onnx: convert it again with this OpenCV"]),
        (["vgg16"], ["no entry 'vgg16'", "vgg16-random"]),
        (["net", "--zoo", "broken.yml"], ["broken.yml", "YAML"]),
        (["net", "--zoo", "absent.yml"], ["absent.yml: missing"]),
        (["--input", "zoo/net.onnx", "--zoo", "absent.yml"], ["absent.yml: missing"]),
        (["--input", "elsewhere.onnx"], ["no entry 'elsewhere.onnx'", "only net, half, "]),
    ],
)
def test_entries_that_cannot_be_used(run, folder, zoo, arguments, words):
    (folder / "broken.yml").write_text("%YAML 1.0\n---\na b c\n")
    arguments = arguments if "--zoo" in arguments else [*arguments, "--zoo", zoo]
    check_one_line(run("classification.py", *arguments), *words)


def test_numbers_of_every_kind(run, zoo):
    """-1e-05 isn't an option, `std: []` and `mean: []` are none, an option wins over an entry.

    That the weights are random can be said by the entry alone.
    """
    result = run("classification.py", "tiny", "--zoo", zoo, "--input", KOALA, "--crop", "yes")
    expected = "scale -1.5e-05, mean [-1e-05, -2.0, 0.5], std None, rgb True, crop True, width 224"
    assert expected in result.stdout, result.stderr
    result = run("classification.py", "empty", "--zoo", zoo, "--input", KOALA)
    assert "scale 1.0, mean [0.0, 0.0, 0.0], std None, rgb False" in result.stdout
    assert "* RANDOM WEIGHTS" in result.stdout


@pytest.mark.parametrize("name, engine", [("ort", "auto"), ("next", "new"), ("word", "new")])
def test_an_engine_that_this_opencv_lacks(run, zoo, name, engine):
    """The next one that the file was verified on, or OpenCV's default, with a word; or --engine."""
    result = run("classification.py", name, "--zoo", zoo, "--input", KOALA)
    assert result.stderr == f"NOTE: this OpenCV has no ort engine for net.onnx: taking {engine}\n"
    assert read_answer(result) == read_answer(
        run("classification.py", "empty", "--zoo", zoo, "--input", KOALA)
    )
    result = run("classification.py", name, "--zoo", zoo, "--input", KOALA, "--engine", "auto")
    assert (result.returncode, result.stderr) == (0, "")


def test_other_peoples_entries_stay_as_they_are(tmp_path):
    """Comments, numbers that cv2.FileStorage doesn't hold, and values that aren't entries."""
    before = '%YAML 1.0\n---\n# mine\nnote: "x"\nbig: 5000000000\nnet:\n  model: "a.onnx"\n'
    after = 'é.net:\n  load_info:\n    url: "true"\n  list: [ {x: 1}, {y: 2} ]\n'
    path = tmp_path / "models.yml"
    path.write_text(before + after, "utf-8")
    about = {"sha1": "0"}, 1000, ["new"], None, "1", True, [], IMAGENET
    converted = Converted(tmp_path / "net.onnx", *about)
    write_entry(converted, IMAGENET, None)
    text = path.read_text("utf-8")
    others = before.replace('net:\n  model: "a.onnx"\n', "") + after
    assert text.startswith(others) and text.count("net:\n") == 2
    made_from = read_zoo(path)["net"]["made_from"]
    assert (made_from["sha256"], made_from["declared"]) == ("1", 1)
    assert Preprocessing(**read_fields(made_from["preprocessing"])) == IMAGENET
    write_entry(converted, IMAGENET, None)
    assert path.read_text("utf-8") == text

    # YAML's end mark, and a key with a space before its colon
    path.write_text(text.replace("\nnet:", "\nnet :") + "...\n", "utf-8")
    converted.engines = ["classic", "new"]
    write_entry(converted, IMAGENET, None)
    expected = text.replace('engine: "new"', 'engine: "classic"')
    assert path.read_text("utf-8") == expected.replace('["new"]', '["classic", "new"]')


def test_a_name_without_any_entries(run):
    check_one_line(run("classification.py", "resnet18"), "models.yml", "'resnet18'", "convert")


def test_a_name_is_searched_in_every_place(run, folder, zoo):
    """models/models.yml without the name doesn't hide the models.yml that has it."""
    (folder / "models").mkdir()
    (folder / "models" / "models.yml").write_text('%YAML 1.0\n---\nother:\n  model: "a.onnx"\n')
    shutil.copytree(zoo.parent, folder, dirs_exist_ok=True)
    get_output(run("classification.py", "net", "--input", KOALA))
    check_one_line(run("classification.py", "absent"), "models/models.yml, models.yml")


def test_options_win_over_the_entry_of_a_file_one_by_one(run, zoo):
    """--std alone leaves the entry its size, mean, scale and order of channels."""
    options = ["--input", zoo.parent / "net.onnx", KOALA, "--std", "1", "2", "4"]
    result = run("classification.py", *options)
    expected = "scale 0.5, mean [104.0, 117.0, 123.0], std [1.0, 2.0, 4.0], rgb True, crop False, "
    expected += "width 192, height 160"
    assert expected in result.stdout


def test_labels_is_another_word_for_classes(run, folder, zoo):
    """It wins over classes, as in OpenCV 5's samples."""
    text = zoo.read_text()
    zoo.write_text(text.replace("classes:", 'labels: "names.txt"\n  classes: "no.txt" #'))
    assert "label: name " in run("classification.py", "net", "--zoo", zoo, "--input", KOALA).stdout
    (folder / "mine.txt").write_text("mine\n" * 1000)
    options = ["net", "--zoo", zoo, "--input", KOALA, "--labels", "mine.txt"]
    assert "label: mine\n" in run("classification.py", *options).stdout


def test_files_are_found_where_opencvs_samples_keep_them(run, folder, zoo, monkeypatch):
    """The model in the download folder, by its SHA-1 or by its name; the names in the data."""
    sha1 = hashlib.sha1((zoo.parent / "net.onnx").read_bytes()).hexdigest()
    arguments = ["classification.py", "net", "--zoo", zoo, "--input", KOALA]
    for target in (Path("cache", sha1), Path("cache")):
        (folder / target).mkdir(parents=True, exist_ok=True)
        model = next(folder.rglob("net.onnx"))
        model.rename(folder / target / "net.onnx")
        check_one_line(run(*arguments), "net.onnx", "no such file")
        monkeypatch.setenv("OPENCV_DOWNLOAD_CACHE_DIR", str(folder / "cache"))
        assert "label: name " in run(*arguments).stdout
        monkeypatch.delenv("OPENCV_DOWNLOAD_CACHE_DIR")
    monkeypatch.setenv("OPENCV_DOWNLOAD_CACHE_DIR", str(folder / "cache"))
    for target in ("data", "data/dnn"):
        (folder / target).mkdir(exist_ok=True)
        next(folder.rglob("names.txt")).rename(folder / target / "names.txt")
        monkeypatch.delenv("OPENCV_SAMPLES_DATA_PATH", raising=False)
        check_one_line(run(*arguments), "names.txt")
        monkeypatch.setenv("OPENCV_SAMPLES_DATA_PATH", str(folder / "data"))
        assert "label: name " in run(*arguments).stdout


def test_a_size_of_its_own(run, folder, monkeypatch, small):
    """Test mode, models.yml and the file agree on what the weights' metadata say."""
    monkeypatch.setattr(models, "get_model", lambda *args, **options: copy.deepcopy(small))
    options = ["--model_name", "efficientnet_b1", "--weights", "random", "--test", "True"]
    result = run("py_to_py_cls.py", *options)
    assert "width 240, height 240, resize [256], interpolation bicubic" in result.stdout
    assert read_zoo(folder / "models" / "models.yml")["efficientnet_b1-random"]["width"] == 240
    by_name = run("classification.py", "efficientnet_b1-random")
    assert read_answer(by_name) == read_answer(result)
    # the file alone finds its entry as well, and not the size of most networks
    by_file = run("classification.py", "--input", "models/efficientnet_b1-random.onnx")
    assert read_answer(by_file) == read_answer(result)


def test_list_models(run):
    lines = run("py_to_py_cls.py", "--list_models").stdout.splitlines()
    assert len(lines) == 1 + 80
    rows = {line.split()[0]: line.split() for line in lines[1:]}
    assert rows["resnet50"][1:4] == ["256", "224", "76.13"]
    assert rows["inception_v3"][1:3] == ["342", "299"]
    assert rows["vit_h_14"][-1] == "IMAGENET1K_SWAG_E2E_V1"
