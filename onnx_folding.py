"""What is constant in an ONNX graph: sizes, and all that depends on sizes and weights only.

Only the batch of an exported network has an unknown size. So a constant is what is the same for a
batch of 2 and one of 17. (onnxslim does this as well: 19 s for swin_v2_t, which takes 3 s here.)
"""

import numpy as np
import onnx
from onnx.helper import make_function, make_tensor_type_proto
from onnx.numpy_helper import from_array, to_array
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import infer_node_outputs

from onnx_graph import find_nodes, get_attribute, remove_unused

BATCHES = 2, 17  # far apart: batch // 2 is the same for 2 and 3
MAX_SHARED = 16  # elements of a constant: sizes, axes and factors
MAX_GROWTH = 2**20  # elements by which a constant may be larger than what it is computed from


def get_shapes(proto):
    """{tensor: its shape, None for sizes that depend on the batch}, as far as they are known."""
    few, many = (evaluate(proto, batch)[0] for batch in BATCHES)
    return {
        name: tuple(a if a == b else None for a, b in zip(few[name], many[name], strict=False))
        for name in few.keys() & many.keys()
    }


def fold_constants(proto):
    """Put constants in the place of all that neither a picture nor the batch changes.

    Most nodes of an exported transformer compute sizes: OpenCV 5.0.0 takes 2.3 s to load the 6,620
    of swin_v2_t.
    """
    graph = proto.graph
    few, many = (evaluate(proto, batch)[1] for batch in BATCHES)
    known = few.keys() & many.keys()
    for node in graph.node:
        if known.issuperset(node.output) and all(few[n] == many[n] for n in node.output):
            graph.initializer.extend(few[name] for name in node.output)
        elif node.op_type == "Reshape" and node.input[1] in known:
            a, b = (to_array(tensors[node.input[1]]) for tensors in (few, many))
            if np.sum(a != b) == 1 and -1 not in a:  # the batch, or a multiple of it
                node.input[1] = f"{node.output[0]}~shape"
                graph.initializer.append(from_array(np.where(a == b, a, -1), node.input[1]))
    fold_gemm(graph)
    remove_unused(graph)


def fold_gemm(graph):
    """Gemm <transB = 1> (x, W, bias) -> Gemm(x, W transposed, bias)

    OpenCV 5.0.0 transposes W, and keeps both: alexnet loads in 0.49 instead of 0.69 s.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for _, node in find_nodes(graph, "Gemm"):
        if node.input[1] in constants and get_attribute(node, "transB"):
            weights = to_array(constants[node.input[1]]).T
            node.input[1] = f"{node.output[0]}~weights"
            graph.initializer.append(from_array(weights, node.input[1]))
            next(attribute for attribute in node.attribute if attribute.name == "transB").i = 0


def simplify(graph):
    """Keep one of equal constants, not of weights, and no Transpose that moves nothing.

    OpenCV 5.0.0 looks for the inputs of a node among the names of all nodes and constants, once for
    each pattern that it may fuse. With fewer of them, swin_v2_s loads in 0.40 instead of 0.65 s.
    """
    names, same = {}, {}
    for _, node in find_nodes(graph, "Constant"):
        tensor = get_attribute(node, "value")
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
    for tensor in graph.initializer:
        if np.prod(tensor.dims) <= MAX_SHARED:
            value = tensor.data_type, *tensor.dims, to_array(tensor).tobytes()
            same[tensor.name] = names.setdefault(value, tensor.name)
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        perm = get_attribute(node, "perm", [])
        # that of a constant stays: OpenCV's MatMul can't take some, see rewrite_matmul
        is_variable = node.op_type == "Transpose" and node.input[0] not in constants
        if is_variable and perm and perm == sorted(perm):
            same[node.output[0]] = node.input[0]
    remove_unused(graph)


def evaluate(proto, batch):
    """({tensor: shape, () if unknown}, {tensor: TensorProto of all that no picture changes})."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    types = {n: make_tensor_type_proto(t.data_type, t.dims) for n, t in tensors.items()}
    source = proto.graph.input[0]
    sizes = [dim.dim_value or batch for dim in source.type.tensor_type.shape.dim]
    types[source.name] = make_tensor_type_proto(source.type.tensor_type.elem_type, sizes)
    for node in proto.graph.node:
        made = compute(node, types, tensors, proto.opset_import)
        tensors |= made
        types |= {n: make_tensor_type_proto(t.data_type, t.dims) for n, t in made.items()}
        if not made:
            types |= infer(node, types, tensors, proto.opset_import)
    return {name: get_sizes(value) for name, value in types.items()}, tensors


def get_sizes(value):
    """The shape of a TypeProto, () if it isn't known."""
    dims = value.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else ()


def compute(node, types, tensors, opsets):
    """{output: TensorProto} of a node that takes constants only; none if onnx can't compute it."""
    names = [name for name in node.input if name]
    if tensors.keys() >= {*names} and not node.op_type.startswith("Random"):
        feeds = {name: to_array(tensors[name]) for name in names}
    elif node.op_type == "Shape" and names[0] in types and (sizes := get_sizes(types[names[0]])):
        feeds = {names[0]: np.broadcast_to(0, sizes)}
    else:
        return {}
    function = make_function("", "node", names, node.output, [node], opsets)
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(function).run(None, feeds, attributes={})
    except Exception:  # onnx lacks operators, and raises whatever NumPy raises
        return {}
    size = sum(value.size for value in feeds.values()) + MAX_GROWTH
    size = np.inf if node.op_type == "Constant" else size  # that is in the file already
    if not all(isinstance(r, np.ndarray) and r.size <= size for r in results):
        return {}
    return {n: from_array(r, n) for n, r in zip(node.output, results, strict=True)}


def infer(node, types, tensors, opsets):
    """{output: TypeProto} of a node, as far as onnx can infer it."""
    known = {name: types[name] for name in node.input if name in types}
    small = {n: tensors[n] for n in known if n in tensors and np.prod(tensors[n].dims) < 100}
    try:
        (version,) = (opset.version for opset in opsets if opset.domain == node.domain)
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        return infer_node_outputs(schema, node, known, small, opset_imports=[*opsets])
    except Exception:  # onnx lacks operators and types, and has an error of its own for each
        return {}
