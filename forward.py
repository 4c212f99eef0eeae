"""Run a network's code: in float32, with a reason if it fails, and does it branch on its input?

Exporters record the operators of one pass. What Python does with a value (`if x.max() > 1:`) isn't
one: the file keeps the branch that the recorded picture took, and is silently wrong for pictures
that take another. Branches on shapes, and on state that the input never touched, are harmless.
"""

import contextlib
import os
import re
import traceback
from dataclasses import dataclass
from unittest import mock

import torch
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from classification import RequestError, one_line

# What an error of forward is about, by its text.
ABOUT_CHANNELS = r"got 3 channels|channel dimension|3 elements not|r a \(3\)|shape\[1\]|size\(1\)"
ABOUT_SIZES = r"size|shape|height|width|resolution|dimension|divi|must match|bounds"
NOT_ABOUT_SIZES = "^TypeError|^AttributeError|channels instead|when training"
WRAP = "give MODULE:FUNCTION of a module around the network that"

# Functions that read values without an operator; torch.tensor([x.mean()]) writes a constant.
READERS = {
    "numpy", "tolist", "__array__", "__dlpack__", "__float__", "__index__", "apply_", "map_",
    "map2_", "tensor", "as_tensor", "asarray", "new_tensor", "sparse_coo_tensor",
}  # fmt: skip


def adapt_own(network):
    """Make the network one in float32 that returns nothing but logits; say what that changes."""
    model, name, p = network.model, network.request.name, network.preprocessing
    for module in filter(parametrize.is_parametrized, [*model.modules()]):
        for tensor in [*module.parametrizations]:  # its value is a constant now
            parametrize.remove_parametrizations(module, tensor)
    batch, dtype = torch.randn(1, 3, p.height, p.width), get_dtype(model)
    before = get_logits(run_forward(model, batch.to(dtype)))
    with no_autocast() as dtypes:
        output = run_forward(model.float(), batch)
    if dtypes:
        model.forward = no_autocast()(model.forward)
    if (after := get_logits(output)) is not output:
        print(f"{name}: taking the `logits` of what it returns")
        model.register_forward_hook(lambda module, inputs, output: get_logits(output))
    kinds = sorted(str(kind).removeprefix("torch.") for kind in {dtype, *dtypes} - {torch.float32})
    if kinds and torch.is_tensor(after):
        change = float((after - before).abs().max() / after.abs().max())
        kinds = " and ".join(kinds)
        print(f"{name}: converted as float32; the {kinds} network itself differs by {change:.0e}")


def get_dtype(model):
    """What a network computes in: float32, or what a half-precision one has."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@contextlib.contextmanager
def no_autocast():
    """Switch autocast off, also a network's own, which wins over an outer one; yield its dtypes."""
    dtypes = set()

    def enter(autocast):
        dtypes.update([autocast.fast_dtype] if autocast._enabled else [])
        return autocast

    with mock.patch.multiple(torch.autocast, __enter__=enter, __exit__=lambda *_: None):
        yield dtypes


def run_forward(model, batch):
    """What the network returns for a tensor (batch, 3, height, width); RequestError if it fails."""
    try:
        with torch.no_grad():
            return model(batch)
    except (Exception, SystemExit) as error:
        raise explain(error, model, batch) from None


def get_logits(output):
    """What a forward returns, or the `logits` in it: transformers' networks return an object."""
    if isinstance(output, dict):
        return output.get("logits", output)
    return getattr(output, "logits", output)


def explain(error, model, batch):
    """The RequestError for what forward raises; prints its traceback if your code was reached."""
    line = find_line(traceback.extract_tb(error.__traceback__))
    reason = f"{type(error).__name__}: {one_line(error)[:200]}"
    if "TorchScript interpreter" in reason:  # the reason comes last
        reason = str(error).strip().splitlines()[-1][:200]
    # `assert x.shape[-1] == 32` has no text
    about = f"{reason} {line}" if isinstance(error, AssertionError) else reason
    if not line and "argument" in reason:
        advice = f"forward must take the pictures alone: {WRAP} gives it the rest"
    elif re.search(ABOUT_CHANNELS, about):
        advice = f"pictures have 3 channels: {WRAP} makes the others of them"
    else:
        traceback.print_exception(error)
        advice = "it must take a float32 tensor of shape (batch, 3, height, width)"
        if len(batch) > 1 and takes(model, batch[:1]):
            advice = f"it takes one picture but not {len(batch)}, and must take any number of them"
        elif re.search(ABOUT_SIZES, about) and not re.search(NOT_ABOUT_SIZES, about):
            advice = "if it wants pictures of another size, give --frame_size"
    where = f" ({line})" if line else ""
    return RequestError(f"the network's forward fails{where}: {reason.strip(': ')}; {advice}")


def takes(model, batch):
    """Whether the network's code runs with a batch."""
    with contextlib.suppress(Exception, SystemExit), torch.no_grad():
        model(batch)
        return True
    return False


def takes_grey(model, width, height):
    """Whether a network's forward fails with three channels, and works with one."""
    inputs = {m.in_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)}
    if 3 in inputs and 1 not in inputs:
        return False  # without a pass: timm's LeViT, for one, would keep what it computes
    batch = torch.zeros(1, 3, height, width, dtype=get_dtype(model))
    return not takes(model, batch) and takes(model, batch[:, :1])


def find_line(frames):
    """Your line in a stack, "FILE, line N: CODE": the last that isn't PyTorch's; "" if all are."""
    called = [frame.filename for frame in frames].index(__file__)  # by this file, which runs yours
    others = os.path.join(os.path.dirname(torch.__file__), ""), contextlib.__file__, __file__
    yours = [frame for frame in frames[called:] if not frame.filename.startswith(others)]
    return f"{yours[-1].filename}, line {yours[-1].lineno}: {yours[-1].line}" if yours else ""


def find_branch(model, batch):
    """The first line of code that takes a value out of what depends on the batch, or None.

    batch: float32 tensor (batch, 3, height, width). Raises what the network raises.
    """
    marks = Marks(batch)
    with torch.no_grad(), Readers(marks), marks:
        model(batch)
        model(batch)  # again: it may read what the first pass has left in a buffer
    return marks.line


class Marks(TorchDispatchMode):
    """Storages that depend on the input, and the first line that takes a value out of them.

    Whatever an operator makes of marked storage or writes there is marked. Storages are, and not
    tensors: `y[:, 0] = x.mean((1, 2, 3))` marks y through a view of it.
    """

    def __init__(self, batch):
        super().__init__()
        self.storages = WeakIdKeyDictionary()  # weak: addresses are used again
        self.mark(batch)
        self.line = None

    def mark(self, values):
        for storage in get_storages(values):
            self.storages[storage] = True

    def has(self, values):
        return any(storage in self.storages for storage in get_storages(values))

    def leave(self):
        self.line = self.line or find_line(traceback.extract_stack()) or "in scripted code"

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        marked = self.has((args, kwargs))
        result = operator(*args, **kwargs)
        if marked and result is None:  # in place on a list; other operators return what they write
            self.mark((args[:1], kwargs.get("out")))
        elif marked:
            self.mark(result)
            # item, equal, allclose ... return a number
            if not get_storages(result) or has_free_shape(operator, args):
                self.leave()
        return result


def get_storages(values):
    """The memory of tensors, which their views share; a sparse one stands for itself."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
    return [t.untyped_storage() if t.layout == torch.strided else t for t in tensors]


def has_free_shape(operator, args):
    """Whether the shape of the result depends on values; that of x[index] if it's a mask."""
    if operator is torch.ops.aten.index.Tensor:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return torch.Tag.dynamic_output_shape in operator.tags


@dataclass
class Readers(TorchFunctionMode):
    marks: Marks

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in READERS and self.marks.has((args, kwargs)):
            self.marks.leave()
        return function(*args, **kwargs)
