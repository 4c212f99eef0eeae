"""Put an ONNX graph into a form that OpenCV reads correctly.

Each function works around one fault of OpenCV's importer without changing what the graph computes.
A file that needs none of them stays as it is. verify.py decides whether it is right.
"""

import math
import re

import numpy as np
import onnx
from onnx.numpy_helper import from_array, to_array

from onnx_folding import get_shapes, simplify
from onnx_graph import find_nodes, find_reductions, get_attribute, replace_node, write_reduction

# OpenCV's layers of several operands that keep the channels in blocks of 8
BROADCASTING = (
    "Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Pow", "Mod", "Where", "BitShift",
    "And", "Or", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
)  # fmt: skip


def make_readable(proto):
    """Apply every rewrite to an onnx.ModelProto, in place."""
    shapes = get_shapes(proto)
    rewrite_einsum(proto.graph, shapes)
    rewrite_matmul(proto.graph)
    rewrite_gelu(proto.graph)
    rewrite_gelu_tanh(proto.graph)
    rewrite_hard_sigmoid(proto.graph)
    rewrite_constant_of_shape(proto.graph)
    rewrite_tanh(proto.graph)
    rewrite_softplus(proto.graph)
    rewrite_batch_norm(proto.graph)
    rewrite_col2im(proto.graph, shapes)
    rewrite_log_sum_exp(proto, shapes)
    rewrite_reduction(proto, shapes)
    rewrite_average_pool(proto.graph, shapes)
    rewrite_grouped_conv(proto.graph)
    rewrite_repeated(proto.graph, shapes)
    simplify(proto.graph)


def rewrite_einsum(graph, shapes):
    """Einsum -> MatMul between Transposes, if the second tensor has one letter of its own.

    OpenCV 5.0.0's Einsum keeps the batch size of the first forward pass. With capitals, which
    ONNX allows and torchvision's maxvit_t has, it writes past its tables.
    """
    for index, node in find_nodes(graph, "Einsum"):
        equation = get_attribute(node, "equation").decode().replace(" ", "")
        match = re.fullmatch("([A-Za-z]+),([A-Za-z]+)->([A-Za-z]+)", equation)
        first, second, result = letters = match.groups() if match else [""] * 3
        batch = [c for c in first if c in second and c in result]
        summed = [c for c in first if c in second and c not in result]
        rows = [c for c in first if c not in second]
        columns = [c for c in second if c not in first]
        # MatMul: (..., batch, row, summed) times (batch, summed, column)
        outer = [*rows[:-1], *batch, *rows[-1:]]
        orders = [*outer, *summed], [*batch, *summed, *columns], [*outer, *columns]
        is_exact = all(sorted(a) == sorted({*b}) for a, b in zip(letters, orders, strict=True))
        sizes = dict(zip(second, shapes.get(node.input[1], ()), strict=False))
        many, size = len(summed) > 1, math.prod(sizes.get(c) or 0 for c in summed)
        if not rows or not summed or len(columns) != 1 or not is_exact or (many and not size):
            continue  # many become one axis of this size
        text = f"""
            left = Transpose <perm = {[first.index(c) for c in orders[0]]}> (x)
            right = Transpose <perm = {[second.index(c) for c in orders[1]]}> (second)
            {"a = Reshape(left, left_shape) b = Reshape(right, right_shape)" if many else ""}
            product = MatMul({"a, b" if many else "left, right"})
            y = Transpose <perm = {[orders[2].index(c) for c in result]}> (product)
        """
        tensors = {
            "second": node.input[1],
            "left_shape": [0] * len(outer) + [size],
            "right_shape": [0] * len(batch) + [size, -1],
        }
        replace_node(graph, index, text, **tensors)


def rewrite_matmul(graph):
    """MatMul(x, constant) -> MatMul(x, Identity(constant)) if the constant is several matrices.

    OpenCV 5.0.0 doesn't repeat a constant for each picture: wrong values, or signal 11.
    """
    several = {tensor.name for tensor in graph.initializer if np.prod(tensor.dims[:-2]) > 1}
    for index, node in find_nodes(graph, "MatMul"):
        if node.input[1] in several:
            text = "several = Identity(constant) y = MatMul(x, several)"
            replace_node(graph, index, text, constant=node.input[1])


def rewrite_gelu(graph):
    """x * (0.5 * (1 + erf)) -> (x * (1 + erf)) * 0.5, in any order: halving rounds nothing.

    OpenCV 5.0.0 fuses GELU, and crashes unless 0.5 comes last, as TorchScript's exporter has it.
    """
    halves = {t.name for t in graph.initializer if np.prod(t.dims) == 1 and to_array(t) == 0.5}
    sums, halved = {node.output[0] for _, node in find_nodes(graph, "Add")}, {}
    for _, node in find_nodes(graph, "Mul"):
        term, half = sorted(node.input, key=halves.__contains__)
        if half in halves and term in sums:
            halved[node.output[0]] = {"half": half, "term": term}
    for index, node in find_nodes(graph, "Mul"):
        other, product = sorted(node.input, key=halved.__contains__)
        if product in halved:
            text = "product = Mul(other, term) y = Mul(product, half)"
            replace_node(graph, index, text, other=other, **halved[product])


def rewrite_gelu_tanh(graph):
    """Gelu(approximate="tanh") -> x * Sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x^3)), the same.

    OpenCV 5.0.0 computes the exact GELU: up to 5e-4 off (PyTorch's new exporter).
    """
    factor = np.float32(2 * math.sqrt(2 / math.pi))
    for index, node in find_nodes(graph, "Gelu"):
        if get_attribute(node, "approximate") == b"tanh":
            text = "square = Mul(x, x) part = Mul(square, cubic) sum = Add(part, linear) "
            text += "product = Mul(x, sum) gate = Sigmoid(product) y = Mul(x, gate)"
            replace_node(graph, index, text, linear=factor, cubic=np.float32(0.044715) * factor)


def rewrite_hard_sigmoid(graph):
    """HardSigmoid(beta=0.5) -> HardSigmoid(), 0.5 being ONNX's default.

    If alpha and beta are both given, OpenCV 5.0.0, 4.14 and 4.10 fuse b * HardSigmoid(a) to
    HardSwish(a), even if b isn't a: MobileNetV3 from PyTorch's new exporter is silently wrong.
    """
    for _, node in find_nodes(graph, "HardSigmoid"):
        for beta in [a for a in node.attribute if a.name == "beta" and a.f == 0.5]:
            node.attribute.remove(beta)


def rewrite_constant_of_shape(graph):
    """ConstantOfShape() -> ConstantOfShape(value=0), which is ONNX's default.

    OpenCV 5.0.0 requires the attribute: "blobs.size() == 1" (Swin from PyTorch's new exporter).
    """
    for index, node in find_nodes(graph, "ConstantOfShape"):
        if not node.attribute:
            replace_node(graph, index, "y = ConstantOfShape <value = float[1] {0}> (x)")


def rewrite_tanh(graph):
    """Tanh(x) -> Tanh(Clip(x, -20, 20)), which is the same: tanh(20) is 1 in float32.

    OpenCV 5.0.0 returns nan for x of 50 and more.
    """
    for index, _ in find_nodes(graph, "Tanh"):
        text = "clipped = Clip(x, low, high) y = Tanh(clipped)"
        replace_node(graph, index, text, low=np.float32(-20), high=np.float32(20))


def rewrite_softplus(graph):
    """Softplus(x) -> Softplus(-|x|) + Relu(x), and Log(Add(a, b)) -> Log(Sum(a, b)), the same.

    OpenCV 5.0.0 returns inf for x above 88, and fuses Log(Exp(x) + b) to Softplus for any b.
    """
    for index, _ in find_nodes(graph, "Softplus"):
        text = "size = Abs(x) negative = Neg(size) small = Softplus(negative)"
        replace_node(graph, index, f"{text} above = Relu(x) y = Add(small, above)")
    logs = {node.input[0] for _, node in find_nodes(graph, "Log")}
    for _, node in find_nodes(graph, "Add"):
        if node.output[0] in logs:
            node.op_type = "Sum"


def rewrite_batch_norm(graph):
    """BatchNormalization -> Mul, Add, if it follows an activation of a convolution.

    OpenCV 5.0.0's new engine folds it into the convolution, past the activation: relative errors of
    0.1 to 0.9 (ConvMixer, XCiT). Related: https://github.com/opencv/opencv/issues/28689
    """
    producer = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    activations = {"Mul", "Sigmoid", "HardSigmoid", "HardSwish", "Elu", "Gelu", "Mish"}
    for index, node in find_nodes(graph, "BatchNormalization"):
        if not constants.keys() >= {*node.input[1:]} or get_attribute(node, "training_mode"):
            continue
        source = first = producer.get(node.input[0])
        while source is not None and source.op_type in activations:
            source = producer.get(source.input[0])
        if source in (None, first) or source.op_type != "Conv" or source.input[1] not in constants:
            continue
        gamma, beta, mean, variance = (np.float64(to_array(constants[n])) for n in node.input[1:])
        factor = gamma / np.sqrt(variance + get_attribute(node, "epsilon", 1e-5))
        shape = [-1] + [1] * (len(constants[source.input[1]].dims) - 2)
        factor, term = (np.float32(v).reshape(shape) for v in (factor, beta - mean * factor))
        nodes = "scaled = Mul(x, factor) y = Add(scaled, term)"
        replace_node(graph, index, nodes, factor=factor, term=term)


def rewrite_col2im(graph, shapes):
    """Col2Im -> Reshape, ConvTranspose, with kernels of a single 1 that put each value in place.

    OpenCV 5.0.0 has no Col2Im: "!empty()" (timm's VOLO, by PyTorch's new exporter).
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for index, node in find_nodes(graph, "Col2Im"):
        data, *sizes = node.input
        if not shapes.get(data) or not {*sizes} <= constants.keys():
            continue
        image, block = (to_array(constants[name]) for name in sizes)
        strides, gaps = (get_attribute(node, n, [1, 1]) for n in ("strides", "dilations"))
        pads = get_attribute(node, "pads", [0] * 4)
        room = image + np.reshape(pads, (2, 2)).sum(axis=0) - np.multiply(gaps, block - 1) - 1
        blocks, rest = np.divmod(room, strides)
        channels, pixels = shapes[data][1], np.prod(block)
        groups = channels // pixels
        text = f"""
            blocked = Reshape(x, shape)
            y = ConvTranspose <group = {groups}, strides = {strides}, dilations = {gaps},
                pads = {pads}, output_padding = {rest.tolist()}> (blocked, weights)
        """
        kernels = np.eye(pixels, dtype=np.float32).reshape(-1, 1, *block)
        weights = np.tile(kernels, (groups, 1, 1, 1))
        replace_node(graph, index, text, shape=[0, channels, *(blocks + 1)], weights=weights)


def rewrite_log_sum_exp(proto, shapes):
    """ReduceLogSumExp(x) -> ReduceLogSumExp(x - m) + m, with m = ReduceMax(x); so for LogSoftmax.

    OpenCV 5.0.0 adds up exp(x) as it is: inf for x above 88 (torch.logsumexp). Its LogSoftmax is
    the logarithm of Softmax: -inf if x is 104 below the maximum.
    """
    for index, _, axes, keepdims in find_reductions(proto, shapes, "ReduceLogSumExp"):
        text = write_reduction(proto, "maximum", "ReduceMax", "x", axes, 1) + "d = Sub(x, maximum)"
        text += write_reduction(proto, "log", "ReduceLogSumExp", "d", axes, keepdims)
        text += write_reduction(proto, "m", "ReduceMax", "x", axes, keepdims)
        replace_node(proto.graph, index, text + "y = Add(log, m)")
    for index, node in find_nodes(proto.graph, "LogSoftmax"):
        axes = [get_attribute(node, "axis", -1)]
        text = write_reduction(proto, "m", "ReduceMax", "x", axes, 1) + "d = Sub(x, m)"
        text += write_reduction(proto, "log", "ReduceLogSumExp", "d", axes, 1)
        replace_node(proto.graph, index, text + "y = Sub(d, log)")


def rewrite_reduction(proto, shapes):
    """A reduction over three or four axes -> over the last two of them, then over the others.

    OpenCV 5.0.0 loses count from the third step along the first of three axes on, if they aren't
    the tensor's last: ReduceMean over (0, 2, 3) is wrong for batches of 3 and more (BatchNorm
    without running statistics). OpenCV 4 does so with the last ones, too.
    """
    kinds = [f"Reduce{kind}" for kind in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2")]
    kinds += ["ReduceSumSquare", "ReduceLogSum"]  # squares come first, the logarithm last
    for index, node, axes, keepdims in find_reductions(proto, shapes, *kinds):
        if len(axes) in (3, 4):
            first = node.op_type.replace("LogSum", "Sum")
            second = node.op_type.replace("SumSquare", "Sum")
            text = write_reduction(proto, "part", first, "x", axes[-2:], keepdims)
            text += write_reduction(proto, "y", second, "part", axes[:-2], keepdims)
            replace_node(proto.graph, index, text)


def rewrite_average_pool(graph, shapes):
    """AveragePool(ceil_mode=1) -> Pad, AveragePool(ceil_mode=0), Mul by a constant.

    OpenCV 5.0.0 is wrong for each window past the edge: AvgPool2d(2, ceil_mode=True) on 5x5.
    """
    for index, node in find_nodes(graph, "AveragePool"):
        sizes = shapes.get(node.input[0], ())[2:]
        if not get_attribute(node, "ceil_mode", 0) or not sizes or None in sizes:
            continue
        rank, kernel = len(sizes), get_attribute(node, "kernel_shape")
        strides = get_attribute(node, "strides", [1] * rank)
        pads = get_attribute(node, "pads", [0] * 2 * rank)
        padding = get_attribute(node, "count_include_pad", 0)
        factor, ends = np.ones((1, 1)), []
        axes = zip(sizes, kernel, strides, pads[:rank], pads[rank:], strict=True)
        for size, length, stride, before, behind in axes:
            limit = size + behind - length + stride
            windows = np.arange(-before, min(size, limit), stride)  # none begins behind the picture
            taps = windows[:, None] + np.arange(length)
            inside = ((taps >= -before * padding) & (taps < size + behind * padding)).sum(axis=1)
            factor = np.multiply.outer(factor, length / inside)
            ends.append(max(taps.max() + 1 - size, behind))
        text = f"""
            padded = Pad(x, pads)
            pooled = AveragePool <kernel_shape = {kernel}, strides = {strides}> (padded)
            y = Mul(pooled, factor)
        """
        pads = [0, 0, *pads[:rank], 0, 0, *ends]
        replace_node(graph, index, text, pads=pads, factor=np.float32(factor))


def rewrite_grouped_conv(graph):
    """A grouped 1x1 Conv -> one with fewer groups, whose other weights are 0.

    Above 56 channels a group, OpenCV 5.0.0's new engine takes a group's channels for whole blocks
    of 8: it writes past its memory, or is wrong, if a group's inputs or outputs aren't a multiple.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for _, node in find_nodes(graph, "Conv"):
        groups = get_attribute(node, "group", 1)
        if groups == 1 or node.input[1] not in constants:
            continue
        outputs, inputs, *kernel = constants[node.input[1]].dims
        merged = 8 // math.gcd(8, inputs, outputs // groups)  # groups in a multiple of 8
        steps = {*kernel, *get_attribute(node, "strides", [1])}
        if steps != {1} or inputs <= 56 or merged == 1:
            continue
        merged = groups if groups % merged else merged
        weights, rows = np.zeros((outputs, merged, inputs, *kernel), np.float32), np.arange(outputs)
        weights[rows, rows * groups // outputs % merged] = to_array(constants[node.input[1]])
        weights = weights.reshape(outputs, merged * inputs, *kernel)
        node.input[1] = f"{node.output[0]}~weights"
        graph.initializer.append(from_array(weights, node.input[1]))
        next(a for a in node.attribute if a.name == "group").i = groups // merged


def rewrite_repeated(graph, shapes):
    """(b, 1, H, W) * (b, C, H, W) -> Identity(the former) * the latter; so for (b, C, 1, 1) in Add.

    OpenCV 5.0.0's new engine keeps channels in blocks of 8: a single channel is padded with 7
    zeros, which are repeated with it (CBAM's spatial attention). Identity takes no blocks. And a
    convolution that is fused with Add repeats neither operand (global context).
    """
    constants = {tensor.name for tensor in graph.initializer}  # which are repeated rightly
    for index, node in find_nodes(graph, *BROADCASTING):
        axes = slice(None) if node.op_type == "Add" else slice(1, 2)  # 1: the channels
        sizes = [() if n in constants else shapes.get(n, ())[axes] for n in node.input]
        for position, own in reversed([*enumerate(sizes)]):
            if any(a == 1 != b for other in sizes for a, b in zip(own, other, strict=False)):
                name = f"{node.output[0]}~{position}"
                identity = onnx.helper.make_node("Identity", [node.input[position]], [name])
                node.input[position] = name
                graph.node.insert(index, identity)
