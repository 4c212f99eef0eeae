"""A folder or a label file in, pictures and their class IDs out."""

import os
from dataclasses import dataclass
from pathlib import Path

from classification import PICTURES, RequestError, read_lines
from common import find_bundled
from test_config import CLS_TEST_DATA_DIR, IMAGENET_VAL_DIR

MAX_SKIPPED = 0.01  # of the pictures: more that can't be read, and the figures are another set's


@dataclass
class Data:
    """The labelled pictures of an evaluation."""

    pictures: list  # (path from the root, class ID)
    root: str  # their folder
    names: list  # of the classes: the lines of --classes, the folders', or ImageNet's
    bundled: bool = False  # whether they come with this project
    folders: list = ()  # the names of the class folders, if their order makes them classes 0, 1 ...


def get_data(config, args, names):
    """The Data of a TestClsConfig, from class folders or a label file.

    args: what the user gave; if neither folder nor label file, the bundled pictures stand in for
    the tutorial's folder. names: the lines of --classes, or ImageNet's.
    """
    root, named_labels = config.img_root_dir, args.img_cls_file is not None
    if args.img_root_dir is None and not named_labels and not Path(root).exists():
        root = find_bundled(CLS_TEST_DATA_DIR)
        print(f"no {IMAGENET_VAL_DIR} here: evaluating on the bundled pictures")
        pictures = read_val_file(os.path.join(root, "val.txt"), root)
        return Data(pictures, root, names, bundled=True)
    if not Path(root).is_dir():
        raise RequestError(f"--img_root_dir {root}: no such folder")
    folders = sorted(e.name for e in os.scandir(root) if e.is_dir() and e.name[0] != ".")
    found = [] if named_labels else [find_pictures(root, name) for name in folders]
    if not any(found):
        if not named_labels and not os.path.isfile(config.img_cls_file):
            raise RequestError(f"{root}: no pictures in folders, and no {config.img_cls_file}")
        return Data(read_val_file(config.img_cls_file, root), root, names)
    named = get_class_ids(folders, names if args.classes else [])
    class_ids = named or range(len(folders))  # check_evaluation wants all classes then
    pictures = [(name, c) for c, files in zip(class_ids, found, strict=True) for name in files]
    ends = [f"folder {folders[i]} is class {class_ids[i]}" for i in (0, -1)]
    print(f"{root}: {len(pictures)} pictures in {len(folders)} classes: {', ..., '.join(ends)}")
    if named:
        return Data(pictures, root, names)
    return Data(pictures, root, names if args.classes else folders, folders=folders)


def fit_labels(labels, path, classes):
    """`labels` if there is one per class; else [] for the default ones (path None), or an error."""
    if len(labels) != classes and path is not None:
        raise RequestError(f"{path}: {len(labels)} lines, but the network has {classes} outputs")
    return labels if len(labels) == classes else []


def find_pictures(root, name):
    """The pictures in a class folder and its subfolders, without hidden ones and links."""
    files = sorted(Path(root, name).rglob("*"))
    pictures = [file.relative_to(root) for file in files if file.suffix.lower() in PICTURES]
    return [str(path) for path in pictures if not any(part[0] == "." for part in path.parts)]


def get_class_ids(folders, names):
    """The class IDs if all folders are named by numbers, or lines (first words) of --classes."""
    if all(name.isascii() and name.isdecimal() for name in folders):
        return [int(name) for name in folders]
    lines = [line.strip() for line in names]
    for known in (lines, [line.partition(" ")[0] for line in lines]):
        if all(known.count(name) == 1 for name in folders):
            return [known.index(name) for name in folders]
    return None


def read_val_file(path, root):
    """[(name of a picture, class ID)] from a file like ImageNet's val.txt: lines of "name ID"."""
    lines = [(number, line) for number, line in enumerate(read_lines(path), 1) if line.strip()]
    found = {}  # {name: (class ID, number of its line)}
    for number, line in lines:
        *name, label = line.rsplit(maxsplit=1)
        if not name or not (label.isascii() and label.isdecimal() and len(label) < 10):
            raise RequestError(f"{path}, line {number}: '{line[:60]}' is not 'name class-ID'")
        name = os.path.normpath(name[0])
        other, first = found.setdefault(name, (int(label), number))
        if other != int(label):
            problem = f"{name} is class {other} in line {first}, and {int(label)} in line {number}"
            raise RequestError(f"{path}: {problem}")
    if len(found) < len(lines):
        print(f"NOTE: {path}: {len(lines) - len(found)} lines repeat others, and count once")
    if not found:
        raise RequestError(f"{path}: no pictures in it; it takes lines of 'name class-ID'")
    missing = [name for name in found if not os.path.isfile(os.path.join(root, name))]
    if len(missing) > MAX_SKIPPED * len(found):
        problem = f"of {len(found)} pictures, {len(missing)} don't exist in {root}: {missing[0]}"
        raise RequestError(f"{path}: {problem}; it takes lines of 'name class-ID'")
    return [(name, label) for name, (label, _) in found.items()]
