"""onnx_rewrites.py: what OpenCV's importer gets wrong, and that the rewritten graph is right."""

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import common
import conversion
from common import NetworksDisagree, Preprocessing
from conversion import (
    convert,
    export_by_dynamo,
    export_by_torchscript,
    read_metadata,
    rewrite,
)
from networks import Network, Weights, load_network
from onnx_rewrites import make_readable
from verify import Reference, get_references, locate, measure_rounding, run_engine_apart, verify

BLOB = np.random.default_rng(2).standard_normal((2, 3, 8, 8)).astype(np.float32)


def constant(name, value, dtype=np.float32):
    return numpy_helper.from_array(np.array(value, dtype), name)


def get_gelu():
    nodes = [
        helper.make_node("Div", ["input", "root"], ["scaled"]),
        helper.make_node("Erf", ["scaled"], ["erf"]),
        helper.make_node("Add", ["erf", "one"], ["plus"]),
        helper.make_node("Mul", ["half", "plus"], ["halved"]),
        helper.make_node("Mul", ["input", "halved"], ["output"]),
    ]
    return nodes, [constant("root", 2**0.5), constant("one", 1), constant("half", 0.5)]


def get_einsum(equation="B C I D, B C J D -> B C I J"):
    return [helper.make_node("Einsum", ["input", "input"], ["output"], equation=equation)], []


def get_einsum_with(equation, *sizes):
    """MViTv2's relative positions: OpenCV's Einsum can't broadcast."""
    positions = constant("positions", np.random.default_rng(5).standard_normal(sizes))
    node = helper.make_node("Einsum", ["input", "positions"], ["output"], equation=equation)
    return [node], [positions]


def get_col2im():
    """VOLO's fold: (batch, 3 channels of 4x4 blocks, 2x2 of them) to (batch, 3, 7, 6)."""
    nodes = [
        helper.make_node("Reshape", ["input", "blocks"], ["columns"]),
        helper.make_node("Col2Im", ["columns", "image", "block"], ["output"], strides=[2, 2]),
    ]
    values = {"blocks": [0, 48, 4], "image": [7, 6], "block": [4, 4]}
    return nodes, [constant(name, value, np.int64) for name, value in values.items()]


def get_gate():
    """Squeeze-and-excitation: input * HardSigmoid(mean(input)), as PyTorch's new exporter has it"""
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["mean"]),
        helper.make_node("HardSigmoid", ["mean"], ["gate"], alpha=1 / 6, beta=0.5),
        helper.make_node("Mul", ["gate", "input"], ["output"]),
    ]
    return nodes, []


def get_zeros():
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Add", ["input", "zeros"], ["output"]),
    ]
    return nodes, [constant("shape", [8, 8], np.int64)]


def get_tanh():
    nodes = [
        helper.make_node("Mul", ["input", "hundred"], ["large"]),
        helper.make_node("Tanh", ["large"], ["output"]),
    ]
    return nodes, [constant("hundred", 100)]


def get_batch_norm():
    """Conv, SiLU, BatchNormalization: ConvMixer and XCiT have such."""
    generator = np.random.default_rng(4)
    values = {"gamma": 1, "beta": 0, "mean": 0, "variance": 3}
    constants = [
        constant(name, value + generator.uniform(0.2, 1, 3)) for name, value in values.items()
    ]
    constants.append(constant("weight", generator.standard_normal((3, 3, 1, 1))))
    nodes = [
        helper.make_node("Conv", ["input", "weight"], ["conv"]),
        helper.make_node("Sigmoid", ["conv"], ["sigmoid"]),
        helper.make_node("Mul", ["conv", "sigmoid"], ["silu"]),
        helper.make_node("BatchNormalization", ["silu", *values], ["output"], epsilon=1e-3),
    ]
    return nodes, constants


FAULTS = {
    "gelu": get_gelu,
    "einsum": get_einsum,
    "einsum without transposition": lambda: get_einsum("B C I J, B C J D -> B C I D"),
    "einsum over rows": lambda: get_einsum_with("bhwc,hkc->bhwk", 3, 8, 8),
    "einsum over columns": lambda: get_einsum_with("bhwc,wkc->bhwk", 8, 8, 8),
    "col2im": get_col2im,
    "gate": get_gate,
    "zeros": get_zeros,
    "tanh": get_tanh,
    "batch norm": get_batch_norm,
}


def make_proto(fault):
    nodes, constants = FAULTS[fault]()
    shape = ["batch", 3, 8, 8]
    tensors = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name in ("input", "output")
    ]
    graph = helper.make_graph(nodes, "graph", tensors[:1], tensors[1:], constants)
    opset = helper.make_opsetid("", 18 if fault == "col2im" else 17)
    proto = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    return onnx.shape_inference.infer_shapes(proto)


# the operators that a rewrite mends, or that OpenCV fuses with them
GUILTY = {
    "gelu": "Mul",
    "einsum": "Einsum",
    "einsum without transposition": "Einsum",
    "einsum over rows": "Einsum",
    "einsum over columns": "Einsum",
    "col2im": "Col2Im",
    "gate": "Mul output, after HardSigmoid",
    "zeros": "Add output, after ConstantOfShape",
    "tanh": "Tanh",
    "batch norm": "BatchNormalization output, after Mul",
}


@pytest.mark.skipif(cv2.__version__ != "5.0.0", reason="OpenCV 5.0.0's faults")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_wrong_node_is_located(tmp_path, fault):
    """Behind it a layer that is right, as in a network."""
    proto = make_proto(fault)
    proto.graph.node.append(helper.make_node("Relu", ["output"], ["relu"]))
    proto.graph.output[0].name = "relu"
    onnx.save(proto, tmp_path / "graph.onnx")
    expected = ReferenceEvaluator(proto).run(None, {"input": BLOB})[0]
    line = locate(tmp_path / "graph.onnx", "new", [Reference("noise", BLOB, expected)])
    assert line.startswith(GUILTY[fault]), line
    assert "\n" not in line
    line = locate(tmp_path / "graph.onnx", "new", [Reference("noise", BLOB, 1.1 * expected)])
    assert "exported file itself departs from PyTorch" in line


def test_what_is_not_searched(tmp_path, monkeypatch):
    """An exporter's broken graph, and what would take too much memory."""
    path = tmp_path / "graph.onnx"
    proto = make_proto("tanh")
    onnx.save(proto, path)
    monkeypatch.setattr("verify.MAX_LOCATED_PIXELS", 63)
    references = [Reference("noise", BLOB, BLOB.reshape(2, -1))]
    assert locate(path, "new", references) == "unknown: too large to search"
    proto.graph.node[1].input[0] = "missing"
    onnx.save(proto, path)
    line = locate(path, "new", references)
    assert line.startswith("none: the exported file isn't valid ONNX") and "missing" in line


@pytest.mark.parametrize("fault", FAULTS)
def test_rewrite(tmp_path, fault):
    proto = make_proto(fault)
    expected = ReferenceEvaluator(proto).run(None, {"input": BLOB})[0]
    assert np.ptp(expected) > 1

    def is_right(proto):
        path = tmp_path / "graph.onnx"
        onnx.save(proto, path)
        try:
            (output, *_), _ = run_engine_apart(str(path), "new", [BLOB, BLOB[:1]])
        except NetworksDisagree:
            return False
        return output.shape == expected.shape and np.allclose(output, expected, atol=1e-5)

    if cv2.__version__ == "5.0.0":  # in a version where this fails, the rewrite can go
        assert not is_right(proto)
    make_readable(proto)
    if fault != "col2im":  # onnx 1.23's evaluator can't run a ConvTranspose with groups
        rewritten = ReferenceEvaluator(proto).run(None, {"input": BLOB})[0]
        assert np.allclose(rewritten, expected, atol=1e-5)
    assert is_right(proto)


def test_what_else_is_used_stays():
    """The factor 0.5 and the sum of GELU are outputs of their own; a name is taken already."""
    nodes, constants = get_gelu()
    value = helper.make_tensor_value_info
    outputs = [value(n, onnx.TensorProto.FLOAT, ["b", 3, 8, 8]) for n in ("output", "halved")]
    einsum = helper.make_node("Einsum", ["input", "input"], ["e"], equation="BCID,BCJD->BCIJ")
    taken = helper.make_node("Relu", ["input"], ["e_transposed"])
    outputs += [value(n, onnx.TensorProto.FLOAT, ["b", 3, 8, 8]) for n in ("e", "e_transposed")]
    inputs = [value("input", onnx.TensorProto.FLOAT, ["b", 3, 8, 8])]
    graph = helper.make_graph([*nodes, taken, einsum], "graph", inputs, outputs, constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    expected = ReferenceEvaluator(proto).run(None, {"input": BLOB})
    make_readable(proto)
    found = ReferenceEvaluator(proto).run(None, {"input": BLOB})
    for a, b in zip(expected, found, strict=True):
        assert np.allclose(a, b, atol=1e-5)


def test_what_needs_no_rewrite_stays(model):
    proto = onnx.load(model)
    before = proto.SerializeToString(deterministic=True)
    make_readable(proto)
    assert proto.SerializeToString(deterministic=True) == before


def test_mobilenet_v3_from_the_new_exporter(tmp_path, monkeypatch):
    """Silently wrong as it is exported, which is found out; right once it is rewritten."""
    monkeypatch.setattr("verify.locate", lambda *_: "unknown")  # it takes seconds
    network = load_network("mobilenet_v3_small", Weights("random", "random")).model
    references = get_references(network, BLOB[:1].repeat(8, axis=2).repeat(8, axis=3))
    path = tmp_path / "mobilenet.onnx"
    export_by_dynamo(network, path, (1, 3, 64, 64))
    if cv2.__version__ == "5.0.0":
        with pytest.raises(NetworksDisagree) as caught:
            verify(path, references)
        for words in ("new engine: wrong on picture", "classic engine: wrong", "relative error"):
            assert words in str(caught.value)
    rewrite(path)
    assert "new" in verify(path, references)


def make_network(model, weights="random"):
    return Network("test", Weights("random", weights), Preprocessing(), model)


def test_what_torchscript_cannot_export(tmp_path):
    """Pooling to a size that doesn't divide its input, as AlexNet at 256x256: PyTorch's new
    exporter takes over."""
    torch.manual_seed(1)
    pool = [torch.nn.AdaptiveAvgPool2d(5), torch.nn.Flatten(), torch.nn.Linear(200, 10)]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), *pool).eval()
    blob = np.random.default_rng(3).standard_normal((1, 3, 26, 26)).astype(np.float32)
    path = tmp_path / "pooling.onnx"
    convert(make_network(model), path, get_references(model, blob))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    net = cv2.dnn.readNetFromONNX(str(path))
    net.setInput(blob)
    with torch.no_grad():
        expected = model(torch.from_numpy(blob)).numpy()
    assert np.allclose(net.forward(), expected, atol=1e-5)


def test_weights_over_two_gigabytes(tmp_path, monkeypatch, squeezenet):
    """A smaller limit stands in: the weights go to a file of their own."""
    monkeypatch.setattr(conversion, "MAX_ONNX_SIZE", 1_000_000)
    blob = np.random.default_rng(3).standard_normal((1, 3, 224, 224)).astype(np.float32)
    path = tmp_path / "models" / "squeezenet.onnx"
    references = get_references(squeezenet, blob)
    convert(make_network(squeezenet), path, references)
    data = path.with_name("squeezenet.onnx.data")
    assert {p.name for p in path.parent.iterdir()} == {path.name, data.name}
    assert path.stat().st_size < 200_000 < 4_000_000 < data.stat().st_size
    assert path.stat().st_mode == data.stat().st_mode
    assert read_metadata(path)["weights"] == "random"
    net = cv2.dnn.readNetFromONNX(str(path))
    net.setInput(blob)
    with torch.no_grad():
        expected = squeezenet(torch.from_numpy(blob)).numpy()
    assert np.allclose(net.forward(), expected, atol=1e-4)

    monkeypatch.setattr(conversion, "MAX_ONNX_SIZE", 2**31)
    convert(make_network(squeezenet, "other weights"), path, references)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_that_crashes_opencv_is_one_line(tmp_path):
    nodes, constants = get_gelu()
    nodes.append(helper.make_node("GlobalAveragePool", ["output"], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["logits"]))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("input", onnx.TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [value("logits", onnx.TensorProto.FLOAT, ["batch", 3])],
        constants,
    )
    path = tmp_path / "crash.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    references = [Reference("the picture", BLOB, BLOB.mean(axis=(2, 3)))]
    with pytest.raises(NetworksDisagree) as caught:
        verify(str(path), references)
    if cv2.__version__ == "5.0.0":
        assert "new engine: crashes (signal 11)" in str(caught.value)
    assert "\n" not in str(caught.value)


class Cancels(torch.nn.Module):
    """1e6 is added and taken away: float32 keeps a few digits of the values, float64 all."""

    def forward(self, x):
        return (x.flatten(1) + 1e6) - 1e6


class AddsToDarkPictures(torch.nn.Module):
    """A linear network; another one for pictures whose mean is below -1."""

    def __init__(self, amount):
        super().__init__()
        self.amount = amount
        torch.manual_seed(1)
        self.linear = torch.nn.Linear(192, 5)

    def forward(self, x):
        logits = self.linear(x.flatten(1))
        dark = torch.relu(-1 - x.mean(dim=(1, 2, 3)))
        return logits + self.amount * dark[:, None] * logits.abs()


def test_evidence_has_a_dark_and_a_bright_copy(tmp_path):
    """A file that is wrong for dark pictures only isn't taken."""
    blob = BLOB[:1].clip(-2, 2)
    right, wrong = AddsToDarkPictures(0.5).eval(), AddsToDarkPictures(0.6).eval()
    references = get_references(right, blob)
    (_, picture, _), (name, copies, logits), (_, noise, _) = references
    assert np.array_equal(picture, blob)
    assert copies.mean(axis=(1, 2, 3)) == pytest.approx([-1.5, 1.5], abs=0.1)
    assert copies.std() > 1 and copies[0].std() == pytest.approx(blob.std() / 4, rel=0.1)
    assert len(noise) == 2 and abs(noise.mean()) < 0.2
    path = tmp_path / "dark.onnx"
    export_by_torchscript(right, path, blob.shape)
    verify(path, references)
    export_by_torchscript(wrong, path, blob.shape)
    with pytest.raises(NetworksDisagree, match=f"wrong on {name}"):
        verify(path, references)


def test_how_far_float32_is_from_float64(tmp_path, monkeypatch):
    blob = BLOB[:1]
    expected = blob.reshape(1, -1)
    rounded = (expected + np.float32(1e6)) - np.float32(1e6)
    error = np.abs(rounded - expected).max() / np.abs(expected).max()
    assert error > 1e-3
    references = [Reference("noise", blob, rounded)]
    assert measure_rounding(Cancels(), references) == pytest.approx(error, rel=1e-4)

    def disagree(*_):
        raise NetworksDisagree("wrong")

    monkeypatch.setattr(conversion, "verify", disagree)
    network = Network("cancels", Weights("own", "cancels"), Preprocessing(), Cancels())
    with pytest.raises(NetworksDisagree, match=f"float32 and float64 differ by {error:.1e}"):
        convert(network, tmp_path / "cancels.onnx", references)


def test_only_the_classic_engine_is_right(tmp_path, monkeypatch, capsys):
    """OpenCV's own programs take the new one: the last line and the entry say so."""
    monkeypatch.setattr(conversion, "verify", lambda *_: ["classic"])
    network = Network("cancels", Weights("own", "cancels"), Preprocessing(), Cancels())
    path = tmp_path / "cancels.onnx"
    converted = convert(network, path, [Reference("noise", BLOB[:1], BLOB[:1].reshape(1, -1))])
    said = "engine=cv2.dnn.ENGINE_CLASSIC" in capsys.readouterr().out
    common.add_to_zoo("cancels", converted, Preprocessing(), None)
    entry = (tmp_path / "models.yml").read_text()
    in_entry = "ENGINE_CLASSIC only" in entry
    assert said == in_entry == ("new" in common.available(common.ENGINES))
    assert common.read_zoo(tmp_path / "models.yml")["cancels"]["engine"] == "classic"
