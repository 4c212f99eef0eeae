"""Does a network branch on its input? A forward pass shows where values leave the graph.

Exporters record the operators of one pass. What Python does with a value (`if x.max() > 1:`) isn't
one: the file keeps the branch that the recorded picture took, and is silently wrong for pictures
that take another. Branches on shapes, and on state that the input never touched, are harmless.

The input's storage is marked, as is all that an operator makes of marked storage or writes there.
Storages are marked, not tensors: `y[:, 0] = x.mean((1, 2, 3))` marks y through a view of it.
"""

import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from forward import find_line

# Functions that read values without an operator; torch.tensor([x.mean()]) writes a constant.
READERS = {
    "numpy", "tolist", "item", "__array__", "__dlpack__", "apply_", "map_", "map2_",
    "__bool__", "__int__", "__index__", "__float__", "__complex__",
    "tensor", "as_tensor", "asarray", "new_tensor", "sparse_coo_tensor",
}  # fmt: skip


class Marks(TorchDispatchMode):
    """Storages that depend on the input, and the first line that takes a value out of them."""

    def __init__(self, batch):
        super().__init__()
        self.storages = WeakIdKeyDictionary()  # weak: addresses are used again
        self.mark(batch)
        self.depth = len(traceback.extract_stack())  # your frames are the later ones
        self.line = None

    def mark(self, values):
        for storage in get_storages(values):
            self.storages[storage] = True

    def has(self, values):
        return any(storage in self.storages for storage in get_storages(values))

    def leave(self):
        if self.line is None:
            self.line = find_line(traceback.extract_stack()[self.depth :]) or "in scripted code"

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        marked = self.has((args, kwargs))
        result = operator(*args, **kwargs)
        if marked:
            self.mark((result, get_written(operator, args, kwargs)))
            # item, equal, allclose ... return a number; in-place operators on lists return nothing
            takes_value = not get_storages(result) and tree_leaves(result) not in ([], [None])
            if takes_value or has_free_shape(operator, args):
                self.leave()
        return result


def get_storages(values):
    """The memory of tensors, which their views share; a sparse one stands for itself."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
    return [t.untyped_storage() if t.layout == torch.strided else t for t in tensors]


def get_written(operator, args, kwargs):
    """The arguments that an operator writes into."""
    values = dict(zip((a.name for a in operator._schema.arguments), args, strict=False)) | kwargs
    names = [a.name for a in operator._schema.arguments if a.alias_info and a.alias_info.is_write]
    return [values.get(name) for name in names]


def has_free_shape(operator, args):
    """Whether the shape of the result depends on values; that of x[index] if it's a mask."""
    if operator is torch.ops.aten.index.Tensor:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return torch.Tag.dynamic_output_shape in operator.tags


class Readers(TorchFunctionMode):
    def __init__(self, marks):
        super().__init__()
        self.marks = marks

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in READERS and self.marks.has((args, kwargs)):
            self.marks.leave()
        return function(*args, **kwargs)


def find_branch(model, batch):
    """The first line of code that takes a value out of what depends on the batch, or None.

    batch: float32 tensor (batch, 3, height, width). Raises what the network raises.
    """
    marks = Marks(batch)
    with torch.no_grad(), Readers(marks), marks:
        model(batch)
        model(batch)  # again: it may read what the first pass has left in a buffer
    return marks.line
