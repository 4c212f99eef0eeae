"""A folder or a label file in, pictures and their class IDs out."""

import csv
import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from classification import PICTURES, RequestError, read_lines
from common import find_bundled
from test_config import CLS_TEST_DATA_DIR, IMAGENET_VAL_DIR, TestClsConfig

MAX_SKIPPED = 0.01  # of the pictures: more that can't be read, and the figures are another set's
A_LINE = "a line is NAME,LABEL (or a tab, or a space), and LABEL a class ID or a class's name"


@dataclass
class Data:
    """The labelled pictures of an evaluation."""

    root: str  # their folder
    pictures: list  # (path from the root, class ID); before find_classes, its folder for the ID
    names: list  # of the classes: the lines of --classes, or ImageNet's
    given: str | None = None  # --classes
    source: str = "ImageNet"  # of the names, if not --classes
    bundled: bool = False  # whether they come with this project
    empty: str = ""  # the class folders without a picture, for messages
    named: str = ""  # a label that is a class's name, in a label file


def get_data(config, args, names):
    """The Data from class folders, a label file, or the bundled pictures; names: see there."""
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
        read_label_file(data, label_file or find_label_file(data.root))
    return data


def find_pictures(data):
    """Put the pictures below the class folders into the Data, but no hidden or linked ones."""
    folders = [e.name for e in os.scandir(data.root) if e.is_dir() and e.name[0] != "."]
    paths = (path for folder in folders for path in Path(data.root, folder).rglob("*"))
    files = sorted(path.relative_to(data.root) for path in paths if not path.is_dir())
    files = [file for file in files if not any(part[0] == "." for part in file.parts)]
    data.pictures = [(str(f), f.parts[0]) for f in files if f.suffix.lower() in PICTURES]
    others = [f.suffix.lower() or "no suffix" for f in files if f.suffix.lower() not in PICTURES]
    empty = sorted({*folders} - {folder for _, folder in data.pictures})
    data.empty = f" (no pictures in {', '.join(empty)})" if empty else ""
    if others:
        kinds = ", ".join(sorted(set(others)))
        print(f"{data.root}: left out: {len(others)} files that aren't pictures: {kinds}")


def index_classes(names):
    """{name: class ID} of each line, first synonym or first word (synset) that only one has."""
    names = [name.strip() for name in names]
    synonyms, words = ([name.partition(end)[0] for name in names] for end in ", ")
    if names == read_lines(find_bundled(f"{CLS_TEST_DATA_DIR}/imagenet_classes.txt")):
        words = read_lines(find_bundled(f"{CLS_TEST_DATA_DIR}/imagenet_synsets.txt"))
    found = {}
    for forms in (words, synonyms, names):  # a line wins over a synonym, and that over a word
        times = Counter(forms)
        found |= {form: i for i, form in enumerate(forms) if form and times[form] == 1}
    return found


def find_label_file(root):
    """The val.txt of the current folder, or the val.txt or val.csv of the pictures' folder."""
    paths = [f"{root}/val.csv", f"{root}/val.txt", TestClsConfig.img_cls_file]
    found = {Path(path).read_bytes(): path for path in paths if os.path.isfile(path)}
    if len(found) == 1:
        return found.popitem()[1]
    names = " and ".join(found.values())
    problem = f"{names} differ" if found else f"no pictures in folders, and no {paths[-1]}"
    raise RequestError(f"{root}: {problem}: give the file of the labels as --img_cls_file")


def read_label_file(data, path):
    """Put the pictures of a label file into the Data, in its order."""
    root, classes, found, lines = data.root, index_classes(data.names), {}, 0
    # Kaggle's names have no suffix
    stems = {Path(f).stem: f for f in os.listdir(root) if f.lower().endswith(PICTURES)}
    for number, text in enumerate(map(str.strip, read_lines(path)), 1):
        # the separator under which there are such a picture and such a class
        options = read_line(text, root, stems, classes)
        name, picture, class_id, label = max(options, key=lambda o: (bool(o[1]), o[2] is not None))
        if not text or (not picture and (text[0] == "#" or (number == 1 and class_id is None))):
            continue  # a comment, or a header
        if class_id is None:
            raise RequestError(f"{path}, line {number}: '{text[:60]}': {A_LINE}")
        picture, lines = os.path.normpath(picture or name), lines + 1
        other, first = found.setdefault(picture, (class_id, number))
        if other != class_id:
            problem = f"{picture} is class {other} in line {first}, and {class_id} in line {number}"
            raise RequestError(f"{path}: {problem}")
        data.named = data.named or ("" if label.isdecimal() else label)
    if len(found) < lines:
        print(f"NOTE: {path}: {lines - len(found)} lines repeat others, and count once")
    missing = [name for name in found if not os.path.isfile(os.path.join(root, name))]
    if len(missing) > MAX_SKIPPED * len(found):
        problem = f"of {len(found)} pictures, {len(missing)} don't exist in {root}"
        raise RequestError(f"{path}: {problem}: {missing[0]}; {A_LINE}")
    if not found:
        raise RequestError(f"{path}: no pictures in it; {A_LINE}")
    data.pictures = [(picture, class_id) for picture, (class_id, _) in found.items()]


def read_line(text, root, stems, classes):
    """Yield (name, picture or None, class ID or None, label) as each separator splits the line."""
    yield text, None, None, ""
    for separator in "\t, ":
        fields = [field.strip() for field in next(csv.reader([text], delimiter=separator), [])]
        if separator == " ":  # the last one: names may have spaces
            fields = [" ".join(fields[:-1]).strip(), *fields[-1:]]
        if len(fields) < 2 or not fields[0]:
            continue
        name, label, *others = fields
        picture = name if os.path.isfile(os.path.join(root, name)) else stems.get(name)
        # after a name, numbers are a box, which Kaggle has in the same column: "n01440764 0 32 44"
        class_id = classes.get(label, classes.get(re.sub(r"^(\S+) -?[\d.]+( .*)?$", r"\1", label)))
        if re.fullmatch(r"[0-9]{1,9}", label):  # after an ID, they are a one-hot table's
            one_hot = any(re.fullmatch(r"-?[\d.]+", other) for other in others)
            class_id = None if one_hot else int(label)
        yield name, picture, class_id, label


def find_classes(data, outputs):
    """Put the class IDs and all classes' names into the Data; RequestError if they don't fit."""
    count = max(outputs, 2)  # a single output tells class 0 from class 1
    names = data.names if len(data.names) == count else []
    if data.bundled and count != 1000:
        problem = f"the bundled pictures are of ImageNet's 1000 classes, the network has {count}"
        raise RequestError(f"{problem}: give --img_root_dir, --test True or --evaluate False")
    if data.given and not names:
        lines = len(data.names)
        raise RequestError(f"{data.given}: {lines} lines, but the network has {outputs} outputs")
    if data.named and not names:
        raise RequestError(f"'{data.named}' is a class of ImageNet: give --classes, or class IDs")
    if isinstance(data.pictures[0][1], str):
        names = resolve_folders(data, names, count)
    picture, highest = max(data.pictures, key=lambda item: item[1])
    if highest >= count:
        raise RequestError(f"{picture} has class ID {highest}, the network has 0 to {count - 1}")
    data.names = names or [f"class {i}" for i in range(count)]


def resolve_folders(data, names, count):
    """Replace folders by class IDs, by name, number or order; return all classes' names, or []."""
    folders, classes = sorted({folder for _, folder in data.pictures}), index_classes(names)
    unknown = [folder for folder in folders if folder not in classes]
    inside = [{e.name for e in os.scandir(Path(data.root, f)) if e.is_dir()} for f in folders]
    if not unknown:
        ids = {folder: classes[folder] for folder in folders}
    elif all(re.fullmatch(r"[0-9]{1,9}", folder) for folder in folders):
        ids = {folder: int(folder) for folder in folders}
        if sorted(ids.values()) == [*range(count)] != [*ids.values()]:
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
        ids, names = {folder: i for i, folder in enumerate(folders)}, folders
    ends = ", ..., ".join(f"folder {f} is class {ids[f]}" for f in (folders[0], folders[-1]))
    print(f"{data.root}: {len(data.pictures)} pictures in {len(ids)} classes: {ends}{data.empty}")
    data.pictures = [(picture, ids[folder]) for picture, folder in data.pictures]
    return names
