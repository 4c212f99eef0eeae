"""A PyTorch network in, a verified ONNX file out.

Export, rewrite around OpenCV's faults, compare the answer on each engine: only a file that is right
is kept. It remembers what it was made from, so that a second conversion takes milliseconds and
doesn't import torch.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import shutil
import tempfile
import traceback
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import cv2

from common import (
    ENGINES,
    RANDOM_SUFFIX,
    SCRIPT_DIR,
    SEED,
    ZOO_NAME,
    NetworksDisagree,
    Preprocessing,
    RequestError,
    available,
    get_alias,
    get_digest,
    get_load_info,
    is_default_wrong,
    read_zoo,
)
from networks import Network, Weights, checkpoints_dir, is_own
from verify import measure_rounding, verify

# OpenCV 5.0.0, 4.14 and 4.10 all read it, with the same answers.
OPSET_VERSION = 17
MAX_ONNX_SIZE = 2**31 - 2**20  # bytes of weights, with room for the graph
INPUT_NAME, OUTPUT_NAME = "input", "output"


@dataclass
class Converted:
    """A network's file for OpenCV."""

    path: Path
    engines: list  # OpenCV's engines that give PyTorch's answer with it, the fastest first
    classes: int  # how many logits it has
    load_info: dict | None = None  # its hashes, if they are known


class BranchesOnInput(RequestError):
    """The network's code branches on the values of its input."""


# --- converted before -----------------------------------------------------------------------------


def find_network(name, weights, models_dir):
    """The Network as the metadata of its converted file describe it, without its module.

    None if the file is missing, or was made from other weights or with other versions. Doesn't
    import torch.
    """
    if is_own(name):  # what the user's code computes is unknown
        return None
    # --weights IMAGENET1K_V1 may be the default or not; only torchvision knows
    for default in (True, False):
        path = get_onnx_path(name, replace(weights, default=default), models_dir)
        about = read_metadata(path)
        try:
            found = Weights(about["weights_kind"], about["weights"], weights.path)
            found.sha256, found.default, found.key = about["weights_sha256"], default, weights.key
            if weights.kind == "torchvision":
                found.path = checkpoints_dir() / about["weights_file"]
            preprocessing = json.loads(about["preprocessing"])
            preprocessing |= {key: tuple(preprocessing[key]) for key in ("mean", "std")}
            network = Network(name, found, Preprocessing(**preprocessing))
        except (KeyError, ValueError, TypeError):  # not written by this program, or damaged
            continue
        wanted = (weights.kind, weights.name or found.name)
        if (found.kind, found.name) != wanted or not get_versions().items() <= about.items():
            continue
        if found.path and not (
            found.path.is_file() and get_digest(found.path, "sha256") == found.sha256
        ):
            continue
        return network
    return None


def find_converted(network, path, blob_shape):
    """The Converted file at `path` if it was made from this network for such blobs; else None.

    None as well if it isn't the file that its entry in models.yml was written for.
    """
    about = read_metadata(path)
    if is_own(network.name) or not get_key(network, blob_shape).items() <= about.items():
        return None
    engines, classes = about.get("engines", "").split(), about.get("classes", "")
    if not engines or not set(engines) <= available(ENGINES).keys() or not classes.isdecimal():
        return None  # damaged
    zoo = path.with_name(ZOO_NAME)
    entry = read_zoo(zoo).get(path.stem) if zoo.exists() else None
    load_info = get_load_info(path) if isinstance(entry, dict) else {}
    if not load_info or entry.get("load_info") != load_info:
        return None  # changed since
    print(f"{path}: converted and verified before, from these weights and versions")
    return Converted(path, engines, int(classes), load_info)


def get_onnx_path(name, weights, models_dir):
    """Where a converted network is kept; all but the default weights are part of its name."""
    stem = get_alias(name)
    if weights.kind == "random":
        stem += RANDOM_SUFFIX
    elif weights.kind == "file" or (weights.kind == "torchvision" and not weights.default):
        stem += f"-{get_alias(Path(weights.name).stem)}"
        stem += f"-{get_alias(weights.key)}" if weights.key else ""
        stem += "-weights" if stem.endswith(RANDOM_SUFFIX) else ""  # a file called random.pth
    return Path(models_dir) / f"{stem}.onnx"


def get_versions():
    """The versions that a converted file depends on: random weights and rewrites are our own."""
    packages = ("torch", "torchvision", "onnx")
    scripts = ("networks.py", "onnx_rewrites.py")
    return {name: importlib.metadata.version(name) for name in packages} | {
        "opencv": cv2.__version__,
        "opset": str(OPSET_VERSION),
        "scripts": " ".join(get_digest(SCRIPT_DIR / name, "sha1") for name in scripts),
    }


def get_key(network, blob_shape):
    """All that a converted file depends on, as metadata: {name: text}."""
    return get_versions() | {
        "network": network.name,
        "weights": network.weights.name,
        "weights_kind": network.weights.kind,
        "weights_key": network.weights.key,
        "weights_sha256": network.weights.sha256,
        "seed": str(SEED),
        "input": "x".join(map(str, blob_shape[1:])),
    }


def read_metadata(path):
    """{name: text} of a file's metadata; {} if it has none, or isn't a complete ONNX file."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except (FileNotFoundError, DecodeError):
        return {}
    return {p.key: p.value for p in proto.metadata_props}


def hash_graph(path):
    """SHA-256 of an ONNX file without its metadata, and of the .data beside it."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    del proto.metadata_props[:]
    digest = hashlib.sha256(proto.SerializeToString())
    data = Path(f"{path}.data")
    digest.update(get_digest(data, "sha256").encode() if data.exists() else b"")
    return digest.hexdigest()


# --- conversion -----------------------------------------------------------------------------------


def convert(network, onnx_path, references):
    """Write `network` to `onnx_path`, verified; return the Converted.

    references: verify.get_references of the network, which OpenCV's answers are compared with.
    Raises NetworksDisagree if OpenCV doesn't give PyTorch's answer, and RequestError if the network
    can't be exported. A file that was there before stays until the new one is verified.
    """
    _, sample_blob, logits = references[0]  # the picture's
    failures = []
    for export in (export_by_torchscript, export_by_dynamo):
        with folder_beside(onnx_path) as folder:
            part = folder / onnx_path.name
            print(f"exporting {network.name} ...", flush=True)
            try:
                export(network.model, part, sample_blob.shape)
                rewrite(part)
                engines = verify(part, references)
            except BranchesOnInput:
                raise
            except RequestError as error:
                failures.append(error)
                continue
            converted = Converted(onnx_path, engines, logits.shape[1])
            add_metadata(part, network, converted, sample_blob.shape)
            replace_model(onnx_path, part, network)
        print(f"{onnx_path}: converted and verified; taking the {engines[0]} engine")
        if is_default_wrong(engines):
            print(
                "NOTE: OpenCV's default engine, which its samples use, isn't right with this file; "
                f'use cv2.dnn.readNetFromONNX("{onnx_path}", engine=cv2.dnn.ENGINE_CLASSIC)'
            )
        return converted
    reason = " -- ".join(map(str, failures))
    if not any(isinstance(error, NetworksDisagree) for error in failures):
        raise RequestError(reason)
    rounding = measure_rounding(network.model, references)
    raise NetworksDisagree(f"{reason} -- PyTorch's float32 and float64 differ by {rounding:.1e}")


@contextlib.contextmanager
def folder_beside(path):
    """A temporary folder beside `path`; RequestError if nothing can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        prefix = f".{path.stem}.{platform.node()}.{os.getpid()}."
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as folder:
            yield Path(folder)
    except OSError as error:
        raise RequestError(f"{path}: can't be written: {error.strerror or error}") from None


def remove_abandoned(parent):
    """Remove the temporary folders of this machine's conversions that were killed."""
    if os.name != "posix":  # elsewhere os.kill(pid, 0) kills the process instead of probing it
        return
    for folder in parent.glob(f".*.{platform.node()}.*.*"):
        pid = folder.name.split(".")[-2]
        try:
            os.kill(int(pid) if pid.isdecimal() else 0, 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:  # another user's
            continue


def export_by_torchscript(model, path, blob_shape):
    """Export to ONNX for any batch size, by the exporter OpenCV's importer was developed against.

    Deprecated since PyTorch 2.9, but several times faster than the new one, and OpenCV 5.0.0
    reads its graphs with fewer rewrites. Raises RequestError if it can't, or if the network
    branches on its input.
    """
    import torch

    # A failing export prints pages of its graph, because setup_onnx_logging switches that on
    # whether it was on or not (seen with PyTorch 2.14 and 2.15): so disarm the switch.
    with (
        translate_errors("PyTorch's TorchScript exporter", blob_shape) as caught,
        mock.patch("torch._C._jit_set_onnx_log_enabled"),
    ):
        torch.onnx.export(
            model,
            torch.zeros(1, *blob_shape[1:]),
            str(path),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_axes={INPUT_NAME: {0: "batch"}, OUTPUT_NAME: {0: "batch"}},
            opset_version=OPSET_VERSION,
            dynamo=False,
        )
    if any(issubclass(warning.category, torch.jit.TracerWarning) for warning in caught):
        check_branches(model, blob_shape)


def check_branches(model, blob_shape):
    """Raise RequestError if the network's code branches on the values of its input.

    Tracing keeps the one branch that it sees, and the file is silently wrong for pictures that
    take the other. The tracer also warns about branches on shapes (ViT, Swin), which are harmless;
    torch.export tells the two apart.
    """
    import torch
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    batch = torch.zeros(2, *blob_shape[1:])
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        with (
            translate_errors("torch.export", blob_shape),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            torch.export.export(model, (batch,), dynamic_shapes=shapes, strict=False)
    except RequestError as error:
        cause = error.__context__
        while cause is not None and not isinstance(cause, GuardOnDataDependentSymNode):
            cause = cause.__context__
        if cause is None:  # it can't be exported like this, which proves nothing
            return
        torch_folder = os.path.join(os.path.dirname(torch.__file__), "")
        frames = traceback.extract_tb(cause.__traceback__)
        frame = [f for f in frames if not f.filename.startswith((torch_folder, __file__))][-1]
        raise BranchesOnInput(
            f"the network branches on its input ({frame.filename}, line {frame.lineno}: "
            f"{frame.line}), and a converted network can't branch: use torch.where instead"
        ) from None


def export_by_dynamo(model, path, blob_shape):
    """Export with PyTorch's new exporter, which knows operators that TorchScript's lacks."""
    import torch

    with translate_errors("PyTorch's new exporter", blob_shape):
        torch.onnx.export(
            model,
            (torch.zeros(2, *blob_shape[1:]),),  # a batch of 1 would be taken for a constant
            str(path),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )


@contextlib.contextmanager
def translate_errors(exporter, blob_shape):
    """Turn whatever an exporter raises into RequestError; yield the list of its warnings.

    The file is verified afterwards, so any exception will do.
    """
    height, width = blob_shape[2:]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logging.disable(logging.CRITICAL)  # pages of graphs
        try:
            yield caught
        except (Exception, SystemExit) as error:  # SystemExit: from the network's own code
            reason = str(error).strip().split("\n")[0].split(". ")[0][:160]
            raise RequestError(
                f"{exporter} can't export the network for {width}x{height} pictures: "
                f"{type(error).__name__}: {reason}"
            ) from None
        finally:
            logging.disable(logging.NOTSET)


def rewrite(path):
    """Put the exported graph into a form that OpenCV reads correctly.

    protobuf holds at most 2 GB: the weights of a larger network go to a second file, PATH.data.
    """
    import onnx

    from onnx_rewrites import make_readable

    proto = onnx.load(path)
    make_readable(proto)
    data = Path(f"{path}.data")
    data.unlink(missing_ok=True)  # the new exporter's own
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) < MAX_ONNX_SIZE:
        onnx.save(proto, path)
    else:
        onnx.save_model(proto, path, save_as_external_data=True, location=data.name)
        shutil.copymode(path, data)


def add_metadata(path, network, converted, blob_shape):
    """Write into an ONNX file what it was made from, for find_network and find_converted."""
    import onnx

    about = get_key(network, blob_shape) | {
        "weights_file": network.weights.path.name if network.weights.path else "",
        "preprocessing": json.dumps(dataclasses.asdict(network.preprocessing)),
        "engines": " ".join(converted.engines),
        "classes": str(converted.classes),
    }
    proto = onnx.ModelProto()
    onnx.helper.set_model_props(proto, about)
    with open(path, "ab") as file:  # protobuf parses appended bytes as part of the message
        file.write(proto.SerializeToString())


def replace_model(onnx_path, part, network):
    """Move the verified file to its name, with its .data; say if it replaces other weights."""
    before = read_metadata(onnx_path).get("weights_sha256", network.weights.sha256)
    if before != network.weights.sha256:
        print(f"{onnx_path}: replaces a network with other weights of this name")
    data_path = Path(f"{onnx_path}.data")
    data_path.unlink(missing_ok=True)  # an older file's
    for path in (data_path, onnx_path):
        if (part.parent / path.name).exists():
            os.replace(part.parent / path.name, path)
