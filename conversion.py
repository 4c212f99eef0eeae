"""A PyTorch network in, a verified ONNX file out; entries.py finds it again.

Export, rewrite around OpenCV's faults, compare the answers: only a file that is right is kept.
"""

import contextlib
import io
import shutil
import warnings
from pathlib import Path
from unittest import mock

import cv2
import onnx
import torch

from classification import RequestError, one_line
from common import NetworksDisagree, remove_leftovers, whole_file
from entries import describe_file, get_onnx_path
from forward import find_branch
from locate import locate
from onnx_folding import fold_constants
from onnx_rewrites import make_readable
from onnx_speedups import speed_up
from verify import verify

MAX_ONNX_SIZE = 2**31 - 2**20  # bytes of weights, with room for the graph
VAGUE = ("node: unknown", "node: none")  # ends of failures that don't say which node is wrong
ANYWAY = "--allow_branches True converts it anyway"


class NotConvertible(RequestError):
    """No exporter can convert this network correctly."""


def convert(network, references, allow_branches=False):
    """Write the network's file, verified against verify.get_references; return the Converted.

    Raises NetworksDisagree if OpenCV doesn't give PyTorch's answer, and RequestError if the network
    can't be exported: an older file stays.
    """
    path, sample_blob, failures = get_onnx_path(network.request), references[0].blob, []
    older = " (replaces an older file)" if path.exists() else ""
    if not allow_branches:
        check_branches(network.model, sample_blob)
    remove_leftovers(path.parent)
    exporters = [False, True]  # TorchScript's, then the new one
    with whole_file(path) as part:
        for dynamo in exporters:
            print(f"exporting {network.request.name} ...", flush=True)
            try:
                export(network.model, part, sample_blob.shape, dynamo)
                kinds = rewrite(part, allow_branches)
                # mvitv2_tiny: 402 ms from TorchScript's exporter, 181 from the new one
                if "ScatterND" in kinds and not dynamo and len(exporters) == 2:
                    print("`x[...] = y` is slow in OpenCV: trying PyTorch's new exporter")
                    exporters.append(False)  # in case that fails
                    continue
                engines = choose_graph(part, references)
                break
            except NotConvertible:
                raise
            except RequestError as error:
                print(error, flush=True)
                failures.append(error)
        else:  # exit code 1, a wrong answer, before 2
            raise min(failures, key=lambda e: (e.exit_code, str(e).endswith(VAGUE)))
        converted = describe_file(network, part, engines, references)
    if "data_sha1" not in converted.load_info:
        Path(f"{path}.data").unlink(missing_ok=True)  # an older file's
    print(f"{path}: converted and verified{older}; using the {converted.engines[0]} engine")
    if "new" not in engines:
        print("NOTE: use cv2.dnn.ENGINE_CLASSIC with this file: OpenCV's default engine is wrong")
    return converted


def check_branches(model, sample_blob):
    """Raise RequestError if the network's code branches on the values of its input."""
    try:
        with quiet():
            line = find_branch(model, torch.from_numpy(sample_blob).clone())
    except (Exception, SystemExit) as error:  # of code that ran without the modes that watch it
        reason = f"{type(error).__name__}: {one_line(error)[:100]}"
        raise RequestError(f"can't tell whether the network branches: {reason}; {ANYWAY}") from None
    if line:
        problem = f"the network branches on its input ({line}), of which a file has one side only"
        raise RequestError(f"{problem}: use torch.where instead; {ANYWAY}")


def export(model, path, blob_shape, dynamo):
    """Export to ONNX for any batch size, with PyTorch's TorchScript exporter or the new one.

    TorchScript's, deprecated since PyTorch 2.9, is several times faster and needs fewer rewrites.
    The new one, dynamo, knows operators that TorchScript's lacks. Raises RequestError if it fails.
    """
    size, batch = blob_shape[1:], {0: "batch"}
    options = {"dynamo": dynamo, "input_names": ["input"], "output_names": ["output"]}
    if dynamo:  # which would take a batch of 1 for a constant
        pictures = torch.zeros(2, *size)
        options |= {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
    else:  # OpenCV 5.0.0, 4.14 and 4.10 all read opset 17, with the same answers
        pictures = torch.zeros(1, *size)
        options |= {"opset_version": 17, "dynamic_axes": {"input": batch, "output": batch}}
    try:
        with quiet():
            torch.onnx.export(model, (pictures,), str(path), **options)
    except (Exception, SystemExit) as error:  # whatever the exporter or the network's code raises
        while error.__cause__:  # the new one's own error only says which step failed
            error = error.__cause__
        reason = str(error).strip().split("\n")[0].split(". ")[0][:100]
        exporter = "PyTorch's new exporter" if dynamo else "PyTorch's TorchScript exporter"
        problem = f"{exporter} can't export the network for {size[2]}x{size[1]} pictures"
        raise RequestError(f"{problem}: {type(error).__name__}: {reason}") from None


@contextlib.contextmanager
def quiet():
    """Keep PyTorch's warnings, and its exporters' output, off the terminal."""
    # A failing export prints pages of its graph, because setup_onnx_logging switches that on
    # whether it was on or not (seen with PyTorch 2.14 and 2.15): so disarm the switch.
    with (
        warnings.catch_warnings(action="ignore"),
        mock.patch("torch._C._jit_set_onnx_log_enabled"),
        mock.patch("logging.Logger.handle"),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


def rewrite(path, allow_branches=False):
    """Mend what OpenCV reads wrongly; return the kinds of nodes.

    Raises RequestError if the graph branches, or takes one batch size only.
    """
    proto = onnx.load(path)
    branches = {node.op_type for node in proto.graph.node} & {"If", "Loop", "Scan"}
    if branches and not allow_branches:
        problem = f"the graph branches ({', '.join(branches)}: is it scripted?)"
        problem += ", and only one side can be verified"
        raise RequestError(f"{problem}: use torch.where instead; {ANYWAY}")
    for value in (proto.graph.input[0], proto.graph.output[0]):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise NotConvertible("the file takes one batch size only: does forward loop over it?")
    fold_constants(proto)
    make_readable(proto)
    save(proto, path)
    return {node.op_type for node in proto.graph.node}


def save(proto, path):
    """Write a ModelProto. protobuf holds at most 2 GB: larger weights go to a file PATH.data."""
    data = Path(f"{path}.data")
    data.unlink(missing_ok=True)  # the new exporter's own
    is_large = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > MAX_ONNX_SIZE
    onnx.save(proto, path, save_as_external_data=is_large, location=data.name)
    if is_large:
        shutil.copymode(path, data)


def choose_graph(path, references):
    """Make the graph faster if the new engine stays right; return the engines that are right.

    The fastest comes first. Raises NetworksDisagree if none is, and prints where each goes wrong.
    """
    plain = onnx.load(path)
    if fast := speed_up(plain):
        save(fast, path)
        engines, _ = verify(path, references)
        if "new" in engines:
            return engines
        print("the faster graph is wrong on the new engine: without speed-ups", flush=True)
        save(plain, path)
    engines, failures = verify(path, references)
    if engines:
        return engines
    for engine, reason in failures.items():
        print(f"first wrong node, {engine} engine: ", end="", flush=True)  # it can take seconds
        where = locate(path, engine, references)
        print(where, flush=True)
        if where not in reason:
            reason += f"; first wrong node: {where.partition(': ')[0]}"
        failures[engine] = f"{engine} engine: {reason}"
    reason = min(failures.values(), key=lambda failure: failure.endswith(VAGUE))
    raise NetworksDisagree(f"OpenCV {cv2.__version__} doesn't give PyTorch's answer, {reason}")
