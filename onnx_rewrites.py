"""Put an ONNX graph into a form that OpenCV reads right.

Each function mends one fault of OpenCV's importer, and none changes what the graph computes. A
file that needs none of them comes out as it went in. Whether the file is right is decided by
verify.py, not here.
"""

import re

import numpy as np
import onnx


def make_readable(proto):
    """Apply every rewrite to an onnx.ModelProto, in place."""
    rewrite_einsum(proto.graph)
    rewrite_gelu(proto.graph)
    rewrite_hard_sigmoid(proto.graph)
    rewrite_constant_of_shape(proto.graph)


def rewrite_einsum(graph):
    """Einsum -> MatMul, where it is one: "...ik,...kj->...ij", or "...ik,...jk->...ij".

    OpenCV 5.0.0 takes the letters of the equation for a to z: with capitals, which ONNX allows
    and torchvision's maxvit_t has, it writes past its tables: errors or a segmentation fault.
    And its Einsum keeps the batch size of the first forward pass.
    """
    for index, node in reversed(list(enumerate(graph.node))):
        if node.op_type != "Einsum" or len(node.input) != 2:
            continue
        equation = get_attribute(node, "equation").s.decode().replace(" ", "")
        match = re.fullmatch(r"([A-Za-z]*)(\w)(\w),\1(\w)(\w)->\1(\w)(\w)", equation)
        if not match:
            continue
        batch, i, k, *second, result_i, j = match.groups()
        if len({*batch, i, k, j}) != len(batch) + 3 or result_i != i:
            continue
        if second == [j, k]:
            axes = [*range(len(batch)), len(batch) + 1, len(batch)]
            transposed = f"{node.output[0]}_transposed"
            transpose = onnx.helper.make_node("Transpose", [node.input[1]], [transposed], perm=axes)
            graph.node.insert(index, transpose)
            node.input[1] = transposed
        elif second != [k, j]:
            continue
        node.op_type = "MatMul"
        del node.attribute[:]


def rewrite_gelu(graph):
    """x * (0.5 * (1 + erf(x / sqrt 2))) -> (x * (1 + erf(x / sqrt 2))) * 0.5

    OpenCV 5.0.0 fuses GELU into one layer, and dies with a segmentation fault where the factor
    0.5 stands as PyTorch's new exporter puts it. TorchScript's puts it last.
    """
    producer = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    used = [name for node in graph.node for name in node.input]

    def is_made_by(name, op_type):
        return name in producer and producer[name].op_type == op_type

    for node in graph.node:
        if node.op_type != "Mul" or not is_made_by(node.input[1], "Mul"):
            continue
        x, half = node.input[0], producer[node.input[1]]
        factor, term = half.input
        if (
            factor in constants
            and is_made_by(term, "Add")
            and is_made_by(producer[term].input[0], "Erf")
            and used.count(half.output[0]) == 1
        ):
            half.input[:] = [x, term]
            node.input[:] = [half.output[0], factor]


def rewrite_hard_sigmoid(graph):
    """HardSigmoid(beta=0.5) -> HardSigmoid(), 0.5 being ONNX's default.

    OpenCV 5.0.0, 4.14 and 4.10 take b * HardSigmoid(a) for HardSwish(a), even where b is not a,
    but only where alpha and beta are both given: MobileNetV3's squeeze-and-excitation from
    PyTorch's new exporter is then silently wrong. TorchScript's leaves beta out.
    """
    for node in graph.node:
        beta = get_attribute(node, "beta")
        if node.op_type == "HardSigmoid" and beta is not None and beta.f == 0.5:
            node.attribute.remove(beta)


def rewrite_constant_of_shape(graph):
    """ConstantOfShape() -> ConstantOfShape(value=0), which is ONNX's default.

    OpenCV 5.0.0 demands the attribute: "blobs.size() == 1" (Swin from PyTorch's new exporter).
    """
    zero = onnx.numpy_helper.from_array(np.zeros(1, np.float32))
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and get_attribute(node, "value") is None:
            node.attribute.append(onnx.helper.make_attribute("value", zero))


def get_attribute(node, name):
    """The node's attribute, or None."""
    return next((a for a in node.attribute if a.name == name), None)
