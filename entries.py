"""The entries of models.yml: what a converted file was made from, and how it is used.

By what it was made from, a file is found again in milliseconds and without PyTorch. The rest is
what test mode or a conversion last asked for, in the form of OpenCV's samples.
"""

import importlib.metadata
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

import classification
from classification import RANDOM, RANDOM_SUFFIX, ZOO_NAME, get_load_info, read_lines, read_zoo
from common import SCRIPT_DIR, Preprocessing, get_digest, get_hash, read_fields, whole_file
from processes import LOCAL_RANK
from test_config import MODELS_DIR

SCRIPTS = ("checkpoints", "conversion", "entries", "forward", "networks", "onnx_*")
SCRIPTS += ("preprocessing", "verify")
# What an entry says about a file, and, as its made_from, about the network.
OF_FILE = ("load_info", "outputs", "engines", "activation")
OF_NETWORK = ("sha256", "declared", "class_names", "preprocessing")


@dataclass
class Converted:
    """A network's file for OpenCV, as its entry describes it."""

    path: Path
    load_info: dict  # its hashes
    outputs: int  # how many it has
    engines: list  # OpenCV's engines that give PyTorch's answer with it, the fastest first
    activation: str | None  # "softmax" or "sigmoid", if the outputs are probabilities
    sha256: str  # of all that it was made from
    declared: bool  # whether somebody says how the network wants its pictures
    class_names: list  # that the network carries, if there is one for each output
    preprocessing: Preprocessing  # the network's own


def get_onnx_path(request):
    """Where a converted network is kept: all that you ask for is part of its name."""
    sizes = request.width, request.height
    sides = dict.fromkeys(str(size or "own") for size in sizes) if any(sizes) else []
    stem = "-".join([get_alias(request.name), *sides])
    if request.is_random:
        stem += RANDOM_SUFFIX
    elif request.weights:
        stem += f"-{get_alias(Path(request.weights).stem)}"
        stem += f"-{get_alias(request.weights_key)}" if request.weights_key else ""
        stem += "-weights" if stem.endswith(RANDOM_SUFFIX) else ""  # a file called random.pth
    return Path(MODELS_DIR) / f"{stem}.onnx"


def get_alias(name):
    """The name as file names and cv2.FileStorage take it: my_module:build -> my_module-build"""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
    return name if name[:1].isalpha() or name.startswith("_") else f"_{name}"


def get_sha256(request, network=None):
    """SHA-256 of all that a converted file depends on: request, versions, and our own code."""
    about = asdict(request) | {"opencv": cv2.__version__}
    if request.transform:  # whose size and greyscale are in the file
        p = network.preprocessing
        about["transform"] = f"{p.width}x{p.height} {network.mix}"
    about["weights"] = get_digest(request.weights) if request.is_file else request.weights.lower()
    about |= {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "onnx")}
    about |= {s.name: get_digest(s) for name in SCRIPTS for s in SCRIPT_DIR.glob(f"{name}.py")}
    return get_hash(about)


def describe_file(network, file, engines, references):
    """The Converted of a network's new file, which hasn't got its name yet."""
    path, load_info = get_onnx_path(network.request), get_load_info(file)
    older = read_converted(path)
    if older and older.load_info == load_info:  # a stopped evaluation continues with its engine
        engines = sorted(engines, key=[*older.engines, *engines].index)
    outputs, activation = np.concatenate([logits for _, _, logits in references]), None
    if outputs.min() >= 0 and outputs.max() <= 1:
        adds_up = np.allclose(outputs.sum(axis=1), 1, atol=1e-3)
        activation = "softmax" if adds_up else "sigmoid"
    file = path, load_info, outputs.shape[1], engines, activation
    names = network.class_names if len(network.class_names) == outputs.shape[1] else []
    made_from = get_sha256(network.request, network)
    return Converted(*file, made_from, network.declared, names, network.preprocessing)


def find_converted(request, network=None):
    """The Converted of a request's file, or None; what a loaded network says wins over it."""
    if request.is_own and LOCAL_RANK == 0:
        return None  # what your code computes is unknown, unless torchrun's first process ran it
    path = get_onnx_path(request)
    found = read_converted(path)
    # the file is read last: that takes longest
    same = found and found.sha256 == get_sha256(request, network)
    if not same or found.load_info != get_load_info(path):
        return None
    if network:
        found.preprocessing, found.declared = network.preprocessing, network.declared
    print(f"{path}: reused: converted and verified before, from the same weights and versions")
    return found


def read_converted(path):
    """What the entry of a converted file says about it; None if there is none, or it's damaged."""
    entry = read_entry(path)
    try:
        about = {key: entry.get(key) for key in OF_FILE} | entry["made_from"]
        about["preprocessing"] = Preprocessing(**read_fields(about["preprocessing"]))
        found = Converted(path, **about | {"declared": about["declared"] == 1})
        unknown = {*found.engines} - classification.ENGINES.keys()
        return found if found.engines and found.outputs > 0 and not unknown else None
    except (KeyError, TypeError, AttributeError):
        return None


def read_entry(path):
    """The entry of a converted file, or {}."""
    zoo = path.with_name(ZOO_NAME)
    return read_zoo(zoo).get(path.stem, {}) if zoo.exists() else {}


def write_entry(converted, preprocessing, classes, anew=True):
    """Write the entry of a converted file into the models.yml beside it.

    classes: the file of the class names, which is copied there; None for the network's own. With
    anew=False, an older entry keeps what isn't about the file, if it fits the size and the classes.
    """
    path, facts = converted.path, asdict(converted)
    own, zoo, name = facts["preprocessing"], path.with_name(ZOO_NAME), path.stem
    entry, values = read_entry(path), {}
    about = [entry.get(key) for key in ("model", "width", "height")]
    if anew := anew or about != [path.name, own["width"], own["height"]]:
        values = {"model": path.name, "sample": classification.ZOO_SAMPLE} | asdict(preprocessing)
        values |= {} if preprocessing.resize else dict.fromkeys(classification.PILLOWS)
        values["weights"] = RANDOM if name.endswith(RANDOM_SUFFIX) else None
    old = path.parent / str(entry.get("labels"))
    fits = old.is_file() and len(read_lines(old)) == converted.outputs
    if anew or ("labels" in entry and not fits):
        lines = read_lines(classes) if classes else converted.class_names
        copy = f"{name}_{Path(classes or 'classes.txt').name}" if lines else None
        values |= {"classes": copy, "labels": copy}  # OpenCV 5's own samples read labels
        if lines:
            with whole_file(path.with_name(copy)) as part:
                part.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    facts["preprocessing"] = {key: value for key, value in own.items() if value is not None}
    values |= {key: facts[key] for key in OF_FILE} | {"engine": converted.engines[0]}
    values["made_from"] = {key: facts[key] for key in OF_NETWORK}
    change_entry(zoo, name, values, anew)
    print(f"{zoo}: python classification.py {name}")


def change_entry(zoo, name, values, anew):
    """Replace an entry of a models.yml by these values; or, with anew=False, change these alone.

    None is a key that the entry doesn't have. All else stays as it is, letter for letter.
    """
    text = zoo.read_text("utf-8") if zoo.exists() else "%YAML:1.0\n---\n"
    # nothing may follow YAML's end mark
    text = re.sub(r"^\.\.\.\s*\Z", "", text, flags=re.M).rstrip() + "\n"
    # it ends with its last indented line: what follows a blank line or a comment may be its own
    entry = rf"(?m)^{re.escape(name)} *:.*\n((?:(?:[ \t]*\n|#.*\n)*[ \t]+\S.*\n)*)"
    if anew:
        text = f"{re.sub(entry, '', text).rstrip()}\n{name}:\n"
    found = re.search(entry, text)
    lines = found[1]
    indent = re.match(r"(?:[ \t]*\n|#.*\n)*([ \t]*)", lines)[1] or "  "
    for key, value in values.items():
        # JSON is YAML, but cv2 doesn't take keys in quotes
        value = re.sub(r'"(\w+)":', r"\1:", json.dumps(value, ensure_ascii=False))
        line = f"{indent}{key}: {value}\n" if value not in ("null", "[]") else ""
        # what is indented more belongs to it
        old = re.search(rf"^{indent}{key} *:.*\n(?:{indent}[ \t].*\n)*", lines, flags=re.M)
        start, end = old.span() if old else (len(lines), len(lines))
        lines = lines[:start] + line + lines[end:]
    with whole_file(zoo) as part:
        part.write_text(text[: found.start(1)] + lines + text[found.end(1) :], "utf-8")
        read_zoo(part)
