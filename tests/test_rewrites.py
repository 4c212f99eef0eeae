"""onnx_rewrites.py: what OpenCV's importer gets wrong, and that the rewritten graph is right."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from conftest import read_onnx, run_torch, slow
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torchvision.ops import SqueezeExcitation

import conversion
from classification import ENGINES, RequestError, read_zoo
from common import NetworksDisagree, Preprocessing
from conversion import convert, export, rewrite
from entries import write_entry
from locate import locate
from networks import Network, Request
from onnx_rewrites import make_readable
from verify import EACH_ENGINE, Reference, get_references, run_engine_apart, verify

BLOB = np.random.default_rng(2).standard_normal((2, 3, 8, 8)).astype(np.float32)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


CONSTANTS = {
    "root": 2**0.5, "half": 0.5, "one": 1.0, "hundred": 100.0, "zero": [0], "two": [2],
    "rows": draw(5, 3, 8, 8), "columns": draw(5, 8, 8, 8), "matrices": draw(6, 3, 8, 4),
    "blocks": [0, 48, 4], "image": [7, 6], "block": [4, 4], "square": [8, 8],
    "weight": draw(4, 3, 3, 1, 1), "gamma": [1.9, 1.3, 1.6], "beta": [0.4, 0.9, 0.2],
    "mean": [0.7, 0.3, 0.5], "variance": [3.2, 3.9, 3.5],
    "kernels": np.ones((3, 3, 3, 3)), "offsets": np.ones((1, 18, 62, 62)),
    "grid": np.zeros((1, 512, 512, 2)),
}  # fmt: skip
GELU = """
    scaled = Div(input, root)
    erf = Erf(scaled)
    plus = Add(erf, one)
    halved = Mul(half, plus)
    output = Mul(input, halved)
"""
GATE = """
    pooled = GlobalAveragePool(input)
    gate = HardSigmoid <alpha = 0.16666667, beta = 0.5> (pooled)
    output = Mul(gate, input)
"""
FOLD = """
    flat = Reshape(input, blocks)
    output = Col2Im <strides = [2, 2]> (flat, image, block)
"""
BATCH_NORM = """
    conv = Conv(input, weight)
    sigmoid = Sigmoid(conv)
    silu = Mul(conv, sigmoid)
    output = BatchNormalization <epsilon = 0.001> (silu, gamma, beta, mean, variance)
"""
EINSUM = 'output = Einsum <equation = "{}"> (input, {})'

# What OpenCV gets wrong, in onnx's text format, and the operator that a rewrite mends, or that
# OpenCV fuses with it.
FAULTS = {
    "gelu": (GELU, "Mul"),
    "gelu halved behind": (
        GELU.replace("half, plus", "plus, half").replace("input, halved", "halved, input"),
        "Mul",
    ),
    "einsum": (EINSUM.format("B C I D, B C J D -> B C I J", "input"), "Einsum"),
    "einsum without transposition": (
        EINSUM.format("B C I J, B C J D -> B C I D", "input"),
        "Einsum",
    ),
    # MViTv2's relative positions: OpenCV's Einsum can't broadcast
    "einsum over rows": (EINSUM.format("bhwc,hkc->bhwk", "rows"), "Einsum"),
    "einsum over columns": (EINSUM.format("bhwc,wkc->bhwk", "columns"), "Einsum"),
    "einsum with matrices": (EINSUM.format("bhwc,hck->bhwk", "rows"), "Einsum"),
    # a matrix for each channel: OpenCV doesn't repeat a constant for each picture
    "matmul": ("output = MatMul(input, matrices)", "MatMul"),
    # VOLO's fold: (batch, 3 channels of 4x4 blocks, 2x2 of them) to (batch, 3, 7, 6)
    "col2im": (FOLD, "Col2Im"),
    # squeeze-and-excitation as PyTorch's new exporter has it: input * HardSigmoid(mean(input))
    "gate": (GATE, "Mul output, after HardSigmoid"),
    "zeros": (
        "zeros = ConstantOfShape(square) output = Add(input, zeros)",
        "Add output, after ConstantOfShape",
    ),
    "tanh": ("large = Mul(input, hundred) output = Tanh(large)", "Tanh"),
    # Conv, SiLU, BatchNormalization: ConvMixer and XCiT have such
    "batch norm": (BATCH_NORM, "BatchNormalization output, after Mul"),
}
# one that crashes OpenCV, one that it can't run, one that is wrong behind another node
LOCATED = ["gelu", "einsum", "zeros"]


def make_model(nodes, outputs, shape="batch, 3, 8, 8", opset=17):
    """nodes: in onnx's text format; outputs: {name: shape}; shape: of the input."""
    outputs = ", ".join(f"float[{sizes}] {name}" for name, sizes in outputs.items())
    graph = onnx.parser.parse_graph(f"graph (float[{shape}] input) => ({outputs}) {{ {nodes} }}")
    for name in CONSTANTS.keys() & {name for node in graph.node for name in node.input}:
        array = np.array(CONSTANTS[name])
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        graph.initializer.append(numpy_helper.from_array(array, name))
    opset = helper.make_opsetid("", opset)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9)


def make_proto(fault):
    opset = 18 if fault == "col2im" else 17
    proto = make_model(FAULTS[fault][0], {"output": "batch, 3, 8, 8"}, opset=opset)
    return onnx.shape_inference.infer_shapes(proto)


@pytest.mark.skipif(cv2.__version__ != "5.0.0", reason="OpenCV 5.0.0's faults")
@pytest.mark.parametrize("fault", [f if f in LOCATED else slow(f) for f in FAULTS])
def test_the_first_wrong_node_is_located(tmp_path, fault):
    """Behind it a layer that is right, as in a network."""
    proto = make_proto(fault)
    proto.graph.node.append(helper.make_node("Relu", ["output"], ["relu"]))
    proto.graph.output[0].name = "relu"
    onnx.save(proto, tmp_path / "graph.onnx")
    line = locate(tmp_path / "graph.onnx", "new", [Reference("", x[None], None) for x in BLOB])
    assert line.startswith(FAULTS[fault][1]), line
    assert "\n" not in line


def test_files_without_a_wrong_node(tmp_path):
    """The fault shows on other pictures; searching takes too much memory; the graph is broken."""
    path = tmp_path / "graph.onnx"
    proto = make_proto("tanh")
    proto.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 100_000
    onnx.save(proto, path)
    assert locate(path, "new") == "unknown: onnx can't run the file: it is too large"
    proto.graph.node[1].input[0] = "missing"
    onnx.save(proto, path)
    line = locate(path, "new")
    assert line.startswith("unknown: onnx can't run the file") and "'missing'" in line
    proto = make_proto("tanh")
    make_readable(proto)
    onnx.save(proto, path)
    assert locate(path, "new").startswith("none: for these pictures OpenCV")


@pytest.mark.parametrize("engine", EACH_ENGINE)
def test_a_node_that_opencv_cannot_read_is_found_without_its_values(tmp_path, engine):
    """onnx would take minutes for them."""
    node = "output = DeformConv(input, kernels, offsets)"
    proto = make_model(node, {"output": "1, 3, 62, 62"}, "1, 3, 64, 64", opset=19)
    onnx.save(proto, tmp_path / "graph.onnx")
    assert locate(tmp_path / "graph.onnx", engine).startswith("DeformConv")


def test_a_working_network_does_not_wait_for_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "verify", lambda *_: (["new"], {"classic": "crashes"}))
    monkeypatch.setattr(conversion, "locate", None)
    onnx.save(make_proto("tanh"), tmp_path / "graph.onnx")
    assert conversion.choose_graph(tmp_path / "graph.onnx", []) == ["new"]


def test_the_failure_that_names_a_node_is_quoted(monkeypatch, capsys):
    """Whichever engine's or exporter's it is."""
    failures = dict.fromkeys(("new", "classic"), "crashes (signal 8)")
    named = failures | {"classic": "can't read the file: GatherND not supported"}
    verified = iter([failures, named])
    vague = ["unknown: in onnx", "none: for these"]
    located = iter([*vague, vague[0], "GatherND not supported"])
    monkeypatch.setattr(conversion, "export", lambda *args: export(*args[:-1], dynamo=False))
    monkeypatch.setattr(conversion, "verify", lambda *_: ([], next(verified)))
    monkeypatch.setattr(conversion, "locate", lambda *_: next(located))
    with pytest.raises(NetworksDisagree, match="classic engine: can't read the file: GatherND"):
        convert(make_network(Mean()), get_references(Mean(), BLOB[:1]))
    assert "crashes (signal 8); first wrong node: unknown\n" in capsys.readouterr().out


@pytest.mark.slow
def test_the_search_ends_in_time(tmp_path, monkeypatch):
    """onnx takes minutes to sample a grid."""
    monkeypatch.setattr("locate.MAX_SECONDS", 1)
    proto = make_model(
        "output = GridSample(input, grid)", {"output": "1, 3, 512, 512"}, "1, 3, 8, 8"
    )
    onnx.save(proto, tmp_path / "graph.onnx")
    line = locate(tmp_path / "graph.onnx", "new")
    assert line == "unknown: the search was stopped after 1 s"


def evaluate(proto):
    return ReferenceEvaluator(proto).run(None, {"input": BLOB})[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_rewrite(tmp_path, fault):
    proto = make_proto(fault)
    expected = evaluate(proto)
    assert np.ptp(expected) > 1
    make_readable(proto)
    if fault != "col2im":  # onnx 1.23's evaluator can't run a ConvTranspose with groups
        assert np.allclose(evaluate(proto), expected, atol=1e-5)
    onnx.save(proto, tmp_path / "graph.onnx")
    forward = read_onnx(tmp_path / "graph.onnx", ENGINES["new"])
    for blob in (BLOB, BLOB[:1]):
        output, right = forward(blob), expected[: len(blob)]
        assert output.shape == right.shape and np.allclose(output, right, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(cv2.__version__ != "5.0.0", reason="OpenCV 5.0.0's faults")
@pytest.mark.parametrize("fault", FAULTS)
def test_opencv_needs_the_rewrite(tmp_path, fault):
    """If this fails, the rewrite can go."""
    proto = make_proto(fault)
    onnx.save(proto, tmp_path / "graph.onnx")
    try:
        (output, *_), _ = run_engine_apart(tmp_path / "graph.onnx", "new", [BLOB, BLOB[:1]])
    except NetworksDisagree:
        return
    expected = evaluate(proto)
    assert output.shape != expected.shape or not np.allclose(output, expected, atol=1e-5)


def test_what_else_is_used_stays():
    """The factor 0.5 and the sum of GELU are outputs of their own; a name is taken already."""
    einsum = 'e = Einsum <equation = "BCID,BCJD->BCIJ"> (input, input)'
    nodes = f"{GELU} e_transposed = Relu(input) {einsum}"
    outputs = dict.fromkeys(("output", "halved", "e", "e_transposed"), "batch, 3, 8, 8")
    proto = make_model(nodes, outputs)
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


def test_excitation_from_the_new_exporter(tmp_path, engines_apart):
    """MobileNet v3's: silently wrong as it is exported, which is found out; then rewritten."""
    torch.manual_seed(0)
    excite = SqueezeExcitation(16, 8, scale_activation=torch.nn.Hardsigmoid)
    layers = torch.nn.Conv2d(3, 16, 3), torch.nn.Hardswish(), excite, torch.nn.Conv2d(16, 10, 1)
    network = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    references = get_references(network, BLOB[:1])
    path = tmp_path / "excitation.onnx"
    export(network, path, (1, 3, 8, 8), dynamo=True)
    if cv2.__version__ == "5.0.0":
        engines, failures = verify(path, references)
        assert engines == [] and [*failures] == EACH_ENGINE
        for reason in failures.values():
            assert reason.startswith("wrong on picture") and "relative error" in reason
    rewrite(path)
    assert "new" in verify(path, references)[0]


def make_network(model, weights="random"):
    preprocessing = Preprocessing(1, (0, 0, 0), (), False, False)
    return Network(Request("test", weights), weights, model, preprocessing)


def test_what_torchscript_cannot_export():
    """Pooling to a size that doesn't divide its input: PyTorch's new exporter takes over."""
    torch.manual_seed(1)
    pool = [torch.nn.AdaptiveAvgPool2d(5), torch.nn.Flatten(), torch.nn.Linear(200, 10)]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), *pool).eval()
    blob = np.random.default_rng(3).standard_normal((1, 3, 26, 26)).astype(np.float32)
    path = convert(make_network(model), get_references(model, blob)).path
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert np.allclose(read_onnx(path)(blob), run_torch(model, blob), atol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_assigned_slices_come_from_the_new_exporter(monkeypatch, capsys, fails):
    """TorchScript's writes ScatterND, which is slow in OpenCV; it is taken if the new one fails."""

    class Shift(torch.nn.Module):
        def forward(self, x):
            x = x.clone()
            x[:] += x.mean(1, keepdim=True)
            return x.mean((2, 3))

    def export_one(model, path, shape, dynamo):
        if dynamo and fails:
            raise RequestError("no")
        export(model, path, shape, dynamo)

    monkeypatch.setattr(conversion, "export", export_one)
    blob = np.random.default_rng(3).standard_normal((1, 3, 26, 26)).astype(np.float32)
    path = convert(make_network(Shift()), get_references(Shift(), blob)).path
    assert np.allclose(read_onnx(path)(blob), run_torch(Shift(), blob), atol=1e-5)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert ("ScatterND" in kinds) == fails
    assert capsys.readouterr().out.count("exporting test ...") == 2 + fails


def test_weights_over_two_gigabytes(monkeypatch, small):
    """A smaller limit stands in: the weights go to a file of their own."""
    monkeypatch.setattr(conversion, "MAX_ONNX_SIZE", 10_000)
    blob = np.random.default_rng(3).standard_normal((1, 3, 32, 32)).astype(np.float32)
    references = get_references(small, blob)
    converted = convert(make_network(small), references)
    path = converted.path
    data = path.with_name(f"{path.name}.data")
    assert {p.name for p in path.parent.iterdir()} == {path.name, data.name}
    assert path.stat().st_size < 10_000 < 50_000 < data.stat().st_size
    assert path.stat().st_mode == data.stat().st_mode
    hashes = [hashlib.sha1(file.read_bytes()).hexdigest() for file in (path, data)]
    assert [*converted.load_info.values()] == hashes
    assert np.allclose(read_onnx(path)(blob), run_torch(small, blob), atol=1e-4)

    monkeypatch.setattr(conversion, "MAX_ONNX_SIZE", 2**31)
    convert(make_network(small), references)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def save_mean(path, nodes):
    """A file whose logits are each channel's mean of what the nodes make of the input."""
    nodes += " pooled = GlobalAveragePool(output) logits = Flatten(pooled)"
    onnx.save(make_model(nodes, {"logits": "batch, 3"}), path)


@pytest.mark.skipif(cv2.__version__ != "5.0.0", reason="OpenCV 5.0.0's fault")
def test_a_file_that_crashes_opencv_is_one_line(tmp_path, engines_apart):
    path = tmp_path / "crash.onnx"
    save_mean(path, GELU)
    engines, failures = verify(path, [Reference("picture", BLOB, BLOB.mean(axis=(2, 3)))])
    assert "new" not in engines and failures["new"] == "crashes (signal 11)"


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3))


def test_evidence_has_a_batch_of_three(tmp_path):
    """A file that answers two pictures at most isn't taken."""
    path = tmp_path / "two.onnx"
    save_mean(path, "output = Slice(input, zero, two, zero)")
    references = get_references(Mean(), BLOB[:1])
    assert max(len(blob) for _, blob, _ in references) == 3
    engines, failures = verify(path, references)
    assert engines == [] and failures["new"] == "the shape is (2, 3), not (3, 3)"
    two = [Reference(name, blob[:2], logits[:2]) for name, blob, logits in references]
    assert "new" in verify(path, two)[0]


def test_a_failure_ends_with_one_sentence(monkeypatch, capsys, engines_apart):
    """Each engine's answer stands above it. OpenCV 5.0.0 can't run such an Einsum."""
    monkeypatch.setattr(conversion, "export", lambda *args: export(*args[:-1], dynamo=False))

    class Energy(torch.nn.Module):
        def forward(self, x):
            return torch.einsum("bchw,bchw->bc", x, x)

    with pytest.raises(NetworksDisagree) as caught:
        convert(make_network(Energy()), get_references(Energy(), BLOB[:1]))
    sentence = str(caught.value)
    assert len(sentence) <= 300 and "\n" not in sentence and ">" not in sentence
    assert sentence.count("OpenCV") == sentence.count("first wrong node: Einsum") == 1
    said = capsys.readouterr().out
    for engine in EACH_ENGINE:
        assert f"\nfirst wrong node, {engine} engine: Einsum" in said
    assert [*Path("models").iterdir()] == []


REFERENCES = {"picture": 1, "dark, bright, grey": 3, "noise, zeros": 3, "0 to 255": 1}


@pytest.mark.parametrize("name", REFERENCES)
def test_evidence(monkeypatch, name):
    """A file that is wrong for one of the pictures only isn't taken."""
    references = get_references(Mean(), BLOB[:1].clip(-2, 2))
    assert {reference.name: len(reference.blob) for reference in references} == REFERENCES
    outputs = {reference.name: reference.logits for reference in references}

    def run_engine(path, engine, blobs):
        assert all(map(np.array_equal, blobs, [reference.blob for reference in references]))
        return [*outputs.values()], 1.0

    monkeypatch.setattr("verify.run_engine_apart", run_engine)
    assert "new" in verify("graph.onnx", references)[0]
    right = outputs[name]
    for number in range(REFERENCES[name]):
        outputs[name] = right.copy()
        outputs[name][number] += 0.01 * np.abs(right).max()  # of all logits: the same class
        engines, failures = verify("graph.onnx", references)
        assert engines == [] and failures["new"].startswith(f"wrong on {name}: ")


def test_references():
    """What a dark copy, a grey one and the others are, and PyTorch's answers to them."""
    blob = BLOB[:1].clip(-2, 2)
    references = get_references(Mean(), blob)
    for _, given, logits in references:
        assert np.allclose(logits, given.mean(axis=(2, 3)), rtol=1e-5, atol=1e-6)
    picture, (dark, bright, grey), noise, raw = (given for _, given, _ in references)
    assert np.array_equal(picture, blob)
    assert [dark.mean(), bright.mean()] == pytest.approx([-1.5, 1.5], abs=0.1)
    assert dark.std() == bright.std() == pytest.approx(blob.std() / 4, rel=0.1)
    assert np.allclose(grey, blob[0].mean(axis=0), atol=1e-6)
    assert abs(noise[:2].mean()) < 0.2 and noise[:2].std() == pytest.approx(1, rel=0.1)
    assert not noise[2].any()
    assert [raw.min(), raw.max()] == pytest.approx([0, 255], rel=1e-5)


class Noisy(torch.nn.Module):
    """Its answer to large values is noise."""

    def forward(self, x):
        x = x.flatten(1)
        return x.clamp(max=2) + torch.sin(1e4 * (x - 2).clamp(min=0))


def test_no_evidence_hangs_on_rounding():
    """PyTorch's own answer proves nothing then, whichever blob it is; the picture's has to."""
    names = [name for name, _, _ in get_references(Noisy(), BLOB[:1].clip(-1, 1))]
    assert names == ["picture", "dark, bright, grey"]
    for forward in (Noisy(), lambda x: torch.sin(1e4 * x.flatten(1).clamp(max=0.01))):
        # the second one's is steady in 0 to 255 alone
        with pytest.raises(RequestError, match="hangs on rounding.* 1e-06 moves it by .*e-0[1-3]"):
            get_references(forward, 10 * BLOB[:1])
    with pytest.raises(RequestError, match="the same for every picture"):  # all that are steady
        get_references(lambda x: Noisy()((x / 10).clamp(min=1) + 1), BLOB[:1])


def test_only_the_classic_engine_is_right(monkeypatch, capsys):
    """OpenCV's own programs take the new one: the last line says so, and the entry names it."""
    monkeypatch.setattr(conversion, "verify", lambda *_: (["classic"], {}))
    network = make_network(Mean())
    converted = convert(network, [Reference("noise", BLOB[:1], BLOB[:1].mean(axis=(2, 3)))])
    assert "cv2.dnn.ENGINE_CLASSIC" in capsys.readouterr().out.splitlines()[-1]
    write_entry(converted, network.preprocessing, None)
    entry = read_zoo("models/models.yml")["test-random"]
    assert entry["engine"] == "classic" and entry["engines"] == ["classic"]


@pytest.mark.parametrize("kind", ["If", "Loop", "Scan"])
def test_graphs_that_branch_are_refused(tmp_path, kind):
    """They can be verified on one side only."""
    node = onnx.helper.make_node(kind, ["input"], ["output"], name="branch")
    shape = ["batch", 3]
    values = [onnx.helper.make_tensor_value_info(n, 1, shape) for n in ("input", "output")]
    graph = onnx.helper.make_graph([node], "graph", values[:1], values[1:])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "branch.onnx")
    with pytest.raises(RequestError, match=f"branches \\({kind}: .*torch.where"):
        rewrite(tmp_path / "branch.onnx")
