"""What onnx_rewrites.py and onnx_speedups.py share: how to find, write and replace ONNX nodes."""

import onnx
from onnx.helper import make_node
from onnx.numpy_helper import from_array, to_array


def find_nodes(graph, *op_types):
    """[(index, node)] of some kinds, the last first, so that you may insert nodes on the way."""
    return [(i, node) for i, node in enumerate(graph.node) if node.op_type in op_types][::-1]


def replace_node(graph, index, text, **tensors):
    """Put nodes, written in onnx's text format, in the place of one.

    tensors: {name in the text: a tensor's name or a constant}. x is the node's first input, y its
    first output; other names are new.
    """
    node = graph.node[index]
    tensors = {"x": node.input[0], "y": node.output[0]} | tensors
    nodes = onnx.parser.parse_graph(f"nodes () => () {{ {text} }}").node
    for names in (names for new in nodes for names in (new.input, new.output)):
        for i, name in enumerate(names):
            new_name = f"{node.output[0]}_{name}"
            if name not in tensors:
                tensors[name] = get_new_name(graph, new_name)
            elif not isinstance(tensors[name], str):
                tensors[name] = add_constant(graph, new_name, tensors[name])
            names[i] = tensors[name]
    del graph.node[index]
    for new in reversed(nodes):
        graph.node.insert(index, new)


def insert_before(graph, index, position, op_type):
    """Put a node before one of a node's inputs."""
    source = graph.node[index].input[position]
    name = get_new_name(graph, f"{graph.node[index].output[0]}_{op_type.lower()}")
    graph.node.insert(index, make_node(op_type, [source], [name]))
    graph.node[index + 1].input[position] = name


def add_constant(graph, name, value):
    """Add an array to the graph; return the name that it gets."""
    name = get_new_name(graph, name)
    graph.initializer.append(from_array(value, name))
    return name


def get_inputs(node):
    """The names of the tensors that a node takes, those in its branches with them."""
    graphs = [attribute.g for attribute in node.attribute]
    names = {*node.input, *(output.name for graph in graphs for output in graph.output)}
    return names.union(*(get_inputs(inner) for graph in graphs for inner in graph.node))


def remove_unused(graph):
    """Remove the nodes and constants that no output depends on."""
    used = {output.name for output in graph.output}
    for index in reversed(range(len(graph.node))):
        if used.intersection(graph.node[index].output):
            used |= get_inputs(graph.node[index])
        else:
            del graph.node[index]
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in used:
            del graph.initializer[index]


def get_new_name(graph, name):
    """The name, with underscores appended until no tensor has it."""
    taken = {tensor for node in graph.node for tensor in (*node.input, *node.output)}
    taken |= {tensor.name for tensor in (*graph.initializer, *graph.input, *graph.output)}
    while name in taken:
        name += "_"
    return name


def get_attribute(node, name, default=None):
    """The value of a node's attribute."""
    values = (onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)
    return next(values, default)


def get_axes(graph, node, shapes):
    """The axes of a reduction, sorted and from 0 on; None if they aren't known."""
    axes, rank = get_attribute(node, "axes"), len(shapes.get(node.input[0], ()))
    if len(node.input) > 1:  # from opset 18 on, and ReduceSum's from 13 on
        found = [to_array(t).tolist() for t in graph.initializer if t.name == node.input[1]]
        axes = found[0] if found else None
    elif axes is None:
        axes = [] if get_attribute(node, "noop_with_empty_axes") else range(rank)
    return None if axes is None or not rank else sorted(int(axis) % rank for axis in axes)


def write_reduction(proto, name, op_type, source, axes, keepdims):
    """The line of a reduction in onnx's text format."""
    (opset,) = (opset.version for opset in proto.opset_import if opset.domain == "")
    if opset < 18 and op_type != "ReduceSum":
        return f"{name} = {op_type} <axes = {axes}, keepdims = {keepdims}> ({source})\n"
    values = ", ".join(map(str, axes))
    return (
        f"{name}_axes = Constant <value = int64[{len(axes)}] {{{values}}}> ()\n"
        f"{name} = {op_type} <keepdims = {keepdims}> ({source}, {name}_axes)\n"
    )


def write_attributes(options):
    """{name: list or number} in onnx's text format."""
    return ", ".join(f"{name} = {value}" for name, value in options.items())
