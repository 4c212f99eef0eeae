"""What all scripts but the sample share: errors, files, models.yml, and the preprocessing."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

from classification import (
    PILLOWS,
    RANDOM,
    RANDOM_SUFFIX,
    ZOO_NAME,
    ZOO_SAMPLE,
    RequestError,
    read_zoo,
)

SCRIPT_DIR = Path(__file__).resolve().parent
SEED = 0  # of random weights, and of the noise that networks are compared on


class NetworksDisagree(RequestError):
    """OpenCV doesn't give PyTorch's answer."""

    exit_code = 1


def find_bundled(path):
    """`path` beside the scripts if it exists there, so that they run from any folder.

    In the scripts' own folder the path stays short, for the messages.
    """
    beside = SCRIPT_DIR / path
    return str(beside) if beside.exists() and Path.cwd() != SCRIPT_DIR else path


def get_digest(path):
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def get_hash(about):
    """SHA-256 of a value that JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def whole_file(path):
    """Yield a path in a hidden folder beside `path`; the file becomes `path` at the end.

    So does what was written beside it, the weights of a large network. An exception leaves nothing
    behind, and what was there before stays. Folders are made as needed. Raises RequestError if the
    file can't be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            part = Path(folder, path.name)
            yield part
            # PATH.data before PATH, which refers to it
            for file in sorted(Path(folder).iterdir(), reverse=True):
                os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise RequestError(f"{path}: can't be written: {error.strerror or error}") from None


def write_entry(converted, preprocessing, classes, options):
    """Write the entry of a converted file into the models.yml beside it.

    It has what classification.py needs, in the form of OpenCV's samples, and what
    conversion.find_converted asks for. Other entries stay as they are, letter for letter.
    classes: the file of the class names, or None; it is copied beside the model, so that you can
    move the folder. options: all else that the entry depends on.
    """
    path, name = converted.path.with_name(ZOO_NAME), converted.path.stem
    entry = {"load_info": converted.load_info, "model": converted.path.name}
    fields = dataclasses.asdict(preprocessing)
    unused = () if preprocessing.resize else PILLOWS
    entry |= {k: v for k, v in fields.items() if v not in (None, ()) and k not in unused}
    entry |= {"engine": converted.engines[0], "engines": converted.engines}
    entry |= {"outputs": converted.outputs, "sample": ZOO_SAMPLE}
    entry |= {"made_from": {"file": converted.made_from, "entry": get_hash(options)}}
    if name.endswith(RANDOM_SUFFIX):
        entry["weights"] = RANDOM
    if classes:  # OpenCV 5's own samples read labels, older ones classes
        entry["classes"] = entry["labels"] = f"{name}_{Path(classes).name}"
        with whole_file(path.with_name(entry["classes"])) as part:
            part.write_bytes(Path(classes).read_bytes())
    text = path.read_text("utf-8") if path.exists() else "%YAML:1.0\n---\n"
    text = re.sub(r"^\.\.\.\s*\Z", "", text, flags=re.M)  # nothing may follow YAML's end mark
    # the older entry ends before the next line that isn't indented
    text = re.sub(rf"^{re.escape(name)} *:.*\n?(?:[ \t].*\n?|\n)*", "", text, flags=re.M)
    lines = (f"  {key}: {json.dumps(v, ensure_ascii=False)}\n" for key, v in entry.items())
    # JSON is YAML, but cv2 doesn't take keys in quotes
    lines = re.sub(r'"(\w+)":', r"\1:", "".join(lines))
    with whole_file(path) as part:
        part.write_text(f"{text.rstrip()}\n{name}:\n{lines}", "utf-8")
        read_zoo(part)
    print(f"{path}: python classification.py {name}")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a blob: what classification.get_blob reads, and what an entry says."""

    scale: float
    mean: tuple  # in the order R G B with rgb, else B G R
    std: tuple  # () for none
    rgb: bool
    crop: bool
    width: int = 224  # of the blob, px
    height: int = 224
    initial_width: int | None = None  # that the picture is resized to first, px
    initial_height: int | None = None
    resize: tuple = ()  # the shorter side, or width and height, px; () for none
    interpolation: str = "bilinear"
    center: str = "round"


def read_tutorial(values):
    """{field: value} of Preprocessing from the tutorial's {name: value}; None is left out.

    It calls initial_width rsz_width. The frame's size, of which a network is made, is left out as
    well: it's in networks.Request.
    """
    named = {name.replace("rsz_", "initial_"): value for name, value in values.items()}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in named.items()
        if name in Preprocessing.__dataclass_fields__ and value is not None
    }
