"""The entries of models.yml: what a converted file was made from, and how it is used.

The file is made once per network; its entry says what it was made from, so that it is found again
in milliseconds and without PyTorch. The rest of the entry is what test mode or a conversion last
asked for, in the form of OpenCV's samples.
"""

import importlib.metadata
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import cv2
import numpy as np

from classification import (
    ENGINES,
    PILLOWS,
    RANDOM,
    RANDOM_SUFFIX,
    ZOO_NAME,
    ZOO_SAMPLE,
    get_load_info,
    read_lines,
    read_zoo,
)
from common import SCRIPT_DIR, Preprocessing, get_digest, get_hash, whole_file
from processes import LOCAL_RANK
from test_config import MODELS_DIR

SCRIPTS = ("checkpoints", "conversion", "entries", "forward", "networks", "onnx_*")
SCRIPTS += ("preprocessing", "verify")


@dataclass
class Converted:
    """A network's file for OpenCV, as its entry describes it."""

    path: Path
    load_info: dict  # its hashes
    engines: list  # OpenCV's engines that give PyTorch's answer with it, the fastest first
    outputs: int  # how many it has
    activation: str | None  # "softmax" or "sigmoid", if the outputs are probabilities
    made_from: str  # SHA-256 of all that it was made from
    preprocessing: Preprocessing  # the network's own
    declared: bool  # whether somebody says how it wants its pictures
    known_classes: bool  # whether it's known which ones they are, or doesn't matter
    class_names: list  # that it carries

    def get_class_names(self):
        """Those that it carries if there is one for each output, or []."""
        return self.class_names if len(self.class_names) == self.outputs else []


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


def get_made_from(request, network=None):
    """SHA-256 of all that a converted file depends on: request, versions, and our own code.

    network: of a request with a --transform, whose size and greyscale are in the file.
    """
    about = asdict(request) | {"opencv": cv2.__version__}
    if request.transform:
        p, mix = network.preprocessing, network.mix
        about["transform"] = [p.width, p.height, mix if mix is None else mix.tolist()]
    about["weights"] = get_digest(request.weights) if request.is_file else request.weights.lower()
    about |= {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "onnx")}
    for script in (path for name in SCRIPTS for path in SCRIPT_DIR.glob(f"{name}.py")):
        about[script.name] = get_digest(script)
    return get_hash(about)


def describe_file(network, file, engines, references):
    """The Converted of a network's new file, which hasn't got its name yet.

    Its outputs are probabilities if all references' are. Of the same file as before, the engines
    keep their order: which one is faster can differ from time to time, and an evaluation that was
    stopped continues with the same engine only.
    """
    path, load_info = get_onnx_path(network.request), get_load_info(file)
    entry = read_entry(path)
    if entry.get("load_info") == load_info and isinstance(entry.get("engines"), list):
        older = [engine for engine in entry["engines"] if engine in engines]
        engines = list(dict.fromkeys([*older, *engines]))
    outputs, activation = np.concatenate([reference.logits for reference in references]), None
    if outputs.min() >= 0 and outputs.max() <= 1:
        adds_up = np.allclose(outputs.sum(axis=1), 1, atol=1e-3)
        activation = "softmax" if adds_up else "sigmoid"
    made_from = get_made_from(network.request, network)
    file = path, load_info, engines, outputs.shape[1], activation, made_from
    return Converted(*file, **describe_network(network))


def describe_network(network):
    """What a Converted says about the network itself."""
    return {
        "preprocessing": network.preprocessing,
        "declared": network.declared,
        "known_classes": bool(network.published) or network.request.is_random,
        "class_names": network.class_names,
    }


def find_converted(request, network=None):
    """The Converted of a request's file, if its entry says so; else None.

    What it says about the network is the Network's, if you have it, and the entry's if not.
    """
    if request.is_own and LOCAL_RANK == 0:
        return None  # what your code computes is unknown, unless torchrun's first process ran it
    path = get_onnx_path(request)
    entry = read_entry(path)
    try:
        about = {key: entry[key] for key in ("load_info", "engines", "outputs")}
        about |= {"path": path, "activation": entry.get("activation")} | entry["made_from"]
        about["made_from"] = about.pop("file")
        about["preprocessing"] = read_dataclass(Preprocessing, about["preprocessing"])
        found = read_dataclass(Converted, about | (describe_network(network) if network else {}))
        damaged = not found.engines or not {*found.engines} <= ENGINES.keys()
        damaged = damaged or not found.outputs > 0
    except (KeyError, TypeError, ValueError, AttributeError):  # there is none, or it lacks a key
        return None
    if damaged or found.made_from != get_made_from(request, network):
        return None
    if found.load_info != get_load_info(path):  # last: it reads the whole file
        return None
    print(f"{path}: reused: converted and verified before, from the same weights and versions")
    return found


def read_dataclass(kind, values):
    """A dataclass from an entry, in which cv2 reads true as 1, in OpenCV 4 as "true"."""
    types = {field.name: field.type for field in fields(kind)}
    read = {bool: lambda value: value in (1, "true"), tuple: tuple}
    return kind(**{name: read.get(types[name], lambda v: v)(v) for name, v in values.items()})


def read_entry(path):
    """The entry of a converted file, or {}."""
    zoo = path.with_name(ZOO_NAME)
    return read_zoo(zoo).get(path.stem, {}) if zoo.exists() else {}


def write_entry(converted, preprocessing, classes, anew=True):
    """Write the entry of a converted file into the models.yml beside it.

    classes: the file of the class names, or None for the network's own; it is copied beside the
    model, so that you can move the folder. With anew=False an entry that is there says what the
    file is now; how it is used stays, unless the network takes pictures of another size, or the
    number of classes changed.
    """
    path, own = converted.path, converted.preprocessing
    entry, name, values = read_entry(path), path.stem, {}
    about = [entry.get(key) for key in ("model", "width", "height")]
    if anew := anew or about != [path.name, own.width, own.height]:
        values = {"model": path.name, "sample": ZOO_SAMPLE} | asdict(preprocessing)
        values |= {} if preprocessing.resize else dict.fromkeys(PILLOWS)
        values["weights"] = RANDOM if name.endswith(RANDOM_SUFFIX) else None
    old = path.parent / str(entry.get("labels"))
    fits = old.is_file() and len(read_lines(old)) == converted.outputs
    if anew or ("labels" in entry and not fits):
        lines = read_lines(classes) if classes else converted.get_class_names()
        copy = f"{name}_{Path(classes or 'classes.txt').name}" if lines else None
        values |= {"classes": copy, "labels": copy}  # OpenCV 5's own samples read labels
        if lines:
            with whole_file(path.with_name(copy)) as part:
                part.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    facts, keys = asdict(converted), ("declared", "known_classes", "class_names")
    made_from = {"file": converted.made_from} | {key: facts[key] for key in keys}
    made_from["preprocessing"] = {key: v for key, v in asdict(own).items() if v is not None}
    values |= {key: facts[key] for key in ("load_info", "outputs", "engines", "activation")}
    values |= {"engine": converted.engines[0], "made_from": made_from}
    change_entry(path.with_name(ZOO_NAME), name, values, anew)
    print(f"{path.with_name(ZOO_NAME)}: python classification.py {name}")


def change_entry(zoo, name, values, anew):
    """Replace an entry of a models.yml by these values; or, with anew=False, change these alone.

    None is a key that the entry doesn't have. All else stays as it is, letter for letter.
    """
    text = zoo.read_text("utf-8") if zoo.exists() else "%YAML:1.0\n---\n"
    # nothing may follow YAML's end mark
    text = re.sub(r"^\.\.\.\s*\Z", "", text, flags=re.M).rstrip() + "\n"
    # it ends with its last indented line: what follows a blank line or a comment may be its own
    entry = rf"(?m)^{re.escape(name)} *:.*\n((?:(?:[ \t]*\n|#.*\n)*[ \t]+\S.*\n)*)"
    if anew or not re.search(entry, text):
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
