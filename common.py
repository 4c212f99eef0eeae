"""What all scripts but the sample share: errors, files, the request and the preprocessing."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import tempfile
from pathlib import Path

from classification import RANDOM, RequestError

SCRIPT_DIR = Path(__file__).resolve().parent
SEED = 0  # of random weights, and of the noise that networks are compared on


class NetworksDisagree(RequestError):
    """OpenCV doesn't give PyTorch's answer."""

    exit_code = 1


def find_bundled(path):
    """`path` beside the scripts if it exists there, so that they run from any folder."""
    beside = SCRIPT_DIR / path  # in that folder the path stays short, for the messages
    return str(beside) if beside.exists() and Path.cwd() != SCRIPT_DIR else path


def get_digest(path):
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def get_hash(about):
    """SHA-256 of a value that JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def whole_file(path):
    """Yield a path in a hidden folder beside `path`, into whose folder all is moved at the end.

    An exception leaves all as it was. Raises RequestError if the file can't be written.
    """
    path = Path(path)
    prefix = f".{path.name}.{platform.node()}.{os.getpid()}."  # for remove_leftovers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as folder:
            part = Path(folder, path.name)
            yield part
            # PATH.data before PATH, which refers to it
            for file in sorted(Path(folder).iterdir(), reverse=True):
                os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise RequestError(f"{path}: can't be written: {error.strerror or error}") from None


def remove_leftovers(folder):
    """Remove the hidden folders of whole_file whose process was killed, but none that runs."""
    # on Windows, os.kill would end the process
    for path in Path(folder).glob(f".*.{platform.node()}.*.*") if os.name == "posix" else ():
        try:
            os.kill(int(path.name.split(".")[-2]), 0)  # signal 0 only asks whether it is there
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (PermissionError, ValueError):  # another user's process; a file of another kind
            continue


@dataclasses.dataclass(frozen=True)
class Request:
    """Which network is wanted, as --model_name, --weights and the size options say it."""

    name: str  # torchvision's, or "module:function"
    weights: str = ""  # torchvision's name, a file, "random"; "" for the default ones
    weights_key: str = ""  # of the state dict in the file; "" for the first that fits
    width: int | None = None  # of its pictures, px; None for its own
    height: int | None = None
    transform: str = ""  # the user's, "module:name"; "" for that of the network's library

    @property
    def is_own(self):
        """Whether the network comes from your code."""
        return ":" in self.name

    @property
    def size(self):
        """(width, height), or None unless both are given."""
        return (self.width, self.height) if self.width and self.height else None

    @property
    def is_random(self):
        return self.weights.lower() == RANDOM

    @property
    def is_file(self):
        return not self.is_random and Path(self.weights).is_file()


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


def read_fields(values):
    """{field: value} of Preprocessing in options, a config or an entry; None is left out."""
    found = {}
    for field in dataclasses.fields(Preprocessing):
        # the tutorial calls initial_width rsz_width; cv2 reads true as 1
        value = values.get(field.name, values.get(field.name.replace("initial", "rsz")))
        if value is not None:
            found[field.name] = field.type(value) if field.type in (bool, tuple) else value
    return found
