"""People's own networks: from their code to an answer, and what can't be converted."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conftest import (
    PICTURES,
    check_one_line,
    find_result,
    get_output,
    near,
    read_answer,
    read_onnx,
    run_picture,
    run_torch,
)
from PIL import Image
from torchvision import models, transforms

import conversion
from classification import RequestError
from common import NetworksDisagree
from conversion import convert
from networks import IMAGENET, Request, load_network, scale_frame
from py_to_py_cls import model_name
from verify import get_references

KOALA = PICTURES / "koala.jpg"
CONVERT = ["--evaluate", "False", "--frame_size", "56", "--model_name"]
BLOB = np.random.default_rng(1).uniform(-2, 2, (1, 3, 56, 56)).astype(np.float32)

MY_MODULE = """
import argparse, collections, itertools, sys, types
import numpy as np
import torch
from torch import nn
from torchvision import transforms

count = itertools.count()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 16, 3, 2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        logits = self.fc(torch.relu(self.conv(x)).mean((2, 3)))
        return logits

build = Net
"""
EXPORTING = "torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()"


def write(file, returns="logits", more=""):
    """Your file, with a `build` whose forward returns the expression; more: code at its end."""
    text = f"{MY_MODULE.replace('return logits', f'return {returns}')}{more}\n"
    file.write_text(text)
    return text


def build(returns="logits"):
    """The network of such a file, without the project's code."""
    namespace = {"__name__": "my_module"}
    exec(MY_MODULE.replace("return logits", f"return {returns}"), namespace)
    return namespace["build"]().eval()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(returns, more, ...): the Network of such a file in the current folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def own(returns="logits", more="", weights="", width=56, height=56):
        write(tmp_path / "my_module.py", returns, more)
        sys.modules.pop("my_module", None)
        return load_network(Request("my_module:build", weights, "", width, height))

    yield own
    sys.modules.pop("my_module", None)


@pytest.fixture
def convert_own(own):
    """convert_own(returns, more, allow_branches): the Converted file of the same."""

    def convert_own(returns="logits", more="", allow_branches=False):
        network = own(returns, more)
        return convert(network, get_references(network.model, BLOB), allow_branches)

    return convert_own


# --- from the command line to the answer ----------------------------------------------------------


def test_own_weights_and_labels(run, folder, get_logits):
    """Another number of classes, as DataParallel saves it."""
    torch.manual_seed(4)
    seven = models.squeezenet1_1(num_classes=7).eval()
    torch.save({"state_dict": torch.nn.DataParallel(seven).state_dict()}, folder / "my.pth")
    (folder / "six.txt").write_text("a\nb\nc\nd\ne\nf\n")
    (folder / "seven.txt").write_text("a\nb\nc\nd\ne\nf\ng\n")
    options = ["--model_name", "squeezenet1_1", "--weights", "my.pth", "--test", "True"]
    options += ["--input_img", KOALA, "--classes"]

    # labels that don't fit are reported before the network is converted
    check_one_line(run("py_to_py_cls.py", *options, "six.txt"), "six.txt", "6 lines", "7 outputs")
    assert not (folder / "models").exists()

    logits = get_logits(seven, KOALA)
    for result in (
        run("py_to_py_cls.py", *options, "seven.txt"),
        # by its name, with nothing but cv2; the class names come along
        run("classification.py", "squeezenet1_1-my", "--input", KOALA),
    ):
        assert read_answer(result) == near(logits)
        assert f"label: {'abcdefg'[logits.argmax()]}" in result.stdout


def test_own_architecture(run, folder):
    """A class in a file beside the user, with a frame size and preprocessing of its own."""
    write(folder / "my_module.py")
    options = ["--model_name", "my_module:Net", "--frame_size", "56", "--mean", "10", "20", "30"]
    options += ["--std", "0.5", "0.5", "0.5", "--test", "True", "--input_img", KOALA]
    result = run("py_to_py_cls.py", *options)
    assert result.stderr == ""
    resized = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])
    # scale has OpenCV's default, since nobody says what it is
    blob = (np.float32(resized(Image.open(KOALA))) - [10, 20, 30]) / 0.5
    logits = run_picture(build(), blob)
    assert read_answer(result) == near(logits)
    assert f"label: Class #{logits.argmax()}" in result.stdout
    again = run("classification.py", "my_module-Net-56", "--input", KOALA)
    assert read_answer(again) == near(logits)

    # other code with the same weights is another network
    write(folder / "my_module.py", "2 * logits")
    result = run("py_to_py_cls.py", *options)
    assert "converted and verified before" not in result.stdout
    assert read_answer(result) == near(2 * logits)


NAMES = [f"a{i}" for i in range(10)]
NUMBERED, INDICES = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}


@pytest.mark.parametrize(
    "more",
    [
        f"Net.config = types.SimpleNamespace(id2label={NUMBERED})",
        f"def build():\n    net = Net()\n    net.names = {NUMBERED}\n    return net",
        f"def build():\n    net = Net()\n    net.class_to_idx = {INDICES}\n    return net",
    ],
)
def test_class_names_that_a_network_carries(own, more):
    assert own(more=more).class_names == NAMES


@pytest.mark.parametrize("names", [[f"LABEL_{i}" for i in range(10)], NAMES[:9], list(range(10))])
def test_class_names_that_are_none(run, folder, names):
    """Made up, or too few."""
    labels = dict(enumerate(names))
    write(folder / "my_module.py", more=f"Net.config = types.SimpleNamespace(id2label={labels})")
    assert "class names" not in get_output(run("py_to_py_cls.py", *CONVERT, "my_module:build"))
    assert not list((folder / "models").glob("*classes*"))


def test_class_names_of_a_checkpoint(run, folder):
    """They come along, unless --classes names others."""
    write(folder / "my_module.py")
    torch.save({"model": build().state_dict(), "classes": NAMES}, folder / "my.pth")
    (folder / "mine.txt").write_text("b\n" * 10)
    options = [*CONVERT, "my_module:build", "--weights", "my.pth", "--test", "True"]
    result = run("py_to_py_cls.py", *options)
    assert "class names: the network's own, a0, a1, " in get_output(result)
    assert re.search(r"label: a\d$", result.stdout, re.M)
    result = run("py_to_py_cls.py", *options, "--classes", "mine.txt")
    assert "class names" not in get_output(result) and "label: b\n" in result.stdout


WIDE = "Net.config = types.SimpleNamespace(image_size=(32, 48))"


@pytest.mark.parametrize(
    "more, size, name",
    [
        (WIDE, "", "my_module-build"),
        ("", "--frame_width 48 --frame_height 32", "my_module-build-48-32"),
    ],
)
def test_evaluation_of_pictures_that_are_not_square(run, folder, undrawn, more, size, name):
    """48 px wide and 32 px high, as transformers' config or the options say it."""
    write(folder / "my_module.py", more=more)
    labels = folder / "labels.txt"
    labels.write_text("koala.jpg 0\nbison.jpg 0\n")
    options = ["--img_root_dir", PICTURES, "--img_cls_file", labels, *size.split()]
    output = get_output(run("py_to_py_cls.py", "--model_name", "my_module:build", *options))
    assert re.search(r"same class (\d+) of \1\n", output)
    summary = json.loads(find_result(folder, "summary.json", name).read_text())
    about = summary["preprocessing"]
    assert (about["width"], about["height"]) == (48, 32)


def test_your_files_win_over_ours(run, folder):
    """Files called like the project's own, one that imports another; and a path as the module."""
    write(folder / "common.py")
    (folder / "forward.py").write_text("from common import build\n")
    (folder / "networks.py").write_text("from forward import build\n")
    get_output(run("py_to_py_cls.py", *CONVERT, "./networks.py:build"))
    forward = read_onnx(folder / "models" / "networks-build-56.onnx")
    assert np.allclose(forward(BLOB), run_torch(build(), BLOB), atol=1e-5)
    for text in ("./utils.py:build", "utils.py:build", "utils:build"):
        assert model_name(text) == "utils:build"


@pytest.mark.parametrize(
    "option, code, words",
    [
        ("--lr", 0, "NOTE: my_module:build declares no preprocessing"),
        ("data", 2, 'my_module:build: .*SystemExit: 2.*if __name__ == "__main__"'),
    ],
)
def test_a_training_script_as_module(run, folder, option, code, words):
    """It parses a command line on import: it gets an empty one, and mustn't end ours."""
    parse = f"p = argparse.ArgumentParser('train.py')\np.add_argument('{option}')\np.parse_args()"
    write(folder / "my_module.py", more=parse)
    result = run("py_to_py_cls.py", *CONVERT, "my_module:build")
    *usage, line = result.stderr.splitlines()
    assert re.search(words, line) and result.returncode == code
    assert ("usage: train.py" in "".join(usage)) == (code == 2)


@pytest.mark.parametrize(
    "returns, more, raised, words",
    [
        ("logits", "build = lambda: 1 / 0", "ZeroDivisionError: division by zero", ""),
        (
            "int('my words')",
            "",
            "ValueError: .*'my words'",
            "line 19: return int.*; it must take a ",
        ),
        ("sys.exit(0)", "", "SystemExit: 0", "line 19: return sys.*SystemExit: 0; it must take a "),
        (
            "sys.exit(0) if torch.onnx.is_in_onnx_export() else logits",
            "",
            "",
            "can't export .*SystemExit",
        ),
    ],
)
def test_code_that_fails_as_the_user_sees_it(run, folder, returns, more, raised, words):
    """It keeps its traceback; exit 2, since 1 would say that the networks disagree."""
    text = write(folder / "my_module.py", returns, more)
    result = run("py_to_py_cls.py", *CONVERT, "my_module:build")
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if not line.startswith("NOTE: ")]
    if words:
        assert re.search(f"^py_to_py_cls.py: error: .*{words}", lines.pop())
    if raised:
        line = text[: text.index(more or f"return {returns}")].count("\n") + 1
        assert f'my_module.py", line {line}, in ' in "\n".join(lines)
        assert re.search(f"^{raised}", lines[-1])
    else:
        assert lines == []
    assert not [p for p in folder.rglob("*") if ".onnx" in p.name]


SIZE, PICTURES_ALONE, CHANNELS = (
    "give --frame_size",
    "must take the pictures alone",
    "have 3 channels",
)
OTHER = "it must take a float32 tensor"


@pytest.mark.parametrize(
    "returns, more, advice",
    [
        ("self.fc(x.flatten(1))", "", SIZE),
        ("self.fc(x[:, 0, 0, 0].view(-1, 16))", "", SIZE),
        ("logits + torch.zeros(1, 10).repeat(1, x.shape[-1] // 28)", "", SIZE),
        ("nn.functional.conv2d(x, torch.zeros(1, 3, 99, 99))", "", SIZE),
        ("nn.functional.layer_norm(x, (3, 32, 32))", "", SIZE),
        ("check(x, x.shape[-1] == 32, '')", "", OTHER),
        ("check(x, x.shape[-1] == 32, 'Wrong image height!')", "", SIZE),
        ("logits", "Net.forward = lambda self, x, label: x", PICTURES_ALONE),
        ("logits", "Net.forward = lambda self, *, label: label", PICTURES_ALONE),
        ("self.conv(x[:, :2])", "", OTHER),
        ("nn.functional.conv2d(x, torch.zeros(1, 4, 3, 3))", "", CHANNELS),
        ("nn.functional.batch_norm(x, torch.zeros(4), torch.ones(4))", "", CHANNELS),
        ("transforms.Normalize((0.5,) * 4, (0.2,) * 4)(x)", "", CHANNELS),
        ("logits.view(1, 10)", "", "takes one picture but not 3"),
        ("self.size", "", OTHER),
        ("self.fc(x.half())", "", OTHER),
        ("logits", "build = lambda: torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(9, 9)))",
         SIZE),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_advice_for_a_forward_that_fails(own, capsys, returns, more, advice):
    """About sizes only if the error is. PyTorch's own traceback says nothing of a wrong call."""
    check = "def check(x, is_right, text):\n    assert is_right, text\n"
    with pytest.raises(RequestError, match=f"the network's forward fails.*; .*{advice}") as caught:
        get_references(own(returns, check + more).model, BLOB)
    assert "\n" not in str(caught.value)
    reached = advice not in (PICTURES_ALONE, CHANNELS)
    assert ("Traceback" in capsys.readouterr().err) == reached


# --- building -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, words",
    [
        ("my_module:number", "returns int, not an nn.Module"),
        ("my_module:stop", "SystemExit"),
        ("my_module:absent", "my_module.py has no absent"),
        ("no_module:Net", "No module named 'no_module'"),
        (":Net", "module"),
        ("..no_module:Net", "module"),
    ],
)
def test_own_architecture_that_cannot_be_built(own, name, words):
    own(more="number = lambda: 5\nstop = lambda: sys.exit(0)")
    with pytest.raises(RequestError, match=words) as caught:
        load_network(Request(name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("wrapped", ["nn.DataParallel(Net())", "torch.compile(Net())"])
def test_wrappers_are_taken_off(own, wrapped):
    torch.save(build().state_dict(), "my.pth")
    for weights in ("", "my.pth"):
        model = own("logits", f"build = lambda: {wrapped}", weights).model
        assert type(model).__name__ == "Net" and not model.training
        assert np.array_equal(run_torch(model, BLOB), run_torch(build(), BLOB))


def test_a_prefix_that_is_the_networks_own(own):
    """Its keys begin as those of DataParallel do."""
    wrap = "build = lambda: nn.Sequential(collections.OrderedDict(module=Net()))"
    saved = own(more=wrap).model.state_dict()
    torch.save(saved, "my.pth")
    loaded = own("logits", wrap, "my.pth").model.state_dict()
    assert list(loaded) == list(saved) and all("module." in key for key in saved)


EXPORTED = "torch.export.export(Net().eval(), (torch.ones(2, 3, 56, 56),), dynamic_shapes="
EXPORTED += "({0: torch.export.Dim('batch')},))"


@pytest.mark.parametrize("program", [EXPORTED, "torch.jit.load('net.pt')"])
@pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning"
)
def test_exported_programs_and_torchscript(own, convert_own, program):
    """As torch.export.load and torch.jit.load return them."""
    torch.jit.script(own().model).save("net.pt")
    path = convert_own(more=f"build = lambda: {program}").path
    assert np.allclose(read_onnx(path)(BLOB), run_torch(build(), BLOB), atol=1e-5)


NORM = "nn.utils.parametrizations."


@pytest.mark.parametrize(
    "change",
    [
        f"net.fc = {NORM}weight_norm(net.fc)",
        f"net.conv, net.fc = map({NORM}spectral_norm, (net.conv, net.fc))",
        # hooks: what they compute from weights alone is folded in the graph
        "net.conv, net.fc = map(nn.utils.weight_norm, (net.conv, net.fc))",
        f"{NORM}orthogonal(net.fc)",
        "nn.utils.parametrize.register_parametrization(net.conv, 'weight', nn.Softmax(1))",
    ],
)
def test_parametrizations_become_constants(convert_own, change):
    """Exporters lack their operators, or leave arithmetic before a weight, which OpenCV refuses."""
    more = f"def build():\n    net = Net()\n    {change}\n    return net"
    forward = read_onnx(convert_own(more=more).path)
    expected = run_torch(sys.modules["my_module"].build().eval(), BLOB)
    assert np.allclose(forward(BLOB), expected, atol=1e-5)


def test_a_quantized_network_is_refused(own):
    quantize = "torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear})"
    with pytest.raises(RequestError, match="my_module:build: its weights are quantized.*float"):
        own(more=f"build = lambda: {quantize}")


def test_a_function_of_an_installed_package():
    network = load_network(Request("torchvision.models.mnasnet:mnasnet0_5"))
    assert type(network.model).__name__ == "MNASNet" and not network.model.training
    assert network.request.name == "torchvision.models.mnasnet:mnasnet0_5"
    assert network.weights == "own"


@pytest.mark.parametrize(
    "dtype, bits, figure", [("half", 12, "float16 .* 2e-04"), ("bfloat16", 9, "bfloat16 .* 2e-03")]
)
def test_half_precision_is_said_with_the_figure(own, capsys, dtype, bits, figure):
    """1 + 2^-12 is 1 in float16, and 1 + 2^-9 in bfloat16: off by 2.4e-4 and 2.0e-3."""
    convert = f"build = lambda: Net().{dtype}()"
    model = own(f"0 * logits + 1 + torch.tensor(2.0**-{bits})", convert).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert re.search(f"converted as float32.*{figure}", capsys.readouterr().out)
    own()
    assert "float32" not in capsys.readouterr().out


AUTOCAST = """
class Mixed(Net):
    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x):
        return super().forward(x).float()

build = Mixed
"""


@pytest.mark.parametrize(
    "returns, more, kind",
    [
        ("logits", AUTOCAST, "bfloat16"),
        ("torch.autocast('cpu', torch.float16)(self.fc)(x[:, 0, 0, :16]).float()", "", "float16"),
        ("torch.autocast('cpu', enabled=False)(self.fc)(x[:, 0, 0, :16])", "", ""),
    ],
)
def test_autocast_within_a_network_is_switched_off(convert_own, capsys, returns, more, kind):
    """In its references and in its file."""
    forward = read_onnx(convert_own(returns, more).path)
    exact = build(re.sub(r"torch.autocast\(.*?\)\(self.fc\)", "self.fc", returns))
    assert np.allclose(forward(BLOB), run_torch(exact, BLOB), atol=1e-6)
    words = f"converted as float32; the {kind} network itself differs by [1-9]e-0[234]"
    assert bool(re.search(words, capsys.readouterr().out)) == bool(kind)


KEEPING = """
class Keeping(Net):
    def __init__(self):
        super().__init__()
        self.extra, self.kept = nn.Parameter(torch.zeros(10)), None

    def forward(self, x):
        if self.kept is None or torch.jit.is_tracing():
            self.kept = 2 * self.extra
        return super().forward(x) + self.kept

build = Keeping
"""


def test_random_weights_of_a_network_that_keeps_what_it_computes(own):
    """As timm's LeViT does: weights that change after its first pass would give another file."""
    model = own(more=KEEPING, weights="random").model
    assert model.extra.abs().min() > 0
    answer = run_torch(model, BLOB)
    model.kept = None
    assert np.array_equal(run_torch(model, BLOB), answer)


# --- the size -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, height, expected",
    [
        (448, 448, (448, 448, (512,))),
        (160, 96, (160, 96, (182,))),
        (160, None, (160, 224, (256,))),
        (None, 96, (224, 96, (256,))),
        (224, 224, (224, 224, (256,))),
    ],
)
def test_the_frame_size_scales_the_resize(own, width, height, expected):
    """By the side that grows most. The file isn't named after the network's own size."""
    network = own(width=width, height=height)
    p = network.preprocessing
    assert (p.width, p.height, p.resize) == expected
    assert scale_frame(replace(IMAGENET, resize=(448, 336)), 112, 56).resize == (224, 84)
    named = (network.request.width, network.request.height)
    assert named == ((None, None) if width == height == 224 else (width, height))


# --- what proves nothing --------------------------------------------------------------------------

WRAP = "not a classifier: forward returns {}.* wrap it in a module"


@pytest.mark.parametrize(
    "returns, words",
    [
        ("(logits, x)", WRAP.format("tuple")),
        ("{'out': logits}", WRAP.format("dict")),
        ("None", WRAP.format("NoneType")),
        ("logits.double()", WRAP.format(r"torch.float64 of shape \(1, 10\)")),
        ("logits[:, :, None, None]", WRAP.format(r"torch.float32 of shape \(1, 10, 1, 1\)")),
        ("logits.repeat(2, 1)", WRAP.format(r"torch.float32 of shape \(2, 10\)")),
        *((f"0 * logits + {value}", "the same for every picture, and prove nothing")
          for value in ("0", "1", "float('nan')", "float('inf')")),
        ("nn.functional.dropout(logits, 0.5, training=True)", "changes from run to run.* dropout"),
        ("logits + torch.rand(1, 10)", "changes from run to run"),
        ("logits * next(count)", "changes from run to run"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("more", ["", "build = lambda: Net().half()"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_own_architecture_that_proves_nothing(convert_own, returns, more, words):
    with pytest.raises(RequestError, match=words):
        convert_own(returns, more)


def test_a_network_that_changes_its_input_gets_a_copy():
    """Or PyTorch's answer to one picture would be held against OpenCV's to another."""
    blob = BLOB.copy()
    for _, given, _ in get_references(build("logits + x.clamp_(-0.3, 0.3).mean()"), blob):
        assert np.abs(given).max() > 0.3
    assert np.array_equal(blob, BLOB)


# --- conversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("returns", ["logits", "logits + 1 if x.shape[-1] > 1e6 else logits"])
def test_an_ordinary_network_comes_out_of_the_first_exporter(convert_own, monkeypatch, returns):
    """With a batch of any size; a branch on the shape is the same for every picture."""
    exports, export = [], conversion.export
    monkeypatch.setattr(conversion, "export", lambda *a: exports.append(a[3]) or export(*a))
    graph = onnx.load(convert_own(returns).path).graph
    assert exports == [False]  # dynamo
    for value in (*graph.input, *graph.output):
        batch, *rest = value.type.tensor_type.shape.dim
        assert batch.dim_param and all(size.dim_value for size in rest)


@pytest.mark.parametrize(
    "returns",
    [
        "collections.OrderedDict(loss=None, logits=logits, hidden=x)",
        "types.SimpleNamespace(logits=logits, hidden=x)",
        "collections.namedtuple('Output', 'logits aux')(logits, x)",
    ],
)
def test_outputs_with_logits_are_taken(convert_own, capsys, returns):
    """As transformers' networks return them."""
    assert convert_own(returns).outputs == 10
    assert "my_module:build: taking the `logits`" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, error, words",
    [
        ("1.001 * logits", NetworksDisagree, "relative error 1.0e-03 .*first wrong node: Gemm fc"),
        ("int('not')", RequestError, "can't export.* for 56x56 pictures: ValueError: .*'not'"),
    ],
)
def test_a_conversion_that_fails(convert_own, tmp_path, monkeypatch, change, error, words):
    """The older file of that name stays as it is, and nothing else is written."""
    monkeypatch.setattr(conversion, "locate", lambda *_: "Gemm fc: relative error 1.0e-03")
    path = tmp_path / "models" / "my_module-build-56.onnx"
    path.parent.mkdir()
    older = {path: "an older file of that name", path.with_name(f"{path.name}.data"): "its weights"}
    for file, text in older.items():
        file.write_text(text)
    before = torch._C._jit_set_onnx_log_enabled
    with pytest.raises(error, match=words) as caught:
        convert_own(f"{change} if {EXPORTING} else logits")
    assert caught.type is error and "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300 and ">" not in str(caught.value)
    assert torch._C._jit_set_onnx_log_enabled is before
    assert {file: file.read_text() for file in path.parent.iterdir()} == older


def test_the_new_exporters_reason_is_quoted(convert_own, capsys):
    """It stands below "Failed to convert the exported program"."""
    with pytest.raises(RequestError, match="'aten::special_i0e'"):
        convert_own("torch.special.i0e(logits)")
    assert re.search("new exporter can't .*: No ONNX function .*i0e", capsys.readouterr().out)


BRANCHES = "the network branches on its input .*my_module.py, line {}: return ".format(
    MY_MODULE[: MY_MODULE.index("return")].count("\n") + 1
)
REMEMBERS = """
class Remembers(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        logits = super().forward(x)
        {}
        return logits + 1 if self.seen.sum() > 1e6 else logits

build = Remembers
"""
SCRIPT = "build = lambda: torch.jit.script(Net())"
STATE = "Net.ready = torch.tensor([True]); Net.norm = transforms.Normalize((0.5,) * 3, (0.2,) * 3)"


@pytest.mark.parametrize(
    "returns, more, words",
    [
        *((f"logits + 1 if {condition} else logits", "", BRANCHES) for condition in (
            "x.max() > 1e6",
            "x.max().item() > 1e6",
            "torch.allclose(x[:, 0], x[:, 1] + 1e6)",
            "x[0, :, 0, 0].tolist()[0] > 1e6",
            "x.detach().numpy().max() > 1e6",
            "np.asarray(x).max() > 1e6",
            "torch.nonzero(x > 30).shape[0]",
            "x[x > 30].numel()",
            "torch.sparse.sum(x.flatten(1).to_sparse()) > 1e6",
        )),
        ("logits * torch.tensor([x.max()]).clamp(1e6) / 1e6", "", BRANCHES),
        ("logits", REMEMBERS.format("self.seen[0] = x.mean()"), "1 if self.seen.sum"),
        ("logits", REMEMBERS.format("self.seen.view(2, 2)[0, 0] = x.mean()"), "1 if self.seen.sum"),
        ("logits", REMEMBERS.format("torch.sum(x, (0, 1, 2, 3), out=self.seen[0])"), "1 if self"),
        # what it reads there is from the picture before
        ("(logits + 1 if getattr(self, 'last', x.sum()) > 1e9 else logits, setattr(self, 'last', "
         "x.sum()))[0]", "", BRANCHES),
        ("logits + 1 if bool(x.max() > 1e6) else logits", SCRIPT, "branches .* .in scripted code"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_what_is_right_for_some_pictures_only(convert_own, tmp_path, returns, more, words):
    """None of the pictures shows it."""
    with pytest.raises(RequestError, match=f"{words}.*--allow_branches True") as caught:
        convert_own(returns, more)
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*.onnx"))


@pytest.mark.parametrize(
    "returns, more",
    [
        ("2 * logits if self.ready else logits", STATE),
        ("min(1.0, self.ready.sum().item() / 2) * logits", STATE),
        ("logits * max(self.fc.weight.max().item(), 0.1)", ""),
        ("logits * float(self.fc.bias.detach().numpy()[0]) + self.conv.bias.tolist()[0]", ""),
        ("self.fc(torch.relu(self.conv(self.norm(x))).mean((2, 3)))", STATE),
        ("logits.masked_fill(logits > 1, 0)", ""),
        ("(str(x.mean()), logits)[1]", ""),
    ],
)  # fmt: skip
def test_branches_on_its_own_state(own, returns, more):
    """They are the same for every picture."""
    conversion.check_branches(own(returns, more).model, BLOB)


def test_a_file_for_one_batch_size(convert_own):
    with pytest.raises(RequestError, match="one batch size only"):
        convert_own("torch.cat([logits[i : i + 1] for i in range(len(x))])", "", True)


def test_allow_branches(run, folder):
    write(folder / "my_module.py", "logits + 1 if x.numpy().max() > 1e6 else logits")
    options = [*CONVERT, "my_module:build", "--scale", "0.01"]
    check_one_line(run("py_to_py_cls.py", *options), "my_module.py, line ", "--allow_branches True")
    get_output(run("py_to_py_cls.py", *options, "--allow_branches", "True"))
