"""onnx_rewrites.py: what OpenCV's importer gets wrong, and that the rewritten graph is right."""

import hashlib
import time
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import conversion
from classification import read_zoo
from common import NetworksDisagree, Preprocessing, write_entry
from conversion import convert, export, rewrite
from locate import find_first_wrong, locate
from networks import Network, Request, load_network
from onnx_rewrites import make_readable
from verify import Reference, get_references, run_engine_apart, verify

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


def get_product():
    """A matrix for each channel: OpenCV doesn't repeat a constant for each picture."""
    matrices = constant("matrices", np.random.default_rng(6).standard_normal((3, 8, 4)))
    return [helper.make_node("MatMul", ["input", "matrices"], ["output"])], [matrices]


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
    "einsum with matrices": lambda: get_einsum_with("bhwc,hck->bhwk", 3, 8, 8),
    "matmul": get_product,
    "col2im": get_col2im,
    "gate": get_gate,
    "zeros": get_zeros,
    "tanh": get_tanh,
    "batch norm": get_batch_norm,
}


def make_model(nodes, constants, outputs, shape=("batch", 3, 8, 8), opset=17):
    """outputs: {name: shape}; shape: of the input."""
    tensors = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes)
        for name, sizes in {"input": shape, **outputs}.items()
    ]
    graph = helper.make_graph(nodes, "graph", tensors[:1], tensors[1:], constants)
    opset = helper.make_opsetid("", opset)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9)


def make_proto(fault):
    opset = 18 if fault == "col2im" else 17
    proto = make_model(*FAULTS[fault](), {"output": ["batch", 3, 8, 8]}, opset=opset)
    return onnx.shape_inference.infer_shapes(proto)


# the operators that a rewrite mends, or that OpenCV fuses with them
GUILTY = {
    "gelu": "Mul",
    "einsum": "Einsum",
    "einsum without transposition": "Einsum",
    "einsum over rows": "Einsum",
    "einsum over columns": "Einsum",
    "einsum with matrices": "Einsum",
    "matmul": "MatMul",
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
    line = locate(tmp_path / "graph.onnx", "new", [Reference("", x[None], None) for x in BLOB])
    assert line.startswith(GUILTY[fault]), line
    assert "\n" not in line


def test_a_file_that_opencv_runs_right(tmp_path):
    """The fault is the exporter's, or shows on other pictures."""
    proto = make_proto("tanh")
    make_readable(proto)
    onnx.save(proto, tmp_path / "graph.onnx")
    assert locate(tmp_path / "graph.onnx", "new").startswith("none: for these pictures OpenCV")


def test_what_is_not_searched(tmp_path, monkeypatch):
    """An exporter's broken graph, and what would take too much memory."""
    path = tmp_path / "graph.onnx"
    proto = make_proto("tanh")
    proto.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 100_000
    onnx.save(proto, path)
    assert locate(path, "new") == "unknown: onnx can't run the file: it is too large"
    proto.graph.node[1].input[0] = "missing"
    onnx.save(proto, path)
    line = locate(path, "new")
    assert line.startswith("unknown: onnx can't run the file") and "'missing'" in line


def test_the_search_ends_in_time(tmp_path, monkeypatch):
    """onnx takes minutes for a deformable convolution; OpenCV's process, a stand-in, doesn't end"""
    monkeypatch.setattr("locate.MAX_SECONDS", 1)
    shapes = {"weights": (3, 3, 3, 3), "offsets": (1, 18, 62, 62)}
    constants = [constant(name, np.ones(shape)) for name, shape in shapes.items()]
    node = helper.make_node("DeformConv", ["input", *shapes], ["output"])
    proto = make_model([node], constants, {"output": (1, 3, 62, 62)}, (1, 3, 64, 64), opset=19)
    onnx.save(proto, tmp_path / "graph.onnx")
    line = locate(tmp_path / "graph.onnx", "new")
    assert line == "unknown: the search was stopped after 1 s, in onnx"

    stand_in = tmp_path / "python"
    stand_in.write_text("#!/bin/sh\nexec sleep 600\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(stand_in))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    onnx.save(make_proto("tanh"), tmp_path / "graph.onnx")
    line = find_first_wrong(str(tmp_path / "graph.onnx"), "new", (), time.monotonic() + 1)
    assert line == "unknown: the search was stopped after 1 s, behind input"


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
    einsum = helper.make_node("Einsum", ["input", "input"], ["e"], equation="BCID,BCJD->BCIJ")
    taken = helper.make_node("Relu", ["input"], ["e_transposed"])
    outputs = dict.fromkeys(("output", "halved", "e", "e_transposed"), ["batch", 3, 8, 8])
    proto = make_model([*nodes, taken, einsum], constants, outputs)
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


def test_mobilenet_v3_from_the_new_exporter(tmp_path):
    """Silently wrong as it is exported, which is found out; right once it is rewritten."""
    network = load_network(Request("mobilenet_v3_small", "random")).model
    references = get_references(network, BLOB[:1].repeat(8, axis=2).repeat(8, axis=3))
    path = tmp_path / "mobilenet.onnx"
    export(network, path, (1, 3, 64, 64), dynamo=True)
    if cv2.__version__ == "5.0.0":
        engines, failures = verify(path, references)
        assert engines == [] and failures.keys() == {"new", "classic"}
        for reason in failures.values():
            assert reason.startswith("wrong on picture") and "relative error" in reason
    rewrite(path)
    assert "new" in verify(path, references)[0]


def make_network(model, weights="random"):
    preprocessing = Preprocessing(1, (0, 0, 0), (), False, False)
    return Network(Request("test", weights), weights, model, preprocessing)


def test_what_torchscript_cannot_export(tmp_path, monkeypatch):
    """Pooling to a size that doesn't divide its input, as AlexNet at 256x256: PyTorch's new
    exporter takes over."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    pool = [torch.nn.AdaptiveAvgPool2d(5), torch.nn.Flatten(), torch.nn.Linear(200, 10)]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), *pool).eval()
    blob = np.random.default_rng(3).standard_normal((1, 3, 26, 26)).astype(np.float32)
    path = convert(make_network(model), get_references(model, blob)).path
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    net = cv2.dnn.readNetFromONNX(str(path))
    net.setInput(blob)
    with torch.no_grad():
        expected = model(torch.from_numpy(blob)).numpy()
    assert np.allclose(net.forward(), expected, atol=1e-5)


def test_weights_over_two_gigabytes(tmp_path, monkeypatch, squeezenet):
    """A smaller limit stands in: the weights go to a file of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conversion, "MAX_ONNX_SIZE", 1_000_000)
    blob = np.random.default_rng(3).standard_normal((1, 3, 224, 224)).astype(np.float32)
    references = get_references(squeezenet, blob)
    converted = convert(make_network(squeezenet), references)
    path = converted.path
    data = path.with_name(f"{path.name}.data")
    assert {p.name for p in path.parent.iterdir()} == {path.name, data.name}
    assert path.stat().st_size < 200_000 < 4_000_000 < data.stat().st_size
    assert path.stat().st_mode == data.stat().st_mode
    hashes = [hashlib.sha1(file.read_bytes()).hexdigest() for file in (path, data)]
    assert [*converted.load_info.values()] == hashes
    net = cv2.dnn.readNetFromONNX(str(path))
    net.setInput(blob)
    with torch.no_grad():
        expected = squeezenet(torch.from_numpy(blob)).numpy()
    assert np.allclose(net.forward(), expected, atol=1e-4)

    monkeypatch.setattr(conversion, "MAX_ONNX_SIZE", 2**31)
    convert(make_network(squeezenet), references)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def save_mean(path, nodes, constants):
    """A file whose logits are each channel's mean of what the nodes make of the input."""
    pool = helper.make_node("GlobalAveragePool", ["output"], ["pooled"])
    flatten = helper.make_node("Flatten", ["pooled"], ["logits"])
    onnx.save(make_model([*nodes, pool, flatten], constants, {"logits": ["batch", 3]}), path)


@pytest.mark.skipif(cv2.__version__ != "5.0.0", reason="OpenCV 5.0.0's fault")
def test_a_file_that_crashes_opencv_is_one_line(tmp_path):
    path = tmp_path / "crash.onnx"
    save_mean(path, *get_gelu())
    engines, failures = verify(path, [Reference("picture", BLOB, BLOB.mean(axis=(2, 3)))])
    assert "new" not in engines and failures["new"] == "crashes (signal 11)"


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3))


def test_evidence_has_a_batch_of_three(tmp_path):
    """A file that answers two pictures at most isn't taken."""
    limits = [constant(f"limit_{i}", [i], np.int64) for i in (0, 2)]
    node = helper.make_node("Slice", ["input", "limit_0", "limit_2", "limit_0"], ["output"])
    path = tmp_path / "two.onnx"
    save_mean(path, [node], limits)
    references = get_references(Mean(), BLOB[:1])
    assert max(len(blob) for _, blob, _ in references) == 3
    engines, failures = verify(path, references)
    assert engines == [] and failures["new"] == "the shape is (2, 3), not (3, 3)"
    two = [Reference(name, blob[:2], logits[:2]) for name, blob, logits in references]
    assert "new" in verify(path, two)[0]


def test_a_failure_ends_with_one_sentence(tmp_path, monkeypatch, capsys):
    """Each engine's answer stands above it. OpenCV 5.0.0 can't run such an Einsum."""
    monkeypatch.chdir(tmp_path)

    class Gram(torch.nn.Module):
        def forward(self, x):
            return torch.einsum("bchw,bdhw->bcd", x, x).flatten(1)

    with pytest.raises(NetworksDisagree) as caught:
        convert(make_network(Gram()), get_references(Gram(), BLOB[:1]))
    sentence = str(caught.value)
    assert len(sentence) <= 300 and "\n" not in sentence and ">" not in sentence
    assert sentence.count("OpenCV") == sentence.count("first wrong node: Einsum") == 1
    said = capsys.readouterr().out
    for engine in ("new", "classic"):
        assert f"\nfirst wrong node, {engine} engine: Einsum" in said
    assert [*Path("models").iterdir()] == []


class TakesAnotherBranch(torch.nn.Module):
    """A linear network; for pictures for which `pick` is 1 instead of 0, one that is 10 % larger"""

    def __init__(self, pick):
        super().__init__()
        torch.manual_seed(1)
        self.linear = torch.nn.Linear(192, 5)
        self.pick = pick

    def forward(self, x):
        return self.linear(x.flatten(1)) * (1 + 0.1 * self.pick(x)[:, None])


def get_largest(x):
    return x.abs().amax(dim=(1, 2, 3))


def get_mean(x):
    return x.mean(dim=(1, 2, 3))


def is_grey(x):
    return (1 - 1e3 * get_largest(x[:, 1:] - x[:, :2])).clip(0) * get_largest(x).clip(0, 1)


# What a network takes for another branch; the reference that has such a picture, and which it is.
BRANCHES = [
    (lambda x: (-1 - get_mean(x)).clip(0, 1), "dark, bright, grey", 0),
    (lambda x: (get_mean(x) - 1).clip(0, 1) * (get_largest(x) < 9), "dark, bright, grey", 1),
    (is_grey, "dark, bright, grey", 2),
    (lambda x: (1 - get_largest(x)).clip(0), "noise, zeros", 2),
    (lambda x: (get_largest(x) - 100).clip(0, 1), "0 to 255", 0),
]


@pytest.mark.parametrize("pick, name, number", BRANCHES)
def test_evidence(tmp_path, pick, name, number):
    """A file that is wrong for one of the pictures only isn't taken."""
    blob = BLOB[:1].clip(-2, 2)
    right = TakesAnotherBranch(lambda x: 0 * get_largest(x)).eval()
    wrong = TakesAnotherBranch(pick).eval()
    references = get_references(right, blob)
    for reference in references:
        with torch.no_grad():
            error = (wrong(torch.from_numpy(reference.blob)).numpy() - reference.logits).max(axis=1)
        differ = np.flatnonzero(np.abs(error) > 1e-6).tolist()
        assert differ == ([number] if reference.name == name else [])
    path = tmp_path / "graph.onnx"
    export(right, path, blob.shape, dynamo=False)
    assert "new" in verify(path, references)[0]
    export(wrong, path, blob.shape, dynamo=False)
    engines, failures = verify(path, references)
    assert engines == [] and failures["new"].startswith(f"wrong on {name}: ")


def test_references():
    """What a dark copy, a grey one and the others are."""
    blob = BLOB[:1].clip(-2, 2)
    (_, picture, logits), (_, copies, _), (_, noise, _), (_, raw, _) = get_references(Mean(), blob)
    assert np.array_equal(picture, blob)
    assert np.allclose(logits, blob.mean(axis=(2, 3)), atol=1e-6)
    dark, bright, grey = copies
    assert [dark.mean(), bright.mean()] == pytest.approx([-1.5, 1.5], abs=0.1)
    assert dark.std() == bright.std() == pytest.approx(blob.std() / 4, rel=0.1)
    assert np.allclose(grey, blob[0].mean(axis=0), atol=1e-6)
    assert abs(noise[:2].mean()) < 0.2 and noise[:2].std() == pytest.approx(1, rel=0.1)
    assert not noise[2].any()
    assert [raw.min(), raw.max()] == pytest.approx([0, 255], rel=1e-5)


def test_no_evidence_hangs_on_rounding():
    """PyTorch's own answer to large values is noise: they prove nothing."""

    class Wave(torch.nn.Module):
        def forward(self, x):
            return torch.sin(3 * x.flatten(1))

    names = [name for name, _, _ in get_references(Wave(), BLOB[:1])]
    assert names == ["picture", "dark, bright, grey", "noise, zeros"]


def test_only_the_classic_engine_is_right(tmp_path, monkeypatch, capsys):
    """OpenCV's own programs take the new one: the last line says so, and the entry names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conversion, "verify", lambda *_: (["classic"], {}))
    network = make_network(Mean())
    converted = convert(network, [Reference("noise", BLOB[:1], BLOB[:1].mean(axis=(2, 3)))])
    assert "cv2.dnn.ENGINE_CLASSIC" in capsys.readouterr().out.splitlines()[-1]
    write_entry(converted, network.preprocessing, None, "")
    entry = read_zoo("models/models.yml")["test-random"]
    assert entry["engine"] == "classic" and entry["engines"] == ["classic"]
