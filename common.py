"""What the scripts share: errors, the command line, files and models.yml.

classification.py is copied elsewhere by itself, so what it needs is defined there. All other
scripts import it from here, and from nowhere else.
"""

import contextlib
import dataclasses
import json
import os
import re
from pathlib import Path

from classification import (  # noqa: F401 (for the other scripts)
    ENGINES,
    PICTURE_SUFFIXES,
    RANDOM,
    RANDOM_SUFFIX,
    RANDOM_WARNING,
    TORCHVISION_PREPROCESSING,
    ZOO_NAME,
    ZOO_SAMPLE,
    OneLineParser,
    Preprocessing,
    RequestError,
    available,
    check_model,
    fit_labels,
    get_blob,
    get_digest,
    get_load_info,
    one_line,
    parse_bool,
    parse_preprocessing,
    positive_int,
    read_lines,
    read_onnx,
    read_picture,
    read_zoo,
    run,
)

SCRIPT_DIR = Path(__file__).resolve().parent
SEED = 0  # of random weights, and of the noise that networks are compared on


class NetworksDisagree(RequestError):
    """OpenCV doesn't give PyTorch's answer."""

    exit_code = 1


# --- files ----------------------------------------------------------------------------------------


def find_bundled(path):
    """`path` beside the scripts if it exists there, so that they run from any folder.

    In the scripts' own folder the path stays short, for the messages.
    """
    beside = SCRIPT_DIR / path
    return str(beside) if beside.exists() and Path.cwd() != SCRIPT_DIR else path


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`; it becomes `path` at the end of the block.

    An exception leaves nothing behind. Folders are made as needed. Raises RequestError if the file
    can't be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        yield part
        os.replace(part, path)
    except OSError as error:
        raise RequestError(f"{path}: can't be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


# --- preprocessing, from and to other forms -------------------------------------------------------

# What test_config.py and default_preprocess_config.py call some fields of Preprocessing.
CONFIG_NAMES = {
    "width": "frame_width",
    "height": "frame_height",
    "initial_width": "rsz_width",
    "initial_height": "rsz_height",
}


def read_config(texts):
    """{field: value} of Preprocessing from the texts of a config: {"rsz_width": "256", ...}."""
    return parse_preprocessing(texts, "--", CONFIG_NAMES)


def to_entry(preprocessing):
    """{key: value} of an entry of models.yml."""
    return {k: v for k, v in dataclasses.asdict(preprocessing).items() if v not in (None, ())}


def to_options(preprocessing):
    """The preprocessing as a command line for classification.py."""
    options = []
    for name, value in to_entry(preprocessing).items():
        options += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return options


# --- models.yml -----------------------------------------------------------------------------------


def get_alias(name):
    """The name as file names and cv2.FileStorage take it: my_module:build -> my_module-build"""
    name = re.sub(r"[^\x00-\x7f]", lambda letter: f"u{ord(letter.group()):x}", name)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
    return name if name[:1].isalpha() or name.startswith("_") else f"_{name}"


def is_default_wrong(engines):
    """Whether readNetFromONNX takes an engine by default that isn't among these."""
    return "new" in available(ENGINES) and "new" not in engines


def add_to_zoo(alias, converted, preprocessing, classes):
    """Write the entry that classification.py needs into the models.yml beside the file.

    In the form of the models.yml of OpenCV's samples. Other entries stay as they are, letter for
    letter. classes: the file of the class names, or None; it is copied beside the model, so that
    you can move the folder.
    The entry is called `alias`, and also like the file; random weights don't take the alias from
    trained ones.
    """
    onnx_path, engines = converted.path, converted.engines
    path = onnx_path.parent / ZOO_NAME
    random = onnx_path.stem.endswith(RANDOM_SUFFIX)
    new = {"load_info": converted.load_info or get_load_info(onnx_path), "model": onnx_path.name}
    new |= to_entry(preprocessing) | {"engine": engines[0], "sample": ZOO_SAMPLE}
    new |= {"weights": RANDOM} if random else {}
    if classes:  # OpenCV 5's own samples read labels, older ones classes
        name = copy_classes(classes, onnx_path)
        new |= {"classes": name, "labels": name}
    entries = read_zoo(path) if path.exists() else {}
    holder = entries.get(alias)
    if random and isinstance(holder, dict) and holder.get("weights") != RANDOM:
        alias = onnx_path.stem
    text = path.read_text("utf-8") if path.exists() else "%YAML:1.0\n---\n"
    text = re.sub(r"^\.\.\.\s*\Z", "", text, flags=re.M)  # nothing may follow YAML's end mark
    lines = "".join(f"  {key}: {to_yaml(value)}\n" for key, value in new.items())
    if is_default_wrong(engines):
        lines = f"  # right with ENGINE_CLASSIC only, which isn't OpenCV's default\n{lines}"
    for name in dict.fromkeys((alias, onnx_path.stem)):
        # the older entry ends before the next line that isn't indented
        text = re.sub(rf"^{re.escape(name)} *:.*\n?(?:[ \t].*\n?|\n)*", "", text, flags=re.M)
        text = f"{text.rstrip()}\n{name}:\n{lines}"
    with whole_file(path) as part:
        part.write_text(text, "utf-8")
        read_zoo(part)
    before, after = entries.get(alias) or {}, read_zoo(path)[alias]
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    note = f" (changed: {', '.join(changed)})" if before and changed else ""
    print(f"{path}: python classification.py {alias}{note}")


def to_yaml(value):
    """A value of an entry in one line; JSON is YAML, but cv2 doesn't take keys in quotes."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key}: {to_yaml(item)}' for key, item in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)


def copy_classes(classes, onnx_path):
    """Copy the file of the class names to where the model is; return the copy's name."""
    content = Path(classes).read_bytes()
    target = onnx_path.with_name(Path(classes).name)
    if target.exists() and target.read_bytes() != content:
        target = onnx_path.with_name(f"{onnx_path.stem}_{target.name}")
    with whole_file(target) as part:
        part.write_bytes(content)
    return target.name
