"""Does OpenCV give PyTorch's answer with a converted file?

Each of OpenCV's inference engines runs in a process of its own, because a file can crash OpenCV,
and Python with it. That process is this script:

    python verify.py resnet50.onnx new < blobs.npz > logits.npz
"""

import copy
import ctypes
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from common import (
    ENGINES,
    SEED,
    NetworksDisagree,
    RequestError,
    available,
    check_model,
    one_line,
    run,
)
from networks import run_pytorch

# Networks disagree if max|a - b| / max|a| is above this. For scale: all of torchvision's
# classifiers, with random weights, stay below 1e-5 on the new engine of OpenCV 5.0.0 and below
# 2e-5 on the classic one (RESULTS.md).
MAX_RELATIVE_ERROR = 1e-4

# Limits of the search for the first wrong node: onnx's evaluator keeps the outputs of all nodes,
# and those of a ViT for 768x768 pictures don't fit into 24 GB.
MAX_LOCATED_BYTES = 2**29  # of the file
MAX_LOCATED_PIXELS = 512 * 512  # of a picture
MAX_LOCATE_SECONDS = 60


@dataclass
class Difference:
    """How far two outputs of shape (batch, classes) are apart."""

    l1: float  # mean |a - b|, as the tutorial has it
    l_inf: float  # max |a - b|
    relative: float  # max |a - b| / max |a|
    same_class: int  # pictures for which both name the same class
    pictures: int

    @property
    def agree(self):
        # <= and not "not >", which would let nan pass
        return self.relative <= MAX_RELATIVE_ERROR and self.same_class == self.pictures

    def __str__(self):
        return (
            f"L1 {self.l1:.2e}, L_inf {self.l_inf:.2e}, relative error {self.relative:.1e} "
            f"(limit {MAX_RELATIVE_ERROR:.0e}), same class {self.same_class} of {self.pictures}"
        )


def compare(reference, output):
    """Difference of OpenCV's `output` to PyTorch's `reference`, both (batch, classes)."""
    relative = get_relative_error(reference, output)
    difference = np.abs(reference.astype(np.float64) - output)
    return Difference(
        l1=float(difference.mean()),
        l_inf=float(difference.max()),
        relative=relative,
        same_class=int((reference.argmax(axis=1) == output.argmax(axis=1)).sum()),
        pictures=len(reference),
    )


def get_relative_error(reference, output):
    """max |a - b| / max |a| of two arrays; NetworksDisagree if their shapes differ."""
    if reference.shape != output.shape:
        raise NetworksDisagree(f"the shape is {output.shape}, not {reference.shape}")
    difference = np.abs(reference.astype(np.float64) - output).max()
    # a tensor of zeros within a network is right if the other is zero as well
    return float(difference / max(np.abs(reference).max(), 1e-30))


# --- PyTorch's answer -----------------------------------------------------------------------------


class Reference(NamedTuple):
    """What OpenCV's answer is compared with."""

    name: str
    blob: np.ndarray  # float32 (batch, 3, height, width)
    logits: np.ndarray  # PyTorch's, float32 (batch, classes)


def get_references(model, sample_blob):
    """[Reference] for the picture's blob (1, 3, height, width) and others.

    The others are batches of two, because a file may be right for one picture only: a dark and a
    bright copy of it, and noise. Raises RequestError if the logits prove nothing: if they are nan,
    or hardly change from picture to picture, so that a network of constants would pass.
    """
    darkest, brightest = (f(sample_blob, axis=(2, 3), keepdims=True) for f in (np.min, np.max))
    copies = [limit + 0.25 * (sample_blob - limit) for limit in (darkest, brightest)]
    noise = np.random.default_rng(SEED).standard_normal((2, *sample_blob.shape[1:]), np.float32)
    blobs = {"picture": sample_blob, "dark, bright": np.concatenate(copies), "noise": noise}
    references = [Reference(name, blob, run_pytorch(model, blob)) for name, blob in blobs.items()]
    logits = np.concatenate([reference.logits for reference in references])
    with np.errstate(invalid="ignore"):  # inf - inf
        spread = np.ptp(logits, axis=0).max()
    # > and not "not <=", which would let nan and inf pass
    if not spread > MAX_RELATIVE_ERROR * np.abs(logits).max():
        raise RequestError(
            "PyTorch's own outputs are nan, inf, or the same for every picture, and prove nothing: "
            "check the weights and the preprocessing, or try --weights random"
        )
    return references


def measure_rounding(model, references):
    """The relative error of PyTorch's float32 logits to its own in float64; nan if unknown.

    OpenCV can't be expected to come closer than that.
    """
    import torch

    errors = []
    try:
        exact = copy.deepcopy(model).double()
        for _, blob, logits in references:
            with torch.no_grad():
                output = exact(torch.from_numpy(blob).double()).numpy()
            errors.append(get_relative_error(output, logits))
    except Exception:  # code that is written for float32
        return np.nan
    return max(errors)


# --- OpenCV's answer ------------------------------------------------------------------------------


def run_opencv(net, blob):
    """OpenCV's logits, (batch, classes), for a float32 blob (batch, 3, height, width)."""
    try:
        net.setInput(blob)
        return net.forward()
    except cv2.error as error:
        raise NetworksDisagree(f"can't run the network: {get_reason(error)}") from None


def get_reason(error):
    """The last of OpenCV's words in a cv2.error, which can quote another one."""
    return one_line(error).rpartition("error: ")[2].strip("> ")[:200]


def run_engine_apart(onnx_path, engine, blobs, timed=True):
    """([logits of each blob], seconds of one pass with the first) from a child process.

    Raises NetworksDisagree if the engine can't run the file, or crashes.
    """
    command = [sys.executable, __file__, str(onnx_path), engine] + ["timed"] * timed
    child = subprocess.run(command, input=pack(*blobs), capture_output=True)
    if child.returncode < 0:
        raise NetworksDisagree(f"crashes (signal {-child.returncode})")
    if child.returncode > 0:
        lines = child.stderr.decode(errors="replace").splitlines()
        reason = lines[-1] if lines else f"exit code {child.returncode}"
        raise NetworksDisagree(reason.partition("error: ")[2] or reason)
    *logits, seconds = unpack(child.stdout)
    return logits, float(seconds)


def answer_blobs(onnx_path, engine, timed=""):
    """What the child does: one net for blobs of several batch sizes, as in an evaluation."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # for what OpenCV itself prints
    blobs = unpack(sys.stdin.buffer.read())
    try:
        net = cv2.dnn.readNetFromONNX(onnx_path, available(ENGINES)[engine])
    except cv2.error as error:
        raise NetworksDisagree(f"can't read the file: {get_reason(error)}") from None
    logits = [run_opencv(net, blob) for blob in blobs]
    seconds = time_pass(lambda: run_opencv(net, blobs[0])) if timed else np.nan
    answers.write(pack(*logits, np.array(seconds)))
    answers.close()


def time_pass(forward):
    """Seconds of one forward pass: the least of several, after one that allocates its memory."""
    forward()
    times = []
    while len(times) < 2 or sum(times) < 0.1:
        start = time.perf_counter()
        forward()
        times.append(time.perf_counter() - start)
    return min(times)


def pack(*arrays):
    """The arrays as bytes, in NumPy's format."""
    file = io.BytesIO()
    np.savez(file, *arrays)
    return file.getvalue()


def unpack(data):
    with np.load(io.BytesIO(data)) as arrays:
        return [arrays[name] for name in arrays.files]


# --- the same answer? -----------------------------------------------------------------------------


def verify_engine(onnx_path, engine, references):
    """([Difference to each reference], seconds of one picture) of one of OpenCV's engines.

    Raises NetworksDisagree, with the figures.
    """
    outputs, seconds = run_engine_apart(onnx_path, engine, [blob for _, blob, _ in references])
    differences = []
    for (name, _, logits), output in zip(references, outputs, strict=True):
        differences.append(compare(logits, output))
        if not differences[-1].agree:
            raise NetworksDisagree(f"wrong on {name}: {differences[-1]}")
    return differences, seconds


def locate(onnx_path, engine, references):
    """The first node at which an engine departs from what the file says, for one line of text.

    onnx's ReferenceEvaluator computes each node. The graph is cut after a node and run by the
    engine; the first cut that is wrong ends with the node. OpenCV fuses nodes, so the fault may lie
    in how this one is fused with those before it.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    try:
        onnx.checker.check_model(str(onnx_path))
    except onnx.checker.ValidationError as error:
        return f"none: the exported file isn't valid ONNX: {one_line(error)[:100]}"
    pixels = np.prod(references[0].blob.shape[2:])
    if os.path.getsize(onnx_path) > MAX_LOCATED_BYTES or pixels > MAX_LOCATED_PIXELS:
        return "unknown: too large to search"
    try:
        proto = onnx.load(onnx_path)
        evaluator = ReferenceEvaluator(proto)
        for _, blob, logits in reversed(references):  # batches first: they show more faults
            tensors = evaluator.run(None, {proto.graph.input[0].name: blob}, intermediate=True)
            error = get_relative_error(logits, tensors[proto.graph.output[0].name])
            if not error <= MAX_RELATIVE_ERROR:
                return f"none: the exported file itself departs from PyTorch: {error:.1e} in onnx"
            if found := find_first_wrong(proto, engine, blob, tensors):
                return found
    except Exception as error:  # onnx's evaluator lacks operators, and it is for diagnosis only
        return f"unknown: onnx can't run the file: {one_line(error)[:100]}"
    return "unknown: each is right if the graph ends with it"


def find_first_wrong(proto, engine, blob, tensors):
    """What `locate` returns; None if the whole graph is right.

    tensors: {name: the reference's value} of all nodes' outputs.
    """
    import onnx

    from_input, nodes = {proto.graph.input[0].name}, []
    for node in proto.graph.node:
        if from_input & {*node.input}:
            from_input.update(node.output)
            value = tensors.get(node.output[0])
            if getattr(value, "dtype", None) == np.float32 and value.ndim > 1:
                nodes.append(node)
    extractor = onnx.utils.Extractor(proto)
    answers = {}

    def is_right(i):
        name = nodes[i].output[0]
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, tensors[name].shape)
        extractor.value_infos[name] = info
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "cut.onnx")
                onnx.save(extractor.extract_model([proto.graph.input[0].name], [name]), path)
                # first one picture: some layers keep the batch size of their first pass
                (_, output), _ = run_engine_apart(path, engine, [blob[:1], blob], timed=False)
            error = get_relative_error(tensors[name], output)
            answers[i] = f"relative error {error:.1e}"
        except NetworksDisagree as failure:
            error, answers[i] = np.inf, str(failure)
        return error <= MAX_RELATIVE_ERROR

    right, wrong = -1, len(nodes) - 1
    start = time.perf_counter()
    while wrong - right > 1:
        if time.perf_counter() - start > MAX_LOCATE_SECONDS:
            first, last = (nodes[i].name or nodes[i].output[0] for i in (max(right, 0), wrong))
            return (
                f"between {first} and {last}: the search was stopped after {MAX_LOCATE_SECONDS} s"
            )
        # a quarter, not half: most faults are near the input, and shorter graphs run faster
        middle = right + max(1, (wrong - right) // 4)
        right, wrong = (middle, wrong) if is_right(middle) else (right, middle)
    if wrong == len(nodes) - 1 and is_right(wrong):
        return None
    node = nodes[wrong]
    before = [n.op_type for n in proto.graph.node if {*n.output} & {*node.input}]
    after = f", after {' and '.join(before)}" if before else ""
    return f"{node.op_type} {node.name or node.output[0]}{after}: {answers[wrong]}"


def verify(onnx_path, references):
    """OpenCV's engines that give PyTorch's answer with the file, the fastest first.

    Prints a table, a row for each engine. Raises NetworksDisagree, with the figures, if none is
    right.
    """
    check_model(onnx_path)
    print(
        f"verifying with OpenCV {cv2.__version__}, limit {MAX_RELATIVE_ERROR:.0e} ...", flush=True
    )
    widths = [max(len(name), 7) + 2 for name, _, _ in references]
    titles = (f"{name:>{w}}" for (name, _, _), w in zip(references, widths, strict=True))
    print(f"relative error on{''.join(titles)}  ms per picture", flush=True)
    seconds, failures = {}, {}
    for engine in (name for name in available(ENGINES) if name != "auto"):
        try:
            differences, seconds[engine] = verify_engine(onnx_path, engine, references)
            errors = zip(differences, widths, strict=True)
            cells = "".join(f"{difference.relative:{width}.1e}" for difference, width in errors)
            cells += f"{1000 * seconds[engine]:16.1f}"
        except NetworksDisagree as error:
            cells = f"  {error}"
        print(f"{engine + ' engine':17}{cells}", flush=True)
        if engine not in seconds:
            print("  first wrong node: ", end="", flush=True)  # finding it can take seconds
            where = locate(onnx_path, engine, references)
            print(where, flush=True)
            failures[engine] = f"{cells.strip()}; first wrong node: {where}"
    if not seconds:
        reasons = "; ".join(f"{engine} engine: {reason}" for engine, reason in failures.items())
        raise NetworksDisagree(f"OpenCV {cv2.__version__} doesn't give PyTorch's answer: {reasons}")
    return sorted(seconds, key=seconds.get)


def main():
    if len(sys.argv) not in (3, 4):
        raise RequestError(
            "takes MODEL ENGINE [timed] < BLOBS > LOGITS; a conversion starts it by itself"
        )
    if sys.platform.startswith("linux"):  # end with the conversion, even if that is killed
        pr_set_pdeathsig = 1  # <linux/prctl.h>
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    answer_blobs(*sys.argv[1:])
    return 0


if __name__ == "__main__":
    run(main)
