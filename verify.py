"""Does OpenCV give PyTorch's answer with a converted file?

Each of OpenCV's inference engines is asked in a process of its own, because a file can crash
OpenCV, and Python with it. That process is this script:

    python verify.py resnet50.onnx new < blobs.npz > logits.npz
"""

import contextlib
import io
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import cv2
import numpy as np

from classification import ENGINES, RequestError, available, check_model, one_line, run

SEED = 0

# max|a - b| / max|a| over which two networks disagree. Measured for scale: all of torchvision's
# classifiers, with random weights, stay below 2e-5 on the new engine of OpenCV 5.0.0 and below
# 5e-5 on the classic one (RESULTS.md).
MAX_RELATIVE_ERROR = 1e-4


class NetworksDisagree(RequestError):
    """OpenCV doesn't give PyTorch's answer."""

    exit_code = 1


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
        # "not over" would let nan pass
        return self.relative <= MAX_RELATIVE_ERROR and self.same_class == self.pictures

    def __str__(self):
        return (
            f"L1 {self.l1:.2e}, L_inf {self.l_inf:.2e}, relative error {self.relative:.1e}, "
            f"same class {self.same_class} of {self.pictures}"
        )


def compare(reference, output):
    """Difference of OpenCV's `output` to PyTorch's `reference`, both (batch, classes)."""
    if reference.shape != output.shape:
        raise NetworksDisagree(f"PyTorch's output is {reference.shape}, OpenCV's {output.shape}")
    diff = np.abs(reference.astype(np.float64) - output)
    scale = np.abs(reference).max()
    same = (reference.argmax(axis=1) == output.argmax(axis=1)).sum()
    return Difference(
        l1=float(diff.mean()),
        l_inf=float(diff.max()),
        relative=float(diff.max() / scale) if scale > 0 else np.nan,
        same_class=int(same),
        pictures=len(reference),
    )


# --- PyTorch's answer -----------------------------------------------------------------------------


def run_pytorch(model, blob, memory_format=None):
    """PyTorch's logits, (batch, classes), for a float32 blob (batch, 3, height, width)."""
    import torch

    # a copy: a network that changes its input in place would change OpenCV's as well
    batch = torch.from_numpy(blob).clone(memory_format=memory_format or torch.contiguous_format)
    with torch.inference_mode(), failing_network(blob.shape):
        logits = model(batch)
    shape = tuple(logits.shape) if torch.is_tensor(logits) else ()
    if len(shape) != 2 or shape[0] != len(blob) or not shape[1] or logits.dtype != torch.float32:
        raise RequestError(
            "not a classifier: its output is no float32 tensor of shape (batch, classes)"
        )
    return logits.numpy()


@contextlib.contextmanager
def failing_network(blob_shape):
    """Whatever a network's own code raises becomes RequestError."""
    try:
        yield
    except Exception as error:
        height, width = blob_shape[2:]
        raise RequestError(f"the network takes no {width}x{height} picture: {error}") from None


def get_references(model, sample_blob):
    """[(name, blob, PyTorch's logits)] for the sample, (1, 3, height, width), and a batch of 2.

    Raises RequestError where the logits prove nothing: nan, or hardly another for another
    picture, so that a network of constants would pass.
    """
    noise = np.random.default_rng(SEED).standard_normal((2, *sample_blob.shape[1:]))
    blobs = {"the picture": sample_blob, "a batch of 2": noise.astype(np.float32)}
    references = [(name, blob, run_pytorch(model, blob)) for name, blob in blobs.items()]
    logits = np.concatenate([logits for _, _, logits in references])
    # written so that nan and inf are refused as well
    if not np.ptp(logits, axis=0).max() > MAX_RELATIVE_ERROR * np.abs(logits).max():
        raise RequestError(
            "PyTorch's own outputs are nan, inf, or the same whatever the picture, and prove "
            "nothing: check the weights and the preprocessing"
        )
    return references


# --- OpenCV's answer ------------------------------------------------------------------------------


def run_opencv(net, blob):
    """OpenCV's logits, (batch, classes), for a float32 blob (batch, 3, height, width)."""
    try:
        net.setInput(blob)
        return net.forward()
    except cv2.error as error:
        raise NetworksDisagree(f"OpenCV can't run the network: {get_reason(error)}") from None


def get_reason(error):
    """The last of OpenCV's words of a cv2.error, which can quote another one."""
    return one_line(error).rpartition("error: ")[2].strip("> ")[:200]


def run_engine_apart(onnx_path, engine, blobs):
    """([logits of each blob], seconds of one pass with the first) by a child process.

    Raises NetworksDisagree where the engine can't run the file, or dies of it.
    """
    command = [sys.executable, __file__, onnx_path, engine]
    child = subprocess.run(command, input=pack(*blobs), capture_output=True)
    if child.returncode < 0:
        raise NetworksDisagree(f"it dies of the file (signal {-child.returncode})")
    if child.returncode > 0:
        lines = child.stderr.decode(errors="replace").splitlines()
        reason = lines[-1] if lines else f"exit code {child.returncode}"
        raise NetworksDisagree(reason.partition("error: ")[2] or reason)
    *logits, seconds = unpack(child.stdout)
    return logits, float(seconds)


def answer_blobs(onnx_path, engine):
    """What the child does: one net for blobs of several batch sizes, as an evaluation has it."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what OpenCV prints goes there
    blobs = unpack(sys.stdin.buffer.read())
    try:
        net = cv2.dnn.readNetFromONNX(onnx_path, available(ENGINES)[engine])
    except cv2.error as error:
        raise NetworksDisagree(f"can't read the file: {get_reason(error)}") from None
    logits = [run_opencv(net, blob) for blob in blobs]
    seconds = time_pass(lambda: run_opencv(net, blobs[0]))
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
            raise NetworksDisagree(f"on {name}: {differences[-1]} (limit {MAX_RELATIVE_ERROR:g})")
    return differences, seconds


def verify(onnx_path, references):
    """The names of OpenCV's engines that give PyTorch's answer with the file, the fastest first.

    Prints how far each is off. Raises NetworksDisagree, with the figures, where none is right.
    """
    check_model(onnx_path)
    seconds, failures = {}, []
    for engine in (name for name in available(ENGINES) if name != "auto"):
        title = f"OpenCV {cv2.__version__}, {engine} engine"
        try:
            differences, seconds[engine] = verify_engine(onnx_path, engine, references)
            for (name, _, _), difference in zip(references, differences, strict=True):
                print(f"PyTorch against {title}, on {name}: {difference}", flush=True)
        except NetworksDisagree as error:
            print(f"PyTorch against {title}: {error}", flush=True)
            failures.append(f"{engine} engine: {error}")
    if not seconds:
        raise NetworksDisagree(
            f"OpenCV {cv2.__version__} doesn't give PyTorch's answer: {'; '.join(failures)}"
        )
    return sorted(seconds, key=seconds.get)


def main():
    if len(sys.argv) != 3:
        raise RequestError("takes MODEL ENGINE < BLOBS > LOGITS; a conversion starts it by itself")
    answer_blobs(*sys.argv[1:])
    return 0


if __name__ == "__main__":
    run(main)
