"""Put an ONNX graph into a form that OpenCV reads correctly.

Each function works around one fault of OpenCV's importer without changing what the graph computes.
A file that needs none of them stays as it is. verify.py decides whether it is right.
"""

import re

import numpy as np
import onnx
from onnx.helper import make_node
from onnx.numpy_helper import from_array, to_array


def make_readable(proto):
    """Apply every rewrite to an onnx.ModelProto, in place."""
    rewrite_einsum(proto.graph)
    rewrite_matmul(proto.graph)
    rewrite_gelu(proto.graph)
    rewrite_hard_sigmoid(proto.graph)
    rewrite_constant_of_shape(proto.graph)
    rewrite_tanh(proto.graph)
    rewrite_batch_norm(proto.graph)
    rewrite_col2im(proto.graph)


def rewrite_einsum(graph):
    """Einsum -> MatMul between Transposes, if it sums products over one letter.

    OpenCV 5.0.0's Einsum keeps the batch size of the first forward pass. With capitals, which
    ONNX allows and torchvision's maxvit_t has, it writes past its tables.
    """
    for index, node in find_nodes(graph, "Einsum"):
        equation = get_attribute(node, "equation").s.decode().replace(" ", "")
        match = re.fullmatch("([A-Za-z]+),([A-Za-z]+)->([A-Za-z]+)", equation)  # two factors
        if not match or any(len({*letters}) < len(letters) for letters in match.groups()):
            continue
        first, second, result = match.groups()
        summed = {*first} & {*second} - {*result}
        rows = [c for c in first if c not in second]
        columns = [c for c in second if c not in first]
        if not rows or len(summed) != 1 or len(columns) != 1:
            continue
        if {*result} != {*first, *second} - summed:
            continue
        # MatMul: (..., batch, row, summed) times (batch, summed, column)
        batch = [c for c in first if c in second and c in result]
        outer = [*rows[:-1], *batch, rows[-1]]
        orders = [*outer, *summed], [*batch, *summed, *columns], [*outer, *columns]
        ends = ("transposed_0", "transposed_1", "product")
        *factors, product = (get_new_name(graph, f"{node.output[0]}_{end}") for end in ends)
        nodes = []
        for i, letters in enumerate((first, second)):
            axes = [letters.index(c) for c in orders[i]]
            nodes.append(make_node("Transpose", [node.input[i]], [factors[i]], perm=axes))
        nodes.append(make_node("MatMul", factors, [product]))
        axes = [orders[2].index(c) for c in result]
        nodes.append(make_node("Transpose", [product], node.output, perm=axes))
        replace_node(graph, index, *nodes)


def rewrite_matmul(graph):
    """MatMul(x, constant) -> MatMul(x, Identity(constant)) if the constant is several matrices.

    OpenCV 5.0.0 doesn't repeat a constant for each picture: wrong values, or signal 11.
    """
    several = {tensor.name for tensor in graph.initializer if np.prod(tensor.dims[:-2]) > 1}
    for index, node in find_nodes(graph, "MatMul"):
        if node.input[1] in several:
            insert_before(graph, index, 1, "Identity")


def rewrite_gelu(graph):
    """x * (0.5 * (1 + erf(x / sqrt 2))) -> (x * (1 + erf(x / sqrt 2))) * 0.5

    OpenCV 5.0.0 fuses GELU into one layer, and crashes if the factor 0.5 comes first, as PyTorch's
    new exporter writes it. TorchScript's writes it last.
    """
    producer = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    used = [name for node in graph.node for name in node.input]
    used += [output.name for output in graph.output]

    def get_inputs(name, *op_types):
        """The inputs of the node that makes a tensor, if it is of these kinds."""
        node = producer.get(name)
        return node.input if node is not None and node.op_type in op_types else (None, None)

    for _, node in find_nodes(graph, "Mul"):
        x, product = node.input
        factor, term = get_inputs(product, "Mul")
        erf, _ = get_inputs(term, "Add")
        quotient, *_ = get_inputs(erf, "Erf")
        is_gelu = factor in constants and x in get_inputs(quotient, "Div", "Mul")
        if is_gelu and used.count(product) == 1:
            producer[product].input[:] = [x, term]
            node.input[:] = [product, factor]


def rewrite_hard_sigmoid(graph):
    """HardSigmoid(beta=0.5) -> HardSigmoid(), 0.5 being ONNX's default.

    OpenCV 5.0.0, 4.14 and 4.10 take b * HardSigmoid(a) for HardSwish(a), even if b isn't a, but
    only if alpha and beta are both given: MobileNetV3's squeeze-and-excitation from PyTorch's new
    exporter is then silently wrong. TorchScript's leaves beta out.
    """
    for _, node in find_nodes(graph, "HardSigmoid"):
        beta = get_attribute(node, "beta")
        if beta is not None and beta.f == 0.5:
            node.attribute.remove(beta)


def rewrite_constant_of_shape(graph):
    """ConstantOfShape() -> ConstantOfShape(value=0), which is ONNX's default.

    OpenCV 5.0.0 requires the attribute: "blobs.size() == 1" (Swin from PyTorch's new exporter).
    """
    zero = from_array(np.zeros(1, np.float32))
    for _, node in find_nodes(graph, "ConstantOfShape"):
        if get_attribute(node, "value") is None:
            node.attribute.append(onnx.helper.make_attribute("value", zero))


def rewrite_tanh(graph):
    """Tanh(x) -> Tanh(Clip(x, -20, 20)), which is the same: tanh(20) is 1 in float32.

    OpenCV 5.0.0 returns nan for x of 50 and more.
    """
    for index, node in find_nodes(graph, "Tanh"):
        name = node.output[0]
        limits = [add_constant(graph, f"{name}_{v}", np.float32(v)) for v in (-20, 20)]
        insert_before(graph, index, 0, "Clip", *limits)


def rewrite_batch_norm(graph):
    """BatchNormalization -> Mul, Add, if it follows an activation of a convolution.

    OpenCV 5.0.0's new engine folds it into the convolution, past GELU, SiLU, Hardswish, Sigmoid,
    HardSigmoid and ELU: relative errors of 0.1 to 0.9 (ConvMixer and XCiT, for instance). Related:
    https://github.com/opencv/opencv/issues/28689
    """
    producer = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    activations = {"Mul", "Sigmoid", "HardSigmoid", "HardSwish", "Elu", "Gelu"}
    for index, node in find_nodes(graph, "BatchNormalization"):
        if not constants.keys() >= {*node.input[1:]}:
            continue
        source = first = producer.get(node.input[0])
        while source is not None and source.op_type in activations:
            source = producer.get(source.input[0])
        if source is None or source is first or source.op_type != "Conv":
            continue
        if source.input[1] not in constants:
            continue
        values = (to_array(constants[name]).astype(np.float64) for name in node.input[1:])
        gamma, beta, mean, variance = values
        epsilon = get_attribute(node, "epsilon")
        factor = gamma / np.sqrt(variance + (1e-5 if epsilon is None else epsilon.f))
        shape = [-1] + [1] * (len(constants[source.input[1]].dims) - 2)
        name = node.output[0]
        scale = add_constant(graph, f"{name}_factor", np.float32(factor).reshape(shape))
        term = add_constant(graph, f"{name}_term", np.float32(beta - mean * factor).reshape(shape))
        scaled = get_new_name(graph, f"{name}_scaled")
        mul = make_node("Mul", [node.input[0], scale], [scaled])
        add = make_node("Add", [scaled, term], [name])
        replace_node(graph, index, mul, add)


def rewrite_col2im(graph):
    """Col2Im -> Reshape, ConvTranspose, with kernels of a single 1 that put each value in place.

    OpenCV 5.0.0 has no Col2Im: "!empty()" (timm's VOLO, by PyTorch's new exporter).
    """
    constants = {t.name: to_array(t) for t in graph.initializer}
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.value_info}
    for index, node in find_nodes(graph, "Col2Im"):
        data, *sizes = node.input
        if data not in shapes or not {*sizes} <= constants.keys():
            continue
        (height, width), (rows, columns) = (constants[name].tolist() for name in sizes)
        options = {"strides": [1, 1], "dilations": [1, 1], "pads": [0, 0, 0, 0]}
        options |= {a.name: list(a.ints) for a in node.attribute}
        blocks, rest = [], []
        for axis, size, kernel in ((0, height, rows), (1, width, columns)):
            pads = options["pads"][axis] + options["pads"][axis + 2]
            room = size + pads - options["dilations"][axis] * (kernel - 1) - 1
            blocks.append(room // options["strides"][axis] + 1)
            rest.append(room % options["strides"][axis])
        channels = shapes[data][1]
        kernels = np.eye(rows * columns, dtype=np.float32).reshape(-1, 1, rows, columns)
        groups = channels // (rows * columns)
        name = node.output[0]
        shape = add_constant(graph, f"{name}_shape", np.int64([0, channels, *blocks]))
        weights = add_constant(graph, f"{name}_weights", np.tile(kernels, (groups, 1, 1, 1)))
        blocked = get_new_name(graph, f"{name}_blocks")
        reshape = make_node("Reshape", [data, shape], [blocked])
        options |= {"group": groups, "output_padding": rest}
        scatter = make_node("ConvTranspose", [blocked, weights], node.output, **options)
        replace_node(graph, index, reshape, scatter)


def find_nodes(graph, op_type):
    """[(index, node)] of a kind, the last first: you may insert nodes while you go through it."""
    return [(i, node) for i, node in enumerate(graph.node) if node.op_type == op_type][::-1]


def replace_node(graph, index, *nodes):
    """Put `nodes`, in their order, in the place of one."""
    del graph.node[index]
    for node in reversed(nodes):
        graph.node.insert(index, node)


def insert_before(graph, index, position, op_type, *constants):
    """Put a node before one of a node's inputs."""
    source = graph.node[index].input[position]
    name = get_new_name(graph, f"{graph.node[index].output[0]}_{op_type.lower()}")
    graph.node.insert(index, make_node(op_type, [source, *constants], [name]))
    graph.node[index + 1].input[position] = name


def add_constant(graph, name, value):
    """Add an array to the graph; return the name that it gets."""
    name = get_new_name(graph, name)
    graph.initializer.append(from_array(value, name))
    return name


def get_new_name(graph, name):
    """The name, with underscores appended until no tensor has it."""
    taken = {tensor for node in graph.node for tensor in (*node.input, *node.output)}
    taken |= {tensor.name for tensor in (*graph.initializer, *graph.input, *graph.output)}
    while name in taken:
        name += "_"
    return name


def get_attribute(node, name):
    """The node's attribute, or None."""
    return next((a for a in node.attribute if a.name == name), None)
