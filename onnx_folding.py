"""What is constant in an ONNX graph: sizes, and all that depends on sizes and weights only.

Only the batch of an exported network has an unknown size. So a constant is what is the same for a
batch of 2 and one of 3. (onnxslim does this as well: 19 s for swin_v2_t, which takes 4 s here.)
"""

import numpy as np
import onnx
from onnx.helper import make_empty_tensor_value_info, make_tensor_type_proto
from onnx.numpy_helper import from_array, to_array
from onnx.reference import ReferenceEvaluator

from onnx_graph import add_constant, get_attribute, get_inputs, remove_unused

MAX_GROWTH = 2**20  # elements by which a constant may be larger than what it is computed from


def get_shapes(proto):
    """{tensor: its shape, None for sizes that depend on the batch}, as far as they are known."""
    two, three = (evaluate(proto, batch)[0] for batch in (2, 3))
    return {
        name: tuple(a if a == b else None for a, b in zip(two[name], three[name], strict=True))
        for name in two.keys() & three.keys()
        if len(two[name]) == len(three[name])
    }


def fold_constants(proto):
    """Put constants in the place of all that neither a picture nor the batch changes.

    Most nodes of an exported transformer compute sizes: OpenCV 5.0.0 takes 2.3 s to load the 6,620
    of swin_v2_t. Only the batch's size is unknown, so a constant is what is the same for a batch of
    2 and one of 3.
    """
    graph = proto.graph
    two, three = (evaluate(proto, batch)[1] for batch in (2, 3))
    both = two.keys() & three.keys()
    folded = {name for name in both if np.array_equal(two[name], three[name])}
    kept = [node for node in graph.node if not folded.issuperset(node.output)]
    for node in kept:
        shape = node.input[1] if node.op_type == "Reshape" else None
        if shape in both - folded and two[shape].shape == three[shape].shape:
            sizes = np.where(two[shape] == three[shape], two[shape], -1)
            if list(sizes).count(-1) == 1:  # the batch, or a multiple of it
                node.input[1] = add_constant(graph, f"{node.output[0]}_shape", sizes)
    used = {o.name for o in graph.output}.union(*map(get_inputs, kept))
    graph.initializer.extend(from_array(two[name], name) for name in sorted(folded & used))
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(nodes)
    remove_unused(graph)


def evaluate(proto, batch):
    """({tensor: shape}, {tensor: array}), the arrays of all that no picture of a batch changes.

    A tensor is left out if onnx can't infer its shape, or can't compute its values.
    """
    opsets = {opset.domain: opset.version for opset in proto.opset_import}
    tensors, arrays = {tensor.name: tensor for tensor in proto.graph.initializer}, {}
    types = {n: make_tensor_type_proto(t.data_type, t.dims) for n, t in tensors.items()}
    source = proto.graph.input[0]
    sizes = [dim.dim_value or batch for dim in source.type.tensor_type.shape.dim]
    types[source.name] = make_tensor_type_proto(source.type.tensor_type.elem_type, sizes)
    for node in proto.graph.node:
        inputs = [name for name in node.input if name]
        results = []
        if node.op_type == "Shape" and (sizes := get_sizes(types.get(inputs[0]))) is not None:
            ends = slice(get_attribute(node, "start", 0), get_attribute(node, "end"))
            results = [np.int64(sizes[ends])]
        elif tensors.keys() >= {*inputs} and not node.op_type.startswith("Random"):
            results = compute(node, [to_array(tensors[name]) for name in inputs], opsets)
        if results:
            for name, array in zip(node.output, results, strict=True):
                arrays[name], tensors[name] = array, from_array(array, name)
                types[name] = make_tensor_type_proto(tensors[name].data_type, array.shape)
        else:
            types |= infer(node, types, tensors, opsets)
    shapes = {name: get_sizes(value) for name, value in types.items()}
    return {name: sizes for name, sizes in shapes.items() if sizes is not None}, arrays


def get_sizes(value):
    """The shape of a TypeProto; None if it isn't known, or isn't that of a tensor."""
    if value is None or not value.tensor_type.HasField("shape"):
        return None
    dims = value.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None


def compute(node, values, opsets):
    """[the arrays that a node makes of constant inputs], none if onnx can't compute them."""
    names = [name for name in node.input if name]
    inputs, outputs = ([make_empty_tensor_value_info(n) for n in x] for x in (names, node.output))
    graph = onnx.helper.make_graph([node], "node", inputs, outputs)
    try:
        with np.errstate(all="ignore"):
            feeds = dict(zip(names, values, strict=True))
            results = ReferenceEvaluator(graph, opsets).run(None, feeds)
    except Exception:  # onnx lacks operators, and raises whatever NumPy raises
        return []
    size = sum(value.size for value in values) + MAX_GROWTH
    return results if all(isinstance(r, np.ndarray) and r.size <= size for r in results) else []


def infer(node, types, tensors, opsets):
    """{output: TypeProto} of a node, as far as onnx can infer it."""
    small = {n: tensors[n] for n in node.input if n in tensors and np.prod(tensors[n].dims) < 100}
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets[node.domain], node.domain)
        known = {name: types[name] for name in node.input if name}
        imports = [onnx.helper.make_opsetid(*opset) for opset in opsets.items()]
        infer = onnx.shape_inference.infer_node_outputs
        return infer(schema, node, known, small, opset_imports=imports)
    except (KeyError, onnx.defs.SchemaError, onnx.shape_inference.InferenceError, RuntimeError):
        return {}
