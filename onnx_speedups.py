"""Put an ONNX graph into a form that OpenCV runs faster.

Each function avoids what OpenCV is slow at, without changing what the graph computes but for
rounding. Times are CPU milliseconds of one forward pass with one thread, on an AMD EPYC.
"""

import numpy as np
import onnx
from onnx.numpy_helper import to_array

from onnx_folding import get_shapes, simplify
from onnx_graph import (
    find_nodes,
    find_reductions,
    get_attribute,
    replace_node,
    shorten_names,
    write_reduction,
)


def speed_up(plain):
    """A faster onnx.ModelProto, or None if there is nothing to make faster."""
    proto = onnx.ModelProto()
    proto.CopyFrom(plain)
    shapes = get_shapes(proto)
    speed_up_norm(proto, shapes)
    speed_up_stem(proto.graph, shapes)
    speed_up_gate(proto, shapes)
    speed_up_grouped_conv(proto.graph)
    simplify(proto.graph)
    if proto.graph.node == plain.graph.node:
        return None
    shorten_names(proto.graph)
    return proto


def speed_up_norm(proto, shapes):
    """ReduceL2(x) -> Sqrt(ReduceSum(x * x))

    OpenCV 5.0.0 fuses ReduceL2, Clip and Div into a layer Normalize, 41 % of Swin v2's time:
    swin_v2_t 270 -> 150.
    """
    for index, _, axes, keepdims in find_reductions(proto, shapes, "ReduceL2"):
        text = "square = Mul(x, x)"
        text += write_reduction(proto, "sum", "ReduceSum", "square", axes, keepdims)
        replace_node(proto.graph, index, text + "y = Sqrt(sum)")
    # torch.nn.functional.normalize repeats the norm, which Div does as well
    expanded = {n.output[0]: n.input[0] for _, n in find_nodes(proto.graph, "Expand")}
    for _, node in find_nodes(proto.graph, "Div"):
        x, norm = node.input
        if norm in expanded and shapes.get(x, ()) == shapes.get(norm) != ():
            node.input[1] = expanded[norm]


def speed_up_stem(graph, shapes):
    """A strided Conv of 3 or 4 channels -> Conv with stride 1 of blocks of stride x stride pixels.

    OpenCV 5.0.0 computes with 8 input channels if there are fewer, and has no fast path for large
    kernels or strides: 7x7, stride 2: 10.1 -> 6.1; 16x16, stride 16, to 768 channels: 14.8 -> 2.6.
    Nothing is gained with smaller ones.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for index, node in find_nodes(graph, "Conv"):
        sizes, weights = shapes.get(node.input[0], ())[2:], constants.get(node.input[1])
        if weights is None or len(sizes) != 2 or None in sizes or weights.dims[1] not in (3, 4):
            continue
        strides, pads = get_attribute(node, "strides", [1, 1]), get_attribute(node, "pads", [0] * 4)
        is_slow = min(strides) > 1 and (max(weights.dims[2:]) >= 7 or min(strides) >= 4)
        dilations, groups = get_attribute(node, "dilations", [1]), get_attribute(node, "group", 1)
        if not is_slow or {*dilations, groups} != {1}:
            continue
        size, stride, taps = (np.array(v) for v in (sizes, strides, weights.dims[2:]))
        start, stop = np.reshape(pads, (2, 2))
        # for each axis: the blocks of the picture, those before and behind it, and the zeros that
        # the kernel gets on either side to begin and end with a block
        before = -(-start // stride)
        margin = before * stride - start
        length = -(-(margin + taps) // stride)
        end = (start + size + stop - taps) // stride + length - before
        blocks = np.minimum(end, -(-size // stride))
        margins = zip(margin, length * stride - margin - taps, strict=True)
        (rows, columns), (high, wide), (outputs, channels) = blocks, strides, weights.dims[:2]
        kernel = np.pad(to_array(weights), [(0, 0), (0, 0), *margins])
        kernel = kernel.reshape(outputs, channels, length[0], high, length[1], wide)
        kernel = kernel.transpose(0, 1, 3, 5, 2, 4).reshape(outputs, -1, *length)
        pads = np.append(before, end - blocks).tolist()
        read = blocks * stride
        cut = "cut = Slice(x, zeros, read, axes)" if (read < size).any() else ""
        source = "cut" if cut else "x"
        pad = f"padded = Pad({source}, missing)" if (read > size).any() else ""
        source = "padded" if pad else source
        bias = ", bias" * (len(node.input) > 2)
        text = f"""
            {cut} {pad}
            grid = Reshape({source}, grid_shape)
            moved = Transpose <perm = [0, 1, 3, 5, 2, 4]> (grid)
            blocks = Reshape(moved, blocks_shape)
            y = Conv <kernel_shape = {length.tolist()}, pads = {pads}> (blocks, kernel{bias})
        """
        tensors = {
            "zeros": [0, 0], "read": read, "axes": [2, 3],
            "missing": [0] * 6 + [*np.maximum(read - size, 0)],
            "grid_shape": [0, channels, rows, high, columns, wide],
            "blocks_shape": [0, channels * high * wide, rows, columns],
        }  # fmt: skip
        replace_node(graph, index, text, kernel=kernel, bias=node.input[-1], **tensors)


def speed_up_gate(proto, shapes):
    """(b, C, H, W) * (b, C, 1, 1) -> (b, C, H * W) * (b, C, 1): squeeze and excitation.

    OpenCV 5.0.0 is slow at repeating a factor along two axes. With ReduceMean in the place of
    GlobalAveragePool: efficientnet_b0 22.1 -> 17.9, mobilenet_v3_large 9.7 -> 8.4.
    """
    gated = set()
    for index, node in find_nodes(proto.graph, "Mul"):
        large, gate = sorted(node.input, key=lambda name: shapes.get(name, ())[2:] == (1, 1))
        shape = shapes.get(large, ())
        is_gate = len(shape) == 4 and shapes.get(gate) == (*shape[:2], 1, 1) != shape
        if not is_gate or None in shape[1:]:
            continue
        text = """
            flat = Reshape(large, flat_shape)
            factor = Reshape(gate, gate_shape)
            product = Mul(flat, factor)
            y = Reshape(product, shape)
        """
        sizes = {"flat_shape": [0, shape[1], -1], "gate_shape": [0, shape[1], 1]}
        sizes["shape"] = [0, *shape[1:]]
        replace_node(proto.graph, index, text, large=large, gate=gate, **sizes)
        gated.add(large)
    for index, node in find_nodes(proto.graph, "GlobalAveragePool"):
        if node.input[0] in gated:
            text = write_reduction(proto, "y", "ReduceMean", "x", [2, 3], 1)
            replace_node(proto.graph, index, text)


def speed_up_grouped_conv(graph):
    """A 3x3 Conv with stride 1 and groups of 48 channels or more -> Slice, a Conv each, Concat.

    OpenCV 5.0.0's fast path needs one group, 64 inputs or more, and outputs in multiples of 16:
    zero weights fill them up. 720 channels in 6 groups: 6.6 -> 3.4; regnet_x_16gf 448 -> 360.
    Groups of 48: regnet_x_3_2gf 119 -> 109; of 32: resnext50_32x4d 138 -> 142.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for index, node in find_nodes(graph, "Conv"):
        weights, groups = constants.get(node.input[1]), get_attribute(node, "group", 1)
        steps = {n for name in ("strides", "dilations") for n in get_attribute(node, name, [1])}
        if weights is None or groups == 1 or steps != {1} or [*weights.dims[2:]] != [3, 3]:
            continue
        inputs, outputs = weights.dims[1], weights.dims[0] // groups
        if inputs < 48 or {*node.input[2:]} - constants.keys():
            continue
        # what a group reads and makes, with what the fast path needs beside
        read, made = max(inputs, 64), -(-outputs // 16) * 16
        kernels = to_array(weights).reshape(groups, outputs, inputs, 3, 3)
        biases = np.zeros((groups, made), np.float32)
        if len(node.input) > 2:
            biases[:, :outputs] = to_array(constants[node.input[2]]).reshape(groups, outputs)
        pads = get_attribute(node, "pads", [0] * 4)
        result = "made" if made > outputs else "y"
        text, tensors = "", {"channel": [1], "first": [0], "last": [outputs]}
        for i in range(groups):
            start = min(i * inputs, groups * inputs - read)
            offset = i * inputs - start
            margins = (0, made - outputs), (offset, read - inputs - offset), (0, 0), (0, 0)
            tensors |= {f"kernel{i}": np.pad(kernels[i], margins), f"bias{i}": biases[i]}
            tensors |= {f"start{i}": [start], f"end{i}": [start + read]}
            text += f"""
                x{i} = Slice(x, start{i}, end{i}, channel)
                {result}{i} = Conv <kernel_shape = [3, 3], pads = {pads}> (x{i}, kernel{i}, bias{i})
            """
            text += f"y{i} = Slice(made{i}, first, last, channel)" if made > outputs else ""
        names = ", ".join(f"y{i}" for i in range(groups))
        replace_node(graph, index, f"{text} y = Concat <axis = 1> ({names})", **tensors)
