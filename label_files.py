"""A label file as people have them in, pictures and their class IDs out.

A line is NAME and LABEL, separated by a comma, a tab, or the last space; LABEL is a class ID or the
name of a class. There may be a header, comments and further columns.
"""

import csv
import os
import re
from pathlib import Path

from classification import PICTURES, RequestError, read_lines
from test_config import TestClsConfig

MAX_SKIPPED = 0.01  # of the pictures: more that can't be read, and the figures are another set's
A_LINE = "a line is NAME,LABEL (or a tab, or a space), and LABEL a class ID or a class's name"


def find_label_file(root):
    """The val.txt of the current folder, or the val.txt or val.csv of the pictures' folder."""
    here = TestClsConfig.img_cls_file
    paths = [here, os.path.join(root, "val.txt"), os.path.join(root, "val.csv")]
    found = {Path(path).read_bytes(): path for path in paths[::-1] if os.path.isfile(path)}
    if len(found) != 1:
        problem = f"no pictures in folders, and no {here}"
        problem = f"{' and '.join(found.values())} differ" if found else problem
        raise RequestError(f"{root}: {problem}: give the file of the labels as --img_cls_file")
    return found.popitem()[1]


def read_label_file(path, root, classes):
    """([(picture, class ID)] of a label file, in its order; a label that is a name, or "").

    classes: {name: class ID}.
    """
    # Kaggle's names have no suffix
    stems = {Path(f).stem: f for f in os.listdir(root) if f.lower().endswith(PICTURES)}
    found, lines, named = {}, 0, ""
    for number, text in enumerate(map(str.strip, read_lines(path)), 1):
        options = [(text, None, None, "")]  # name, picture, class ID, label
        for name, label, others in split_line(text):
            picture = name if os.path.isfile(os.path.join(root, name)) else stems.get(name)
            options.append((name, picture, read_label(label, others, classes), label))
        # the separator under which there are such a picture and such a class
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
        named = named or ("" if label.isdecimal() else label)
    if len(found) < lines:
        print(f"NOTE: {path}: {lines - len(found)} lines repeat others, and count once")
    missing = [name for name in found if not os.path.isfile(os.path.join(root, name))]
    if len(missing) > MAX_SKIPPED * len(found):
        problem = f"of {len(found)} pictures, {len(missing)} don't exist in {root}"
        raise RequestError(f"{path}: {problem}: {missing[0]}; {A_LINE}")
    if not found:
        raise RequestError(f"{path}: no pictures in it; {A_LINE}")
    return [(picture, class_id) for picture, (class_id, _) in found.items()], named


def split_line(text):
    """Yield (name, label, further columns) for each separator that a line of a label file has."""
    for separator in "\t, ":
        fields = [field.strip() for field in next(csv.reader([text], delimiter=separator), [])]
        if separator == " ":  # the last one: names may have spaces
            fields = [" ".join(fields[:-1]).strip(), *fields[-1:]]
        if len(fields) > 1 and fields[0]:
            yield fields[0], fields[1], fields[2:]


def read_label(label, others, classes):
    """The class ID of a label, which is an ID or a class's name; None if it is neither.

    others: the columns after it. After a name they are a box ("n01440764 0 32 44 62", in Kaggle's
    file in one column); numbers after an ID are a one-hot table's.
    """
    if re.fullmatch(r"[0-9]{1,9}", label):
        return None if any(re.fullmatch(r"-?[\d.]+", other) for other in others) else int(label)
    return classes.get(label, classes.get(re.sub(r"^(\S+) -?[\d.]+( .*)?$", r"\1", label)))
