"""Find the first node of an ONNX file that OpenCV computes wrongly.

A conversion that fails calls it; you can, too, with any file:

    python locate.py model.onnx --engine classic

onnx's ReferenceEvaluator computes each node. The graph is cut after a node and run by OpenCV; the
first cut that is wrong ends with the node. OpenCV fuses nodes: the fault may be one before it.
"""

import multiprocessing
import re
import signal
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from classification import RequestError, make_parser, one_line, run
from common import SEED, NetworksDisagree
from verify import EACH_ENGINE, MAX_RELATIVE_ERROR, compare, run_engine_apart

# onnx's evaluator keeps all nodes' outputs: a ViT's for 768x768 pictures don't fit into 24 GB.
MAX_BYTES = 2**29  # of the file
MAX_PIXELS = 512 * 512  # of a picture
MAX_SECONDS = 60

REFUSED = "can't read the file: (.*(?:not supported|Can't create layer).*)"


def locate(onnx_path, engine, references=()):
    """One line: the first node that an engine gets wrong, for pictures of `references` or noise."""
    job = str(onnx_path), engine, references
    # apart, because nothing else ends onnx's DeformConv, which takes minutes; a cut ends by itself
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply_async(find_first_wrong, job).get(MAX_SECONDS)
        except multiprocessing.TimeoutError:
            return f"unknown: the search was stopped after {MAX_SECONDS} s"


def find_first_wrong(onnx_path, engine, references):
    """What `locate` returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    warnings.simplefilter("ignore")  # NumPy's, about what a wrong network computes
    try:  # OpenCV names a node that it can't read
        run_engine_apart(onnx_path, engine, [])
    except NetworksDisagree as failure:
        if refused := re.match(REFUSED, str(failure)):
            return refused[1]
    try:
        proto, tensors = evaluate(onnx_path, references)
    except Exception as error:  # onnx lacks operators, and raises whatever NumPy raises
        return f"unknown: onnx can't run the file: {one_line(error)[:100]}"
    # float32 tensors: no shapes, no sequences
    names = [n for n, v in tensors.items() if getattr(v, "ndim", 0) > 1 and v.dtype == np.float32]
    right, wrong, fault, middle = 0, len(names), None, len(names) - 1  # the whole graph first
    while wrong - right > 1:
        try:
            check_cut(proto, tensors, names[middle], engine)
            right = middle
        except NetworksDisagree as failure:
            wrong, fault = middle, failure
        # a quarter, not half: most faults are near the input, and shorter graphs run faster
        middle = right + max(1, (wrong - right) // 4)
    if fault is None:
        return "none: for these pictures OpenCV computes what the file says"
    (node,) = (node for node in proto.graph.node if names[wrong] in node.output)
    before = [n.op_type for n in proto.graph.node if {*n.output} & {*node.input}]
    after = f", after {' and '.join(before)}" if before else ""
    return f"{node.op_type} {node.name or names[wrong]}{after}: {fault}"


def evaluate(onnx_path, references):
    """(the file's ModelProto, {name: value} of its input and of all that depends on it)."""
    onnx.checker.check_model(onnx_path)
    proto = onnx.load(onnx_path)
    source = proto.graph.input[0]
    if references:  # the first picture of each: a batch, because a single one shows fewer faults
        blob = np.concatenate([reference.blob[:1] for reference in references])
    else:
        shape = zip(source.type.tensor_type.shape.dim, (2, 3, 224, 224), strict=False)
        blob = np.random.default_rng(SEED).standard_normal([d.dim_value or n for d, n in shape])
    if Path(onnx_path).stat().st_size > MAX_BYTES or blob[0, 0].size > MAX_PIXELS:
        raise MemoryError("it is too large")
    tensors = {source.name: blob.astype(np.float32)}
    values = ReferenceEvaluator(proto).run(None, tensors, intermediate=True)
    for node in proto.graph.node:
        if tensors.keys() & {*node.input}:
            tensors |= {name: values[name] for name in node.output if name}
    return proto, tensors


def check_cut(proto, tensors, name, engine):
    """Raise NetworksDisagree if the graph that ends with a tensor gives it wrongly."""
    (source, blob), *_ = tensors.items()
    info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, tensors[name].shape)
    extractor = onnx.utils.Extractor(proto)
    extractor.value_infos[name] = info
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cut.onnx")
        onnx.save(extractor.extract_model([source], [name]), path)
        # first one picture: some layers keep the batch size of their first pass
        (_, output), _ = run_engine_apart(path, engine, [blob[:1], blob])
    error = compare(tensors[name], output).relative
    if not error <= MAX_RELATIVE_ERROR:
        raise NetworksDisagree(f"relative error {error:.1e}")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument("--engine", choices=EACH_ENGINE, help="OpenCV's engine (default: all)")
    args = parser.parse_args()
    if not Path(args.model).is_file():
        raise RequestError(f"{args.model}: no such file")
    for engine in [args.engine] if args.engine else EACH_ENGINE:
        print(f"{engine} engine: first wrong node: ", end="", flush=True)
        print(locate(args.model, engine))


if __name__ == "__main__":
    run(main)
