"""The class names that a network or a checkpoint carries."""

import re

import numpy as np

# As training scripts, transformers, ultralytics and ImageFolder call them.
KEYS = ("class_names", "classes", "id2label", "idx_to_class", "names", "class_to_idx")


def find_class_names(about):
    """The names in a dictionary or in one in it, in the order of the classes; [] for none."""
    for values in (about, *(value for value in about.values() if isinstance(value, dict))):
        for names in (values[key] for key in KEYS if key in values):
            names = sort_names(names) if isinstance(names, dict) else names
            names = names if isinstance(names, (list, tuple, np.ndarray)) else []
            are_names = all(isinstance(name, str) for name in names)
            # transformers and ultralytics have numbers if nobody gave names
            if are_names and not all(re.fullmatch(r"(LABEL_|class)?\d+", name) for name in names):
                return [" ".join(name.split()) for name in names]
    return []


def sort_names(names):
    """The names of {class ID: name} or {name: class ID}, in the order of the IDs."""
    if all(isinstance(value, int) for value in names.values()):
        names = {value: name for name, value in names.items()}
    are_ids = all(str(key).isdecimal() for key in names)
    return [names[key] for key in sorted(names, key=int)] if are_ids else []
