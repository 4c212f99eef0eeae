"""Which class a picture is: folders and label files as people have them. Nothing is evaluated."""

import os
from types import SimpleNamespace

import pytest
from conftest import PICTURES

from classification import RequestError
from labelled_pictures import find_classes, get_data
from test_config import TestClsConfig

IMAGENETS = (PICTURES / "imagenet_classes.txt").read_text().splitlines()
SYNSETS = (PICTURES / "imagenet_synsets.txt").read_text().splitlines()


@pytest.fixture
def label(folder, monkeypatch):
    """label(files, outputs, lines of --classes, label file): the Data, with its class IDs.

    files: the names of empty files in the pictures' folder.
    """

    monkeypatch.chdir(folder)

    def label(files, outputs, lines=None, labels=None):
        for name in files:
            (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "set" / name).touch()
        if labels is not None:
            (folder / "labels.txt").write_text(labels, "utf-8")
        config = TestClsConfig(img_root_dir="set")
        given = {"img_root_dir": "set", "img_cls_file": None if labels is None else "labels.txt"}
        given["classes"] = "names.txt" if lines else None
        data = get_data(config, SimpleNamespace(**given), lines or IMAGENETS)
        find_classes(data, outputs)
        return data

    return label


def get_ids(data):
    return dict(data.pictures)


# --- class folders --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folders, lines, outputs, ids",
    [
        # numbers
        (["1", "105", "387"], None, 1000, [1, 105, 387]),
        # a line, its first word, its first synonym, in any order
        (["n0", "n2"], ["n2 koala", "n0 cat, tom", "n1 dog"], 3, [1, 0]),
        (["n0", "n2"], ["n2", "n0", "n1"], 3, [1, 0]),
        (["cat", "sea lion"], ["sea lion, seal", "cat, tom"], 2, [1, 0]),
        (["big", "tiger"], ["tiger cat", "tiger, feline", "big"], 3, [2, 1]),
        # ImageNet's synsets and names, without --classes if the network has 1000 outputs
        ([SYNSETS[105], SYNSETS[387]], None, 1000, [105, 387]),
        (["koala", SYNSETS[387], "great white shark"], None, 1000, [2, 105, 387]),
        ([SYNSETS[105], SYNSETS[387]], IMAGENETS, 1000, [105, 387]),
        # numbers that are lines of --classes: the other order
        (["0", "1", "10"], ["0", "10", "1"], 3, [0, 2, 1]),
        # all the classes, in sorted order
        (["bison", "fig"], None, 2, [0, 1]),
        (["bison", "fig"], None, 1, [0, 1]),
    ],
)
def test_class_folders(label, capsys, folders, lines, outputs, ids):
    data = label([f"{name}/a.jpg" for name in folders], outputs, lines)
    folders = sorted(folders)
    assert get_ids(data) == {f"{n}/a.jpg": i for n, i in zip(folders, ids, strict=True)}
    ends = [f"folder {folders[i]} is class {ids[i]}" for i in (0, -1)]
    said = f"{len(ids)} pictures in {len(ids)} classes: {', ..., '.join(ends)}\n"
    assert said in capsys.readouterr().out
    assert len(data.names) == max(outputs, 2)
    if outputs == 2 and not lines:
        assert data.names == folders
    elif lines or outputs == 1000:
        assert data.names == (lines or IMAGENETS)


@pytest.mark.parametrize(
    "folders, lines, outputs, words",
    [
        (["Cat", "Dog"], ["dog", "cat"], 2, "Cat, Dog.*names.txt|names.txt.*Cat, Dog"),
        (["cats", "dog"], ["dog", "cat"], 2, "names.txt: cats"),
        (["cats", "dogs"], ["0 dogs", "1 cats"], 2, "names.txt: cats, dogs"),
        (["@eaDir", "a", "b"], ["a", "b"], 2, "names.txt: @eaDir"),
        ([SYNSETS[3], "mine"], None, 1000, "ImageNet: mine"),
        # ambiguous: two lines are "crane"
        (["crane", "koala"], None, 1000, "ImageNet: crane"),
        (["a", "b", "c"], None, 2, "3 class folders for 2 classes.* a, b, c"),
        (["n0", "n1"], None, 1000, "2 class folders for 1000 .*n0, n1.*IDs.*--classes.*each"),
        (["1", "10"], None, 10, "10/a.jpg has class ID 10, .* 0 to 9"),
        (["a", "b"], ["a", "b", "c"], 2, "names.txt: 3 lines.* 2 outputs"),
    ],
)
def test_class_folders_that_are_refused(label, folders, lines, outputs, words):
    """By names that --classes doesn't have, and numbers of folders that don't fit the network."""
    with pytest.raises(RequestError, match=words):
        label([f"{name}/a.jpg" for name in folders], outputs, lines)


def test_training_and_validation_above_the_classes(label):
    """Two folders for two classes, of which neither is a class."""
    files = [f"{part}/{name}/1.jpg" for part in ("train", "val") for name in ("cat", "dog")]
    with pytest.raises(RequestError, match="train, val have .*--img_root_dir"):
        label(files, 2)
    assert len(get_ids(label(files, 2, ["val", "train"]))) == 4  # if you say so


def test_folders_without_pictures(label, folder, capsys):
    """macOS's, of hidden files; and a class of which none is here, which is said."""
    data = label(["__MACOSX/cat/._1.jpg", "cat/1.jpg", "dog/1.jpg"], 2)
    assert get_ids(data) == {"cat/1.jpg": 0, "dog/1.jpg": 1}
    with pytest.raises(RequestError, match="2 class folders for 3 .*no pictures in .*MACOSX, emu"):
        (folder / "set" / "emu").mkdir()
        label([], 3)


def test_folders_0_to_10(label, capsys):
    """By number; ImageFolder's order is another one, and said to be possible."""
    files = [f"{i}/a.jpg" for i in range(11)]
    assert get_ids(label(files, 11)) == {f"{i}/a.jpg": i for i in range(11)}
    assert "NOTE" in (out := capsys.readouterr().out) and "0, 1, 10, 2" in out
    names = sorted(map(str, range(11)))  # 0, 1, 10, 2 ...
    assert get_ids(label(files, 11, names))["10/a.jpg"] == 2
    label(files, 12)  # in the other order there would be no 11
    assert "NOTE" not in capsys.readouterr().out


def test_files_that_are_not_pictures(label, capsys):
    """Left out with a word; hidden ones without. Subfolders and all of OpenCV's formats count."""
    suffixes = ["jpg", "jpeg", "JPG", "jpe", "jfif", "png", "webp", "avif"]
    suffixes += ["bmp", "tif", "tiff", "jp2", "gif", "ppm", "pgm", "pbm"]
    files = [f"a/{i}.{suffix}" for i, suffix in enumerate(suffixes)] + ["b/deep/1.jpg"]
    data = label([*files, "a/Thumbs.db", "a/b.txt", "b/c.TXT", "b/d", "b/.DS_Store", "e.jpg"], 2)
    assert sorted(get_ids(data)) == sorted(files)
    said = "set: left out: 4 files that aren't pictures: .db, .txt, no suffix\n"
    assert said in capsys.readouterr().out


def test_links_and_hidden_folders(label, folder):
    """A hidden folder isn't a class, a link isn't followed, and a stray picture has no class."""
    (folder / "set" / "a").mkdir(parents=True)
    (folder / "set" / "b").mkdir()
    os.symlink("..", folder / "set" / "a" / "loop")
    os.symlink("../a", folder / "set" / "b" / "again")
    files = [".cache/x.jpg", "a/1.jpg", "a/deep/2.jpg", "a/.cache/y.jpg", "b/3.JPG", "stray.jpg"]
    assert get_ids(label(files, 2)) == {"a/1.jpg": 0, "a/deep/2.jpg": 0, "b/3.JPG": 1}


# --- label files ----------------------------------------------------------------------------------

A, B = "a.jpg", "b c.jpg"


@pytest.mark.parametrize(
    "text, lines",
    [
        ("a.jpg 1\nb c.jpg 0\n", None),
        ("a.jpg  1\r\n\r\nb c.jpg\t0\r\n", None),
        ("\ufeffname,label\na.jpg,1\nb c.jpg,0\n", None),
        ('name;label,x\n"a.jpg", 1\n"b c.jpg" 0\n', None),
        ("# mine\na.jpg,1,cat\nb c.jpg,0,dog\n", None),
        # names of classes, and what else stands there
        ("a.jpg,cat\nb c.jpg,dog\n", ["dog, hound", "cat"]),
        ("a.jpg cat\nb c.jpg dog\n", ["dog", "cat"]),
        ('a.jpg,"cat, tom"\nb c.jpg,dog\n', ["dog", "cat, tom"]),
        ("a.jpg\tn2\t0\t32\t44\t62\nb c.jpg\tn1\t5\t6\t7\t8\n", ["n1 dog", "n2 cat"]),
        ("ImageId,PredictionString\na,n2 0 32 44 62 n2 1 2 3 4\nb c,n1 5 6 7 8\n", ["n1", "n2"]),
        # an ID, if it could be both
        ("a.jpg 1\nb c.jpg 0\n", ["1", "0"]),
    ],
)
def test_label_files(label, text, lines):
    """Kaggle's and tiny-imagenet's, those of spreadsheets, and val.txt's."""
    data = label([A, B], 2, lines, text)
    assert data.pictures == [(A, 1), (B, 0)]


def test_synsets_in_a_label_file(label):
    """Those of ImageNet, if the network has 1000 outputs."""
    text = f"a.jpg {SYNSETS[7]}\nb c.jpg,tench\n"
    assert label([A, B], 1000, labels=text).pictures == [(A, 7), (B, 0)]
    with pytest.raises(RequestError, match=f"'{SYNSETS[7]}' is a class of ImageNet.*--classes"):
        label([A, B], 10, labels=text)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no pictures in it; a line is NAME,LABEL"),
        ("name,label\n", "no pictures in it"),
        ("a.jpg 1\nb c.jpg\n", "line 2: 'b c.jpg': a line is"),
        ("a.jpg 1\nb c.jpg many\n", "line 2: 'b c.jpg many': a line is"),
        ("a.jpg -5\n", "line 1"),
        ("a.jpg ²\n", "line 1"),
        ("a.jpg,0,0,1\nb c.jpg,1,0,0\n", "line 1: 'a.jpg,0,0,1'"),  # one-hot
        ("name,0,1\na.jpg,0,1\n", "line 2"),
        ("name,label\nlabel,name\na.jpg,1\n", "line 2"),  # one header
        ("a.jpg,0\nno.jpg,1\n", "of 2 pictures, 1 don't exist in set: no.jpg; a line is"),
        ("a.jpg 1\n./a.jpg 0\n", "a.jpg is class 1 in line 1, and 0 in line 2"),
        ("a.jpg 2\n", "a.jpg has class ID 2, .* 0 to 1"),
    ],
)
def test_label_files_that_are_refused(label, text, words):
    with pytest.raises(RequestError, match=words):
        label([A, B], 2, labels=text)


def test_repeated_and_missing_lines(label, capsys):
    """They count once; one in a hundred pictures that doesn't exist is skipped later."""
    text = "a.jpg 1\nb c.jpg 0\n\n./a.jpg 1\n"
    assert label([A, B], 2, labels=text).pictures == [(A, 1), (B, 0)]
    assert "1 lines repeat others" in capsys.readouterr().out
    lines = "".join(f"{i}.jpg 1\n" for i in range(100))
    assert len(label([f"{i}.jpg" for i in range(99)], 2, labels=lines).pictures) == 100


def test_a_picture_that_looks_like_a_comment(label):
    data = label(["#1.jpg", A], 2, labels="#1.jpg 1\n#2.jpg 1\na.jpg 0\n")
    assert data.pictures == [("#1.jpg", 1), (A, 0)]


def test_where_the_label_file_is(label, folder):
    """./val.txt, or val.txt or val.csv beside the pictures; if two differ, you are asked."""
    with pytest.raises(RequestError, match="no pictures in folders, .*--img_cls_file"):
        label([A], 2)
    (folder / "set" / "val.csv").write_text("name,label\na.jpg,1\n")
    assert label([A], 2).pictures == [(A, 1)]
    (folder / "val.txt").write_text("a.jpg 0\n")
    with pytest.raises(RequestError, match="val.csv and ./val.txt differ.*--img_cls_file"):
        label([A], 2)
    assert label([A], 2, labels="a.jpg 0\n").pictures == [(A, 0)]
    (folder / "val.txt").write_bytes((folder / "set" / "val.csv").read_bytes())
    assert label([A], 2).pictures == [(A, 1)]
