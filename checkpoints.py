"""A checkpoint file in, the state dict of one network out.

Training scripts wrap state dicts in larger dictionaries, and DataParallel, torch.compile and
Lightning put "module.", "_orig_mod." and "model." before each key.
"""

import argparse
import contextlib
import importlib.util
import pathlib
import re
import warnings
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import torch

from classification import RequestError

# Types and functions that a checkpoint may need beside tensors: they are data and run nothing.
INERT = [
    argparse.Namespace,
    pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath,
    bytes,
    np.dtype, np.ndarray,
    *(kind for code in np.typecodes["All"] for kind in (type(np.dtype(code)), np.dtype(code).type)),
    *((getattr(np._core.multiarray, name), f"numpy.{core}.multiarray.{name}")
      for name in ("_reconstruct", "scalar") for core in ("core", "_core")),  # NumPy 1, and 2
]  # fmt: skip

PROGRAMS = {  # {a file in the archive of a program: how it is loaded}
    "constants.pkl": "torch.jit.load({!r}, 'cpu')",
    "archive_format": "torch.export.load({!r})",
    "serialized_exported_program.json": "torch.export.load({!r})",
}

SAVE = "torch.save(model.state_dict(), FILE)"
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")  # of GoogLeNet and Inception v3, for training


def read_checkpoint(path):
    """What torch.load finds in a checkpoint file; RequestError if it isn't one, or may run code."""
    files = set()
    # a damaged archive raises half a dozen types; torch.load says what is wrong
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        files = {name.rpartition("/")[2] for name in archive.namelist()}
    for load in (PROGRAMS[file] for file in PROGRAMS if file in files):
        kind = "TorchScript archive" if "jit" in load else "torch.export program"
        code = f"import torch; build = lambda: {load.format(str(path))}"
        hint = f"write `{code}` to my_net.py, and give --model_name my_net:build"
        raise RequestError(f"{path}: a {kind}, a network and no state dict; {hint}")
    if str(path).endswith(".safetensors") and importlib.util.find_spec("safetensors") is None:
        raise RequestError(f"{path}: to read it, pip install safetensors")
    try:
        # the warning is about the pickle protocol
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(INERT):
            # weights_only: a pickle can run any code, and a downloaded file is a stranger's
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for files that aren't its own
        reason = f"truncated, or another format ({type(error).__name__})"
        if types := re.findall(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"more than tensors in it, {types[0]}, could run code"
        hint = f"save one with {SAVE}, or load it yourself in a --model_name MODULE:FUNCTION"
        raise RequestError(f"{path}: can't be read: {reason}; {hint}") from None


def find_state_dict(checkpoint, wanted, path, weights_key=""):
    """The tensors of a network in a checkpoint, under the network's own keys.

    wanted: the network's state dict. Takes the first dictionary, the checkpoint or one in it, and
    the first prefix in that, which have all of its keys, or those that `weights_key` names. If none
    fits, it takes those with most keys in common, for load_state_dict's message.
    """
    required = {key for key in wanted if not key.endswith("num_batches_tracked")}
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    found = {}  # {label: (how many of the required keys, dictionary, prefix)}
    for name, state in {"": checkpoint, **checkpoint}.items():
        for prefix, count in count_keys(state, required).items():
            label = ".".join(filter(None, (str(name), prefix.rstrip("."))))
            if weights_key in ("", name) or f".{label}".endswith(f".{weights_key}"):
                found[label] = count, state, prefix
    if not found:
        keys = f", only {', '.join(map(str, checkpoint))[:100]}" if checkpoint else ""
        keys = f" under {weights_key!r}{keys}" if weights_key else keys
        raise RequestError(f"{path}: no weights of this network in it{keys}; save them with {SAVE}")
    fitting = [f"'{label}'" for label, (count, *_) in found.items() if count == len(required)]
    if len(fitting) > 1:
        names = " and ".join(fitting)
        print(f"{path}: weights in {names}: taking {fitting[0]}; --weights_key takes another")
    _, state, prefix = max(found.values(), key=lambda each: each[0])  # the first of equals
    items = [(str(key), value) for key, value in state.items()]
    if outside := [key for key, _ in items if not key.startswith(prefix)]:
        print(f"{path}: taking what is under '{prefix}', without {', '.join(outside)[:100]}")
    named = ((rename(k.removeprefix(prefix)), v) for k, v in items if k.startswith(prefix))
    named = ((k, v) for k, v in named if k in wanted or not k.startswith(AUXILIARY_HEADS))
    inside = OrderedDict(named)
    # modules read older files by the versions in the metadata, and MNASNet demands one
    metadata = getattr(state, "_metadata", {}).items()
    inside._metadata = {"": {"version": 2}, **{k.removeprefix(prefix): v for k, v in metadata}}
    return inside


def count_keys(state, required):
    """{prefix: how many of the required keys a dictionary has under it}; {} for anything else."""
    counts = Counter()
    for key in map(str, state if isinstance(state, dict) else {}):
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", key))):
            counts[key[:start]] += rename(key[start:]) in required
    return +counts  # without those of none


def rename(key):
    """denselayer1.norm.1.weight -> denselayer1.norm1.weight: torchvision's files are older."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)
