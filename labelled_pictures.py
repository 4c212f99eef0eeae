"""A folder or a label file in, pictures and their class IDs out."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from classification import PICTURES, RequestError, read_lines
from common import find_bundled
from label_files import find_label_file, read_label_file
from test_config import CLS_TEST_DATA_DIR, IMAGENET_VAL_DIR


@dataclass
class Data:
    """The labelled pictures of an evaluation."""

    root: str  # their folder
    pictures: list  # (path from the root, class ID); before find_classes, its folder for the ID
    names: list  # of the classes: the lines of --classes, or ImageNet's
    given: str | None = None  # --classes
    source: str = "ImageNet"  # of the names, if not --classes
    bundled: bool = False  # whether they come with this project
    folders: list = field(default_factory=list)  # of the classes
    empty: str = ""  # the folders without a picture, for messages
    named: str = ""  # a label that is a class's name, in a label file


def get_data(config, args, names):
    """The Data of a TestClsConfig, from class folders or a label file.

    args: what the user gave; if neither folder nor label file, the bundled pictures stand in for
    the tutorial's folder. names: the lines of --classes, or ImageNet's.
    """
    data, label_file = Data(config.img_root_dir, [], names, args.classes), args.img_cls_file
    if not (args.img_root_dir or label_file or Path(data.root).exists()):
        print(f"no {IMAGENET_VAL_DIR} here: evaluating on the bundled pictures")
        data.root, data.bundled = find_bundled(CLS_TEST_DATA_DIR), True
        label_file = str(Path(data.root, "val.txt"))
    if not Path(data.root).is_dir():
        raise RequestError(f"--img_root_dir {data.root}: no such folder")
    if not label_file:
        find_pictures(data)
    if not data.pictures:
        path, classes = label_file or find_label_file(data.root), index_classes(names)
        data.pictures, data.named = read_label_file(path, data.root, classes)
    return data


def find_pictures(data):
    """Put the pictures of each class folder, and its subfolders, into the Data.

    Hidden files are left out, and links aren't followed. All else is counted in one line.
    """
    others, empty = [], []
    for folder in sorted(e.name for e in os.scandir(data.root) if e.is_dir() and e.name[0] != "."):
        files = [file.relative_to(data.root) for file in Path(data.root, folder).rglob("*")]
        files = sorted(file for file in files if not any(part[0] == "." for part in file.parts))
        found = [(str(file), folder) for file in files if file.suffix.lower() in PICTURES]
        (data.folders if found else empty).append(folder)
        data.pictures += found
        rest = (file for file in files if file.suffix.lower() not in PICTURES)
        others += [f.suffix.lower() or "no suffix" for f in rest if Path(data.root, f).is_file()]
    data.empty = f" (no pictures in {', '.join(empty)})" if empty else ""
    if others:
        kinds = ", ".join(sorted(set(others)))
        print(f"{data.root}: left out: {len(others)} files that aren't pictures: {kinds}")


def index_classes(names):
    """{name: class ID}: a class's line, its first synonym, or its first word ("n01440764 tench").

    ImageNet's classes have synsets instead of the word. What could mean two classes isn't in it.
    """
    names = [name.strip() for name in names]
    synonyms, words = ([name.partition(end)[0] for name in names] for end in ", ")
    if names == read_lines(find_bundled(f"{CLS_TEST_DATA_DIR}/imagenet_classes.txt")):
        words = read_lines(find_bundled(f"{CLS_TEST_DATA_DIR}/imagenet_synsets.txt"))
    found = {}
    for forms in (words, synonyms, names):  # a line wins over a synonym, and that over a word
        times = Counter(forms)
        found |= {form: i for i, form in enumerate(forms) if form and times[form] == 1}
    return found


def find_classes(data, outputs):
    """Put the class IDs into data.pictures, and the names of all classes into data.names.

    Raises RequestError if they can't be those of a network with so many outputs.
    """
    count = max(outputs, 2)  # a single output tells class 0 from class 1
    names = data.names if len(data.names) == count else []
    if data.bundled and count != 1000:
        problem = f"the bundled pictures are of ImageNet's 1000 classes, the network has {count}"
        raise RequestError(f"{problem}: give --img_root_dir, --test True or --evaluate False")
    if data.given and not names:
        problem = f"{len(data.names)} lines, but the network has {outputs} outputs"
        raise RequestError(f"{data.given}: {problem}")
    if data.named and not names:
        problem = f"'{data.named}' is a class of ImageNet, but the network has {count} classes"
        raise RequestError(f"{problem}: give --classes, or class IDs")
    if data.folders:
        names = resolve_folders(data, names, count)
    picture, highest = max(data.pictures, key=lambda item: item[1])
    if highest >= count:
        problem = f"{picture} has class ID {highest}"
        raise RequestError(f"{problem}, but the network's classes are 0 to {count - 1}")
    data.names = names or [f"class {i}" for i in range(count)]


def resolve_folders(data, names, count):
    """Replace the pictures' folders by class IDs; return the names of all classes, or [].

    A folder is the class of that name, if names are in force: those of --classes, or ImageNet's if
    the network has 1000 outputs and one of the folders is such a class. Else its number is the ID,
    or the folders are all the classes, in sorted order.
    """
    folders, classes = data.folders, index_classes(names)
    unknown = [folder for folder in folders if folder not in classes]
    inside = [{e.name for e in os.scandir(Path(data.root, f)) if e.is_dir()} for f in folders]
    if not unknown:
        ids = [classes[folder] for folder in folders]
    elif all(re.fullmatch(r"[0-9]{1,9}", folder) for folder in folders):
        ids = [int(folder) for folder in folders]
        if sorted(ids) == [*range(count)] != ids:
            note = "the folders are class IDs; ImageFolder trains on 0, 1, 10, 2 ..."
            print(f"NOTE: {note}: for that order, give --classes with the names in it")
    elif any(len(a & b) > 1 for a, b in combinations(inside, 2)):
        problem = f"{', '.join(folders[:5])} have the same folders in them"
        raise RequestError(f"{data.root}: {problem}: give one of them as --img_root_dir")
    elif data.given or len(unknown) < len(folders) or len(folders) != count:
        which = f"not in {data.given or data.source}: " if names else ""
        problem = f"{len(folders)} class folders for {count} classes, {which}"
        problem += f"{', '.join(unknown[:5])}{data.empty}"
        hint = "name them by IDs, or lines or first words of --classes, or have one for each class"
        raise RequestError(f"{data.root}: {problem}: {hint}")
    else:
        ids, names = range(count), folders
    ends = ", ..., ".join(f"folder {folders[i]} is class {ids[i]}" for i in (0, -1))
    found = f"{len(data.pictures)} pictures in {len(folders)} classes: {ends}"
    print(f"{data.root}: {found}{data.empty}")
    ids = dict(zip(folders, ids, strict=True))
    data.pictures = [(picture, ids[folder]) for picture, folder in data.pictures]
    return names
