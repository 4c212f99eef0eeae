"""The figures of an evaluation and the choice of the engine, against values computed here."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import ROOT

import conversion
import evaluation
import verify
from common import TORCHVISION_PREPROCESSING, NetworksDisagree
from networks import Network, Weights
from verify import Difference

PYTORCH, OPENCV = evaluation.NETWORKS
RANKS = [1, 1, 1, 3, 3, 5, 5, 5, 5, 6, 20]  # of each picture's label among the logits
BATCHES = [slice(0, 4), slice(4, 8), slice(8, 10), slice(10, 11)]  # the last are smaller


@pytest.fixture
def logits():
    """{network: (11, 30)}, which differ more in the last batch; the classes are the same."""
    rng = np.random.default_rng(7)
    pytorch = rng.permuted(np.tile(np.arange(30, dtype=np.float32), (11, 1)), axis=1)
    noise = rng.uniform(-0.01, 0.01, pytorch.shape).astype(np.float32)
    noise[8:] *= 20
    return {PYTORCH: pytorch, OPENCV: pytorch + noise}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it: clock.now, in seconds."""
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(evaluation, "time", clock)
    return clock


@pytest.fixture
def figures(logits, clock):
    """Of four batches; PyTorch takes 9, 0.4, 0.4 and 0.9 s for them, OpenCV half of it."""
    labels = np.argsort(-logits[PYTORCH], axis=1)[np.arange(11), np.array(RANKS) - 1]
    records = {}
    for i, rows in enumerate(BATCHES):

        def forward(name, i=i, rows=rows):
            clock.now += (9.0, 0.4, 0.4, 0.9)[i] * (1 if name == PYTORCH else 0.5)
            return logits[name][rows]

        networks = {n: lambda blob, n=n, f=forward: f(n) for n in (PYTORCH, OPENCV)}
        names = [f"{row}.jpg" for row in range(11)][rows]
        record = evaluation.evaluate_batch(networks, None, labels[rows].tolist(), names)
        records[i] = {"batch": i, "warm_up": i == 0, "skipped": []} | record
    return evaluation.get_figures(records, 11, {})


def test_accuracy_counts_ranks(figures):
    for network in (PYTORCH, OPENCV):
        assert figures[network]["top1"] == pytest.approx(100 * 3 / 11)
        assert figures[network]["top5"] == pytest.approx(100 * 9 / 11)


def test_differences_are_of_all_pictures(figures, logits):
    """L1 is the mean over the pictures, not over batches of different sizes."""
    apart = np.abs(logits[PYTORCH].astype(np.float64) - logits[OPENCV])
    batches = np.mean([apart[rows].mean() for rows in BATCHES])
    assert abs(batches - apart.mean()) > 0.05 * apart.mean()
    assert figures["difference"]["l1"] == pytest.approx(apart.mean(), rel=1e-6)
    assert figures["difference"]["l_inf"] == pytest.approx(apart.max(), rel=1e-6)
    assert figures["difference"]["relative"] == pytest.approx(apart.max() / 29, rel=1e-6)
    assert figures["difference"]["same_class"] == figures["difference"]["pictures"] == 11


def test_times_are_of_a_picture_and_without_the_warm_up(figures):
    """The batches of 4, 2 and 1 pictures after the first: 100, 200 and 900 ms per picture."""
    assert figures[PYTORCH]["ms_mean"] == pytest.approx(400)
    assert figures[PYTORCH]["ms_median"] == pytest.approx(200)
    assert figures[PYTORCH]["ms_p95"] == pytest.approx(200 + 0.9 * 700)
    assert figures[OPENCV]["ms_mean"] == pytest.approx(200)


def test_disagreements_name_the_picture():
    logits = {PYTORCH: np.float32([[1, 0], [1, 0]]), OPENCV: np.float32([[1, 0], [0, 1]])}
    networks = {name: lambda blob, name=name: logits[name] for name in logits}
    record = evaluation.evaluate_batch(networks, None, [0, 0], ["a.jpg", "b.jpg"])
    assert record["disagreements"] == [["b.jpg", 0, 1]]
    assert [record[name]["top1"] for name in logits] == [2, 1]
    record |= {"batch": 0, "warm_up": True, "skipped": []}
    figures = evaluation.get_figures({0: record, 1: record}, 4, {})
    assert figures["difference"]["same_class"] == 2


def test_a_skipped_picture_shifts_no_label(tmp_path):
    """Pictures of one grey value, which is their label, and which both networks name."""
    batches = [[(str(tmp_path / f"{v}.png"), v) for v in values] for values in ([3, 1, 4], [5, 9])]
    for path, value in sum(batches, []):
        cv2.imwrite(path, np.full((2, 2, 3), value, np.uint8))
    Path(batches[0][1][0]).write_bytes(b"broken")

    def name_value(blob):
        return np.eye(10, dtype=np.float32)[blob[:, 0, 0, 0].astype(int)]

    records, interrupted = evaluation.run_batches(
        batches,
        {},
        dict.fromkeys(evaluation.NETWORKS, name_value),
        lambda picture: picture[None, :1, :1, :1].astype(np.float32),
        (3, 1, 1, 1),
        tmp_path / "run.state",
    )
    assert not interrupted
    assert [record["warm_up"] for record in records.values()] == [True, False]
    assert [record["pictures"] for record in records.values()] == [2, 2]
    for record in records.values():
        assert [record[name]["top1"] for name in evaluation.NETWORKS] == [2, 2]
    assert [path for path, _ in records[0]["skipped"]] == [batches[0][1][0]]


def test_the_limit_of_a_finished_evaluation():
    difference = {"l1": 0.0, "l_inf": 0.0, "relative": 0.99e-4, "same_class": 2, "pictures": 3}
    figures = {"difference": difference, "skipped": ["a"], "pictures": 100}
    evaluation.check_figures(figures)  # a tie that falls the other way isn't a fault
    with pytest.raises(evaluation.TooManySkipped):
        evaluation.check_figures(figures | {"pictures": 99})
    for relative in (1.01e-4, float("nan")):
        with pytest.raises(NetworksDisagree):
            evaluation.check_figures(figures | {"difference": difference | {"relative": relative}})


@pytest.mark.parametrize("fastest", ["new", "classic"])
def test_the_fastest_engine_is_taken(monkeypatch, clock, tmp_path, fastest):
    """In an evaluation, and by the verification."""

    def run_opencv(net, blob):
        clock.now += 1 if net == fastest else 2

    monkeypatch.setattr(evaluation, "read_onnx", lambda path, engine: engine)
    monkeypatch.setattr(evaluation, "run_opencv", run_opencv)
    both = conversion.Converted(tmp_path / "x.onnx", ["classic", "new"], 10)
    blob = np.zeros((8, 3, 2, 2), np.float32)
    assert evaluation.choose_engine(both, blob, "auto") == fastest

    right = Difference(0.0, 0.0, 0.0, 1, 1)
    monkeypatch.setattr(
        verify, "verify_engine", lambda path, engine, _: ([right], 1 if engine == fastest else 2)
    )
    (tmp_path / "x.onnx").touch()
    engines = verify.verify(tmp_path / "x.onnx", [("picture", None, None)])
    assert engines[0] == fastest and len(engines) == 2


@pytest.mark.parametrize("package", ["torch", "torchvision", "onnx"])
def test_another_version_of_a_package_converts_again(monkeypatch, converted, weights, package):
    from networks import parse_weights

    network = Network("squeezenet1_1", parse_weights("squeezenet1_1", str(weights)), None)
    shape = (1, 3, 224, 224)
    assert conversion.find_converted(network, converted, shape) is not None
    version = conversion.importlib.metadata.version
    changed = lambda name: "0.1" if name == package else version(name)  # noqa: E731
    monkeypatch.setattr(conversion.importlib.metadata, "version", changed)
    assert conversion.find_converted(network, converted, shape) is None


def test_other_rewrites_convert_again(monkeypatch, converted, weights, tmp_path):
    from networks import parse_weights

    network = Network("squeezenet1_1", parse_weights("squeezenet1_1", str(weights)), None)
    for name in ("networks.py", "onnx_rewrites.py"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(conversion, "SCRIPT_DIR", tmp_path)
    assert conversion.find_converted(network, converted, (1, 3, 224, 224)) is not None
    (tmp_path / "onnx_rewrites.py").write_text("# changed")
    assert conversion.find_converted(network, converted, (1, 3, 224, 224)) is None


@pytest.mark.parametrize(
    "change, agree",
    [
        ({}, True),
        ({"same_class": 1}, False),
        ({"relative": 1.01e-4}, False),
        ({"relative": 0.99e-4}, True),
        ({"relative": float("nan")}, False),
    ],
)
def test_agree(change, agree):
    """The same class for each picture, and logits that are close."""
    fields = {"l1": 0.0, "l_inf": 0.0, "relative": 1e-6, "same_class": 2, "pictures": 2}
    assert Difference(**fields | change).agree is agree


def test_weights_of_another_seed_or_file_have_another_key():
    network = Network("a", Weights("file", "a.pth", None, "12"), None)
    other = Network("a", Weights("file", "a.pth", None, "13"), None)
    shape = (1, 3, 8, 8)
    assert conversion.get_key(network, shape) != conversion.get_key(other, shape)
    assert conversion.get_key(network, shape) != conversion.get_key(network, (1, 3, 9, 9))


def test_the_key_has_the_preprocessing_to_the_last_digit():
    """Preprocessing's own text rounds to six digits, and a resume must not mix two scales."""
    network = Network("my_module:build", Weights("own"), TORCHVISION_PREPROCESSING)
    rounded = dataclasses.replace(TORCHVISION_PREPROCESSING, scale=0.00392157)
    described = [
        evaluation.get_blob_maker(network, preprocessing, "tutorial")[1]
        for preprocessing in (TORCHVISION_PREPROCESSING, rounded)
    ]
    assert str(TORCHVISION_PREPROCESSING) == str(rounded)
    assert described[0] != described[1]
