"""Small networks of each kind that OpenCV gets wrong or is slow at: rewritten, and made faster.

PyTorch's answers to 20 inputs, in batches of several sizes, are those of one net in OpenCV.
"""

import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import read_onnx, run_torch
from onnx import helper, numpy_helper
from torch import nn

from classification import ENGINES
from conversion import export, rewrite
from onnx_folding import fold_constants, get_shapes, simplify
from onnx_speedups import speed_up
from verify import EACH_ENGINE, run_engine_apart

BATCHES = (1, 3, 2, 8, 6)
FAULTS = sorted((Path(__file__).parent / "opencv_faults").glob("*.py"))


class Net(nn.Module):
    """A strided convolution, and what a function makes of its output and of further layers."""

    def __init__(self, forward, *layers, channels=20):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.ReLU())
        self.layers, self.function = nn.ModuleList(layers), forward

    def forward(self, x):
        return self.function(self.stem(x), *self.layers).flatten(1)


class Plain(nn.Sequential):
    """Layers, and each channel's mean."""

    def forward(self, x):
        return super().forward(x).relu().mean((2, 3))


class SpatialGate(nn.Module):
    """CBAM's and triplet attention's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(pooled))


def triplet(x, first, second, third):
    first, second = first(x.transpose(1, 2)).transpose(1, 2), second(x.transpose(1, 3))
    return (first + second.transpose(1, 3) + third(x)).mean((2, 3))


def excite(x, down, up):
    """Squeeze and excitation."""
    pooled = F.adaptive_avg_pool2d(x, 1)
    return (up(down(pooled).relu()).sigmoid() * x).mean((2, 3))


def one_channel(function, *others):
    """A network with a function of a tensor and one of its channels, made by a convolution."""
    convs = nn.Conv2d(20, 1, 3, padding=1), *others
    return Net(lambda x, conv, *o: function(x, conv(x).sigmoid(), *o).mean((2, 3)), *convs)


def pool(*args, **options):
    return Net(lambda x, layer: layer(x), nn.AvgPool2d(*args, ceil_mode=True, **options))


def grouped(inputs, outputs, groups, kernel=1, **options):
    conv = nn.Conv2d(inputs, outputs, kernel, groups=groups, **options)
    return Net(lambda x, layer: layer(x).relu().mean((2, 3)), conv, channels=inputs)


def normed(activation):
    """A convolution, an activation, and a BatchNorm whose statistics aren't 0 and 1."""
    norm = nn.BatchNorm2d(24)
    norm.running_mean[:], norm.running_var[:] = torch.randn(24), torch.rand(24) + 0.5
    return Plain(nn.Conv2d(3, 24, 3), activation, norm)


NEW = ("new",)  # all that runs it
# name: a network, the input's height and width, the input's standard deviation, engines
WRONG = {
    "add": (lambda: one_channel(torch.add), (17, 24), 1, EACH_ENGINE),
    "reversed sub": (lambda: one_channel(lambda x, one: one - x), (17, 24), 1, EACH_ENGINE),
    "div": (lambda: one_channel(torch.div), (17, 24), 1, EACH_ENGINE),
    "max": (lambda: one_channel(torch.maximum), (17, 24), 1, EACH_ENGINE),
    "pow": (lambda: one_channel(torch.pow), (17, 24), 1, EACH_ENGINE),
    "where": (lambda: one_channel(lambda x, y: torch.where(x > y, x, y)), (17, 24), 1, EACH_ENGINE),
    "two factors": (lambda: one_channel(lambda x, one: x * one + one), (17, 24), 1, EACH_ENGINE),
    "one after a conv": (
        lambda: one_channel(lambda x, one, conv: conv(x) + one, nn.Conv2d(20, 24, 1)),
        (17, 24), 1, EACH_ENGINE,
    ),
    **{
        name: (
            lambda function=function: Net(
                lambda x, *convs: function(x, *convs).mean((2, 3)),
                nn.Conv2d(20, 20, 1), nn.Conv2d(20, 20, 1),
            ),
            (17, 24), 1, EACH_ENGINE,
        )
        for name, function in (
            ("residual of one pixel", lambda x, conv, _: x + conv(x.mean((2, 3), keepdim=True))),
            ("residuals of rows and columns",
             lambda x, a, b: a(x.mean(2, keepdim=True)) + b(x.mean(3, keepdim=True))),
            ("residual made first", lambda x, a, b: (lambda m: b(x) + m)(x.mean(2, keepdim=True))),
        )
    },
    "cbam": (lambda: Net(lambda x, g: g(x).mean((2, 3)), SpatialGate()), (22, 31), 1, EACH_ENGINE),
    "triplet": (lambda: Net(triplet, *(SpatialGate() for _ in range(3))), (22, 31), 1, EACH_ENGINE),
    "batch norm without statistics": (
        lambda: Net(lambda x, norm: norm(x).relu().mean((2, 3)),
                    nn.BatchNorm2d(20, track_running_stats=False)), (16, 16), 1, NEW,
    ),
    "batch norm after mish": (lambda: normed(nn.Mish()), (16, 16), 1, EACH_ENGINE),
    "scaled gelu": (lambda: Net(lambda x: 10 * F.gelu(x)), (16, 16), 1, EACH_ENGINE),
    "tanh gelu": (lambda: Net(lambda x: F.gelu(4 * x, approximate="tanh")), (16, 16), 1,
                  EACH_ENGINE),
    **{
        f"{name} over {axes}": (
            lambda name=name, axes=axes: Net(
                lambda x: (x * getattr(x, name)(axes, keepdim=True)).mean((2, 3))
            ),
            (16, 18), 1, EACH_ENGINE,
        )
        for name in ("mean", "sum", "amax")
        for axes in ((0, 2, 3), (0, 1, 3), (1, 2, 3))
    },
    "logsumexp": (lambda: Net(lambda x: torch.logsumexp(40 * x, (2, 3))), (16, 16), 5, EACH_ENGINE),
    "logsumexp of channels": (
        lambda: Net(lambda x: torch.logsumexp(-40 * x - 100, 1, keepdim=True)), (16, 16), 5,
        EACH_ENGINE,
    ),
    "softplus": (lambda: Net(lambda x: F.softplus(9 * (x - 5)).mean(3)), (16, 16), 20, EACH_ENGINE),
    "softplus of beta": (
        lambda: Net(lambda x: F.softplus(9 * (x - 5), beta=2.0).mean(3)), (16, 16), 20, EACH_ENGINE,
    ),
    "bilinear pooling": (
        lambda: Net(lambda x: torch.einsum("imjk,injk->imn", x, x)), (16, 18), 1, EACH_ENGINE,
    ),
    "einsum with weights": (
        lambda: Net(lambda x, w: torch.einsum("bchw,hwck->bk", x, w.weight.view(8, 9, 20, 5)),
                    nn.Linear(100, 72)), (16, 18), 1, EACH_ENGINE,
    ),
    "einsum with the batch second": (
        lambda: Net(lambda x, w: torch.einsum("kchw,bchw->bk", w.weight.view(5, 20, 8, 9), x),
                    nn.Linear(100, 72)), (16, 18), 1, EACH_ENGINE,
    ),
    "a large constant": (
        lambda: Net(lambda x: (x.flatten(2)[:, :, None] @ torch.linspace(-1, 1, 20 * 64 * 900)
                               .view(20, 64, 900).cos()).abs().mean(3)), (16, 16), 1, NEW,
    ),
    "exp and 2": (lambda: Net(lambda x: torch.log(2 + x.exp()).mean(3)), (16, 16), 1, EACH_ENGINE),
    "two exp": (lambda: Net(lambda x: torch.logaddexp(x, -x).mean(3)), (16, 16), 1, EACH_ENGINE),
    "log softmax": (lambda: Net(lambda x: F.log_softmax(60 * x, 1)), (16, 16), 5, EACH_ENGINE),
    "log softmax of rows": (
        lambda: Net(lambda x: F.log_softmax(60 * x, -1).mean(2)), (16, 16), 5, EACH_ENGINE,
    ),
    "mish": (lambda: Net(lambda x: F.mish(9 * (x - 5)).mean(3)), (16, 16), 20, EACH_ENGINE),
    "pool": (lambda: pool(2), (9, 21), 1, EACH_ENGINE),
    "pool of the whole": (lambda: pool(64), (32, 32), 1, EACH_ENGINE),
    "pool, stride, pads": (lambda: pool(3, 2, 1), (31, 24), 1, EACH_ENGINE),
    "pool without pads": (
        lambda: pool(5, 3, 2, count_include_pad=False), (33, 28), 1, EACH_ENGINE,
    ),
    "pool of rows": (lambda: pool((3, 2), (3, 1), (1, 0)), (27, 30), 1, EACH_ENGINE),
    "pool with gaps": (lambda: pool(2, 3), (17, 20), 1, EACH_ENGINE),
    "grouped 240 / 4": (lambda: grouped(240, 240, 4), (16, 16), 1, EACH_ENGINE),
    "grouped 464 / 8": (lambda: grouped(464, 464, 8), (16, 16), 1, EACH_ENGINE),
    "grouped 976 / 16": (lambda: grouped(976, 976, 16), (8, 8), 1, EACH_ENGINE),
    "grouped 240 -> 40": (lambda: grouped(240, 40, 4, bias=False), (16, 16), 1, EACH_ENGINE),
    "grouped 290 / 5": (lambda: grouped(290, 290, 5), (16, 16), 1, EACH_ENGINE),
}  # fmt: skip
SLOW = {
    "normalize": (
        lambda: Net(lambda x: F.normalize(x.flatten(2).transpose(1, 2), dim=-1).mean(1)),
        (16, 16), 1, NEW,  # the classic one keeps the first batch's size, as without it
    ),
    "normalize channels": (lambda: Net(lambda x: F.normalize(x)), (16, 16), 1, EACH_ENGINE),
    **{
        f"stem {kernel}, {stride}, {pads}": (
            lambda kernel=kernel, stride=stride, pads=pads: Plain(
                nn.Conv2d(3, 24, kernel, stride, pads)
            ),
            sizes, 1, EACH_ENGINE,
        )
        for kernel, stride, pads, sizes in (
            (7, 2, 3, (32, 32)), (7, 2, 3, (37, 45)), (16, 16, 0, (64, 48)), (4, 4, 0, (33, 38)),
            (11, 4, 2, (63, 63)), (7, 4, 3, (40, 40)), (7, (2, 4), (3, 1), (40, 41)),
            ((7, 3), 2, (3, 1), (31, 29)), (3, 4, 0, (30, 30)), (7, 3, 2, (50, 50)),
        )
    },
    "excitation": (
        lambda: Net(excite, nn.Conv2d(20, 8, 1), nn.Conv2d(8, 20, 1)), (37, 29), 1, EACH_ENGINE,
    ),
    "grouped 120 / 2": (lambda: grouped(120, 120, 2, 3, padding=1), (21, 26), 1, EACH_ENGINE),
    "grouped 96 / 2": (lambda: grouped(96, 96, 2, 3, padding=1), (21, 26), 1, EACH_ENGINE),
    "grouped 171 -> 96": (
        lambda: grouped(171, 96, 3, 3, padding=(1, 0), bias=False), (21, 26), 1, EACH_ENGINE,
    ),
    "grouped 112 -> 240": (lambda: grouped(112, 240, 2, 3), (21, 26), 1, EACH_ENGINE),
}  # fmt: skip
# from PyTorch's new exporter, in opset 18 or later: a reduction's axes are an input
NEW_EXPORTER = ["batch norm without statistics", "batch norm after mish", "tanh gelu", "two exp"]
BOTH_EXPORTERS = ["mean over (0, 2, 3)", "logsumexp", "log softmax", "scaled gelu", "normalize"]
CASES = [(name, name in NEW_EXPORTER) for name in WRONG | SLOW]
CASES += [(name, True) for name in BOTH_EXPORTERS]


@pytest.mark.parametrize("name, dynamo", CASES)
def test_small_network(tmp_path, name, dynamo):
    make, sizes, scale, engines = (WRONG | SLOW)[name]
    model, path = make().eval(), tmp_path / "net.onnx"
    generator = np.random.default_rng(1)
    blobs = [scale * generator.standard_normal((n, 3, *sizes), np.float32) for n in BATCHES]
    export(model, path, blobs[0].shape, dynamo)
    rewrite(path)
    faster = speed_up(onnx.load(path))
    assert faster or name in WRONG
    if faster:
        onnx.save(faster, tmp_path / "faster.onnx")
    for file in tmp_path.glob("*.onnx"):
        for engine in engines:
            forward = read_onnx(file, ENGINES[engine])
            for blob in blobs:
                expected, output = run_torch(model, blob), forward(blob)
                assert output.shape == expected.shape, (file, engine)
                assert np.abs(output - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.skipif(cv2.__version__ != "5.0.0", reason="OpenCV 5.0.0's faults")
@pytest.mark.parametrize("path", FAULTS, ids=lambda path: path.stem)
def test_opencv_has_the_fault(path):
    """If this fails, OpenCV has mended the fault: the rewrite or speed-up can go."""
    result = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert result.returncode, result.stdout
    assert re.search("^(AssertionError|cv2.error)", result.stderr, re.M) or result.returncode < 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [*range(4, 64, 4), *range(57, 72), 87, 100, 116])
def test_grouped_1x1(tmp_path, width):
    """In a process of its own: what is wrong writes past its memory."""
    path, groups = tmp_path / "net.onnx", 4
    model = grouped(width * groups, width * groups, groups).eval()
    blobs = [
        np.random.default_rng(width).standard_normal((n, 3, 32, 32), np.float32) for n in (2, 1)
    ]
    export(model, path, blobs[0].shape, False)
    rewrite(path)
    outputs, _ = run_engine_apart(path, "new", blobs)
    for blob, output in zip(blobs, outputs, strict=True):
        assert np.allclose(output, run_torch(model, blob), atol=1e-5)


def make_proto(nodes, outputs, **constants):
    graph = onnx.parser.parse_graph(f"g (float[b, 3, 8, 8] x) => (float[] {outputs}) {{ {nodes} }}")
    graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in constants.items())
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_folding():
    """Sizes and what depends on them are constants; the batch isn't, nor what depends on it."""
    nodes = """
        shape = Shape(x) one = Constant <value_int = 1> () zero = Constant <value_int = 0> ()
        channels = Gather(shape, one) batch = Gather(shape, zero) ten = Add(channels, seven)
        axes = Constant <value = int64[1] {0}> ()
        wide = Unsqueeze(ten, axes) filled = ConstantOfShape(wide) sum = ReduceSum(filled)
        minus = Unsqueeze(batch, axes) rest = Constant <value = int64[2] {3, 64}> ()
        sizes = Concat <axis = 0> (minus, rest) flat = Reshape(x, sizes)
        many = Cast <to = 1> (batch) product = Mul(flat, many) total = Add(product, sum)
        couple = Constant <value_int = 2> () pairs = Div(batch, couple)
        half = Cast <to = 1> (pairs) y = Add(total, half)
    """
    proto = make_proto(nodes, "y", seven=np.int64(7))
    x = np.random.default_rng(0).standard_normal((5, 3, 8, 8), np.float32)
    before = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})[0]
    fold_constants(proto)
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds == ["Shape", "Gather", "Reshape", "Cast", "Mul", "Add", "Div", "Cast", "Add"]
    assert np.array_equal(onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})[0], before)
    assert get_shapes(proto)["product"] == (None, 3, 64)
    assert {t.name for t in proto.graph.initializer} <= {
        n for o in proto.graph.node for n in o.input
    }


def test_gemm():
    """Its weights are transposed in the file, for one Gemm of two that share them."""
    nodes = """
        flat = Flatten(x) a = Gemm <transB = 1, alpha = 0.5> (flat, weights, bias)
        y = Gemm(a, weights)
    """
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((192, 192), np.float32)
    proto = make_proto(nodes, "y", weights=weights, bias=weights[0])
    x = generator.standard_normal((5, 3, 8, 8), np.float32)
    fold_constants(proto)
    found = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})[0]
    assert np.allclose(found, (x.reshape(5, -1) @ weights.T / 2 + weights[0]) @ weights, atol=1e-3)
    kept = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert np.array_equal(kept[proto.graph.node[1].input[1]], weights.T)
    assert np.array_equal(kept[proto.graph.node[2].input[1]], weights)


def test_simplify():
    """Equal constants become one, but not equal weights; a Transpose that moves nothing goes."""
    nodes = """
        a = Reshape(x, one) same = Transpose <perm = [0, 1, 2]> (a) b = Mul(same, weights)
        c = Add(b, others) two = Constant <value = int64[3] {0, 3, 64}> ()
        d = Reshape(c, two) y = Transpose <perm = [0, 2, 1]> (d)
    """
    sizes, weights = np.array([0, 3, 64]), np.ones(64, np.float32)
    proto = make_proto(nodes, "y", one=sizes, weights=weights, others=weights)
    x = np.random.default_rng(0).standard_normal((5, 3, 8, 8), np.float32)
    before = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})[0]
    simplify(proto.graph)
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds == ["Reshape", "Mul", "Add", "Reshape", "Transpose"]
    assert [t.name for t in proto.graph.initializer] == ["one", "weights", "others"]
    assert np.array_equal(onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})[0], before)


def test_names():
    """A faster graph has short names, those of input and output stay; so do the nodes' names."""
    nodes = "mean = ReduceL2 <axes = [1]> (x) long_name = Mul(x, mean) y = Add(long_name, weights)"
    proto = make_proto(nodes, "y", weights=np.ones(8, np.float32))
    proto.graph.node[2].name = "/block.0/Add"
    x = np.random.default_rng(0).standard_normal((5, 3, 8, 8), np.float32)
    before = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})[0]
    faster = speed_up(proto)
    names = {name for node in faster.graph.node for name in (*node.input, *node.output)}
    assert names > {"x", "y"} and max(map(len, names)) <= 2
    assert faster.graph.node[-1].name == "/block.0/Add"
    after = onnx.reference.ReferenceEvaluator(faster).run(None, {"x": x})[0]
    assert np.allclose(after, before, rtol=1e-6)


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Relu(x)",
        # SiLU within squeeze and excitation: neither factor is repeated
        "mean = GlobalAveragePool(x) gate = Sigmoid(mean) y = Mul(mean, gate)",
    ],
)
def test_what_has_no_speed_up(nodes):
    assert speed_up(make_proto(nodes, "y")) is None


def test_without_speed_ups(tmp_path, monkeypatch, capsys):
    """A faster graph that is wrong isn't taken: the file is the plain one, and a line says so."""
    import conversion

    model, path = Plain(nn.Conv2d(3, 8, 7, 2, 3)).eval(), tmp_path / "net.onnx"
    export(model, path, (1, 3, 32, 32), False)
    rewrite(path)
    before = path.read_bytes()
    verified = []

    def verify(file, references):
        verified.append(Path(file).read_bytes())
        return ([], {"new": "wrong"}) if len(verified) == 1 else (["new"], {})

    monkeypatch.setattr(conversion, "verify", verify)
    assert conversion.choose_graph(path, []) == ["new"]
    assert verified[0] != verified[1] == before == path.read_bytes()
    assert "without speed-ups" in capsys.readouterr().out
