"""Does OpenCV give PyTorch's answer with a converted file?

Each of OpenCV's engines runs in a process of its own, because a file can crash OpenCV, and Python
with it. That process is this script, which reads blobs and writes OpenCV's answers.
"""

import itertools
import os
import pickle
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from classification import ENGINES, RequestError, one_line, run
from common import SEED, NetworksDisagree

# Networks disagree if max|a - b| / max|a| is above this. For scale: all of torchvision's
# classifiers, with random weights, stay below 2e-5 on the new engine of OpenCV 5.0.0, and all but
# regnet_y_800mf (6e-5) on the classic one (RESULTS.md).
MAX_RELATIVE_ERROR = 1e-4
MAX_MOVE = 0.1 * MAX_RELATIVE_ERROR  # of PyTorch's own answer, if its input moves by 1e-6

EACH_ENGINE = list(ENGINES)


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
    """Difference of OpenCV's `output` to PyTorch's `reference`, both (batch, classes ...).

    Raises NetworksDisagree if their shapes differ.
    """
    if reference.shape != output.shape:
        raise NetworksDisagree(f"the shape is {output.shape}, not {reference.shape}")
    difference = np.abs(reference.astype(np.float64) - output)
    l1, l_inf = float(difference.mean()), float(difference.max())
    # a tensor of zeros within a network is right if the other is zero as well
    relative = l_inf / max(float(np.abs(reference).max()), 1e-30)
    same_class = int((reference.argmax(axis=1) == output.argmax(axis=1)).sum())
    return Difference(l1, l_inf, relative, same_class, pictures=len(reference))


class Reference(NamedTuple):
    """What OpenCV's answer is compared with."""

    name: str
    blob: np.ndarray  # float32 (batch, 3, height, width)
    logits: np.ndarray  # PyTorch's, float32 (batch, classes)


def get_references(model, sample_blob):
    """[Reference] for the picture's blob (1, 3, height, width), and others in batches.

    A file may be right for one picture only. The others: a dark, a bright and a grey copy; noise
    and zeros; the picture as if it weren't normalized. Those to which PyTorch's answer hangs on
    rounding are left out: a deep random network's to the last one may. Raises RequestError if
    PyTorch's answers prove nothing.
    """
    low, high = (f(sample_blob, axis=(2, 3), keepdims=True) for f in (np.min, np.max))
    dark, bright = (limit + 0.25 * (sample_blob - limit) for limit in (low, high))
    grey = np.repeat(sample_blob.mean(axis=1, keepdims=True), 3, axis=1)
    noise = np.random.default_rng(SEED).standard_normal((3, *sample_blob.shape[1:]), np.float32)
    noise[2] = 0
    raw = 255 * (sample_blob - low.min()) / max(high.max() - low.min(), 1e-6)
    blobs = {
        "picture": sample_blob,
        "dark, bright, grey": np.concatenate([dark, bright, grey]),
        "noise, zeros": noise,
        "0 to 255": raw.astype(np.float32),
    }
    references = [Reference(name, blob, run_pytorch(model, blob)) for name, blob in blobs.items()]
    with np.errstate(invalid="ignore"):  # inf - inf
        moves = [get_change(model, reference, 1 + 1e-6) for reference in references]
        # the picture's own answer is needed: timm's inception_v4, if random, moves by 1.4e-5
        limits = [MAX_RELATIVE_ERROR, MAX_MOVE, MAX_MOVE, MAX_MOVE]
        steady = [*itertools.compress(references, np.less_equal(moves, limits))]
        others = steady if len(steady) > 1 else references  # one alone may have no spread
        logits = np.concatenate([reference.logits for reference in others])
        spread = np.ptp(logits, axis=0).max()
    # > and not "not <=", which would let nan and inf pass
    if not spread > MAX_RELATIVE_ERROR * np.abs(logits).max():  # a network of constants would pass
        problem = "outputs are nan, inf, or the same for every picture, and prove nothing"
    elif not (change := get_change(model, references[0])) <= MAX_RELATIVE_ERROR:
        problem = f"answer changes from run to run, by {change:.1e} (is dropout left on?)"
    elif not moves[0] <= limits[0] or len(steady) == 1:
        problem = f"answer hangs on rounding: a change of 1e-06 moves it by {np.nanmax(moves):.1e}"
    else:
        return steady
    raise RequestError(f"PyTorch's own {problem}: check the weights and the preprocessing")


def get_change(model, reference, factor=1):
    """How far PyTorch's answer moves if the blob is multiplied by a factor: max|a - b| / max|a|."""
    logits = run_pytorch(model, reference.blob * np.float32(factor))
    return compare(reference.logits, logits).relative


def run_pytorch(model, blob):
    """PyTorch's logits, (batch, classes), for a float32 blob (batch, 3, height, width).

    Raises RequestError if it isn't a classifier, or its code fails.
    """
    import torch

    from forward import run_forward

    # a copy: a network that changes its input in place would change OpenCV's as well
    logits = run_forward(model, torch.from_numpy(blob).clone())
    shape = tuple(getattr(logits, "shape", ()))
    if len(shape) != 2 or shape[0] != len(blob) or not shape[1] or logits.dtype != torch.float32:
        found = f"{logits.dtype} of shape {shape}" if shape else type(logits).__name__
        hint = "wrap it in a module that returns float32 logits of shape (batch, classes)"
        raise RequestError(f"not a classifier: forward returns {found}; {hint}")
    return logits.numpy()


def run_opencv(net, blob):
    """OpenCV's logits, (batch, classes), for a float32 blob (batch, 3, height, width)."""
    try:
        net.setInput(blob)
        output = net.forward()
    except cv2.error as error:
        raise NetworksDisagree(f"can't run the network: {get_reason(error)}") from None
    if not isinstance(output, np.ndarray):
        raise NetworksDisagree(f"the output is a {type(output).__name__}, not one array")
    return output


def get_reason(error):
    """The last of OpenCV's words in a cv2.error, which can quote another one, and the node."""
    text = one_line(error)
    node = re.search(r"Node \[(\w+)@.*?\]:\((.*?)\)", text)
    where = f"{node[1]} {node[2].rpartition('!')[2]}: " if node else ""
    return where + text.rpartition("error: ")[2].strip("> ").replace(" > ", " ")[:100]


def run_engine_apart(onnx_path, engine, blobs):
    """([logits of each blob], CPU seconds of one pass with the first), from a child process.

    Without blobs it only reads the file. Raises NetworksDisagree if the engine can't run the file.
    """
    command = [sys.executable, __file__, str(onnx_path), engine]
    env = os.environ | {"OPENCV_LOG_LEVEL": "WARNING"}
    child = subprocess.run(command, env=env, input=pickle.dumps(blobs), capture_output=True)
    if child.returncode == 0:
        return pickle.loads(child.stdout)
    said = child.stderr.decode(errors="replace")
    last = (said.splitlines() or [f"exit code {child.returncode}"])[-1]
    reason = last.partition("error: ")[2] or last
    if child.returncode < 0:
        reason = f"crashes (signal {-child.returncode})"
    # in the log of OpenCV 5.0.0's new engine, which then tries the classic one's importer
    if lacking := re.findall(r"^\t(\w+)$", said, re.M):
        reason = f"can't read the file: {' and '.join(lacking)} not supported; {reason}"
    raise NetworksDisagree(reason)


def verify(onnx_path, references):
    """([engines that give PyTorch's answer, the fastest first], {engine: its failure}), printed."""
    print(f"verifying with OpenCV {cv2.__version__}, limit {MAX_RELATIVE_ERROR:.0e} ...")
    names, blobs, _ = zip(*references, strict=True)
    print("relative error on", *names, "ms, one thread", sep="  ", flush=True)
    seconds, failures = {}, {}
    for engine in EACH_ENGINE:
        cells = []
        try:
            outputs, time_of_one = run_engine_apart(onnx_path, engine, blobs)
            for (name, _, logits), output in zip(references, outputs, strict=True):
                difference = compare(logits, output)
                if not difference.agree:
                    raise NetworksDisagree(f"wrong on {name}: {difference}")
                cells.append(f"{difference.relative:{len(name)}.1e}")
            seconds[engine] = time_of_one
            cells.append(f"{1000 * time_of_one:14.1f}")
        except NetworksDisagree as error:
            failures[engine] = str(error)
            cells = [failures[engine]]
        print(f"{engine + ' engine':17}", *cells, sep="  ", flush=True)
    return sorted(seconds, key=seconds.get), failures


def time_pass(net, blob):
    """CPU seconds of one forward pass with one thread: the least of several; the first allocates.

    By wall time, another program's load could choose the slower engine. More threads would count
    even while they wait.
    """
    cv2.setNumThreads(1)
    times = []
    while len(times) < 3 or sum(times[1:]) < 0.1:
        start = time.process_time()
        run_opencv(net, blob)
        times.append(time.process_time() - start)
    return min(times)


def main():
    """What the child does: one net for blobs of several batch sizes, as in an evaluation."""
    if len(sys.argv) != 3:
        raise RequestError("takes MODEL ENGINE; a conversion starts it by itself")
    onnx_path, engine = sys.argv[1:]
    blobs, answers = pickle.load(sys.stdin.buffer), os.dup(1)
    os.dup2(2, 1)  # what OpenCV may print isn't the answer
    try:
        net = cv2.dnn.readNetFromONNX(onnx_path, ENGINES[engine])
    except cv2.error as error:
        raise NetworksDisagree(f"can't read the file: {get_reason(error)}") from None
    if net.empty():  # OpenCV 5.0.0's new engine only logs what it can't read
        raise NetworksDisagree("the network is empty")
    logits = [run_opencv(net, blob) for blob in blobs]
    seconds = time_pass(net, blobs[0]) if blobs else 0
    with open(answers, "wb") as file:
        pickle.dump((logits, seconds), file)


if __name__ == "__main__":
    run(main)
