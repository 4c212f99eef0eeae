"""The figures of an evaluation and the choice of the engine, against values computed here."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import entries
import evaluation
import results
import verify
from classification import RequestError
from common import NetworksDisagree
from networks import IMAGENET
from verify import Difference

PYTORCH = results.NETWORKS["pytorch"]
BATCHES = [slice(0, 4), slice(4, 8), slice(8, 10), slice(10, 11)]  # the last are smaller


@pytest.fixture
def logits():
    """{network: (11, 30)}, which differ more in the last batches; the classes are the same."""
    rng = np.random.default_rng(7)
    pytorch = rng.permuted(np.tile(np.arange(30, dtype=np.float32), (11, 1)), axis=1)
    pytorch[8:10] *= 2  # so the batch of the largest difference isn't that of the largest logit
    pytorch[[1, 5]] *= 0.3  # of a batch it is the largest peak that counts
    noise = rng.uniform(-0.01, 0.01, pytorch.shape).astype(np.float32)
    noise[8:] *= 20
    return {"pytorch": pytorch, "opencv": pytorch + noise}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it: clock.now, in seconds."""
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(evaluation, "time", clock)
    return clock


@pytest.fixture
def rows(logits, clock):
    """Of four batches; PyTorch takes 9, 0.4, 0.4 and 0.9 s for them, OpenCV half of it."""
    rows = []
    for i, batch in enumerate(BATCHES):

        def forward(name, i=i, batch=batch):
            clock.now += (9.0, 0.4, 0.4, 0.9)[i] * (1 if name == "pytorch" else 0.5)
            return logits[name][batch]

        networks = {name: lambda blob, n=name, f=forward: f(n) for name in logits}
        numbers = list(range(11))[batch]
        todo = [results.Row(n, f"{n}.jpg", 0, batch=i, warm_up=i == 0) for n in numbers]
        rows += evaluation.evaluate_batch(networks, [None], todo)
    return rows


@pytest.fixture
def figures(rows):
    return results.get_figures(rows, 11, 30, "own")


def test_differences_are_of_all_pictures(figures, logits):
    """L1 is the mean over the pictures, not over batches; the relative error is a batch's."""
    apart = np.abs(logits["pytorch"].astype(np.float64) - logits["opencv"])
    batches = np.mean([apart[batch].mean() for batch in BATCHES])
    assert abs(batches - apart.mean()) > 0.05 * apart.mean()
    relative = [apart[b].max() / np.abs(logits["pytorch"][b]).max() for b in BATCHES]
    assert np.argmax(relative) == 3
    assert max(relative) > 1.5 * apart.max() / np.abs(logits["pytorch"]).max()
    assert figures["difference"].l1 == pytest.approx(apart.mean(), rel=1e-6)
    assert figures["difference"].l_inf == pytest.approx(apart.max(), rel=1e-6)
    assert figures["difference"].relative == pytest.approx(max(relative), rel=1e-6)
    assert figures["difference"].same_class == figures["difference"].pictures == 11


def test_the_relative_error_is_of_the_largest_peak(rows):
    """Of the batch, as of the whole output of a conversion, whichever picture it is of."""
    batch = [rows[0]._replace(l_inf=1e-3, peak=peak) for peak in (2.0, 50.0, 0.1)]
    assert results.get_difference(results.get_table(batch)).relative == pytest.approx(1e-3 / 50)


def test_times_are_of_a_picture_and_without_the_warm_up(rows, figures):
    """The 4, 2 and 1 pictures of the batches after the first: 100, 200 and 900 ms."""
    assert figures["pytorch"]["ms_mean"] == pytest.approx((4 * 100 + 2 * 200 + 900) / 7)
    assert figures["pytorch"]["ms_median"] == pytest.approx(100)
    assert figures["pytorch"]["ms_p95"] == pytest.approx(200 + 0.7 * 700)
    assert figures["opencv"]["ms_mean"] == pytest.approx((4 * 50 + 2 * 100 + 450) / 7)
    # of a single batch there is nothing but the warm-up: 9 s for 4 pictures
    assert results.get_figures(rows[:4], 11, 30, "own")["pytorch"]["ms_median"] == pytest.approx(
        2250
    )
    log = results.get_log_lines(results.get_table(rows), 30)
    assert f"8 Inference time, ms {PYTORCH}: 100.00" in log and len(log) == 4 * 5


def test_disagreements_name_the_picture():
    logits = {"pytorch": np.float32([[1, 0], [1, 0]]), "opencv": np.float32([[1, 0], [0, 1]])}
    networks = {name: lambda blob, name=name: logits[name] for name in logits}
    todo = [results.Row(i, f"{i}.jpg", 0, batch=0, warm_up=True) for i in range(2)]
    rows = evaluation.evaluate_batch(networks, [None], todo)
    assert [(row.pytorch_rank, row.opencv_rank) for row in rows] == [(1, 1), (1, 2)]
    figures = results.get_figures(rows, 2, 2, "own")
    assert figures["disagreements"] == [("1.jpg", 0, 1)]
    assert figures["difference"].same_class == 1
    assert figures["pytorch"]["top1"] == 100 and figures["opencv"]["top1"] == 50


def test_nan_is_the_largest_difference(rows):
    rows[5] = rows[5]._replace(l_inf=float("nan"))
    assert np.isnan(results.get_figures(rows, 11, 30, "own")["difference"].relative)


def test_the_limit_of_a_finished_evaluation():
    difference = Difference(0.0, 0.0, 0.99e-4, same_class=2, pictures=3)
    figures = {"difference": difference, "skipped": ["a"], "pictures": 100, "nan": []}
    evaluation.check_figures(figures)  # a tie that falls the other way isn't a fault
    with pytest.raises(RequestError, match="1 of 99 pictures can't be read") as skipped:
        evaluation.check_figures(figures | {"pictures": 99})
    assert skipped.value.exit_code == 1
    for relative in (1.01e-4, float("nan")):
        with pytest.raises(NetworksDisagree):
            difference = replace(difference, relative=relative)
            evaluation.check_figures(figures | {"difference": difference})


@pytest.mark.parametrize("fastest", ["new", "classic"])
def test_the_fastest_engine_is_taken(monkeypatch, tmp_path, fastest):
    """By the verification, and by an evaluation, which takes the first of its list."""
    logits = np.ones((1, 2), np.float32)
    measure = lambda path, engine, _: ([logits], 1 if engine == fastest else 2)  # noqa: E731
    monkeypatch.setattr(verify, "run_engine_apart", measure)
    monkeypatch.setattr(verify, "EACH_ENGINE", ["new", "classic"])
    engines, failures = verify.verify(tmp_path / "x.onnx", [("picture", None, logits)])
    assert engines[0] == fastest and len(engines) == 2 and not failures

    about = 10, engines, None, "", True, [], IMAGENET
    converted = entries.Converted(tmp_path / "x.onnx", {}, *about)
    assert evaluation.choose_engine(converted, "auto") == fastest
    assert evaluation.choose_engine(converted, "new") == "new"
    converted.engines.remove("new")
    with pytest.raises(RequestError, match="--engine new"):
        evaluation.choose_engine(converted, "new")


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


def get_notes(differences, classes=10, weights="own"):
    """What is said of answers that are so far from their labels."""
    rows = [results.Row(i, "", 20, pytorch_class=20 + d) for i, d in enumerate(differences)]
    return results.get_notes(results.get_table(rows), classes, weights)


@pytest.mark.parametrize("shift", [1, -1])
def test_shifted_labels(shift):
    """IDs that begin with 1, for instance: more answers beside the label than right ones."""
    (note,) = get_notes([shift] * 4 + [0] * 3 + [-shift] * 2)
    assert f"3 of PyTorch's 9 answers are right, 4 are the label {shift:+}: " in note
    assert get_notes([shift] * 4 + [0] * 4) == []
    assert get_notes([shift, -shift] * 4) == []  # of two classes that are swapped


def test_labels_of_another_order():
    """At least 50 pictures, trained weights, ten classes: no better than twice guessing."""
    answers = [0] * 10 + [2, 3, 4, 5] * 10
    (note,) = get_notes(answers)
    assert "10 of PyTorch's 50 answers are right" in note and "order of the training" in note
    assert get_notes([*answers, 0]) == get_notes(answers[1:]) == []
    assert get_notes(answers, weights="random") == get_notes(answers, classes=9) == []


def test_the_sheet_shows_the_surest_first(tmp_path, rows, monkeypatch):
    """Wrong ones alone, and twelve of them."""
    rows = [rows[0]._replace(number=i, pytorch_rank=1 + (i != 3), opencv_rank=1) for i in range(15)]
    rows = [row._replace(pytorch_probability=(7 * row.number % 15) / 15) for row in rows]
    drawn = []
    monkeypatch.setattr(results, "draw", lambda *args: drawn.append(args))
    about = {"weights": "own", "name": "x", "published": {}, "pictures_root": "", "channels": ""}
    about |= {"threads": {}, "processes": 1, "engine": "new", "transform": "", "threshold": None}
    about["preprocess"] = "own"
    results.write_results(tmp_path / "a", rows, 15, ["a"] * 30, about)
    _, (_, path, _, surest, *_) = drawn
    expected = sorted((i for i in range(15) if i != 3), key=lambda i: -(7 * i % 15))[:12]
    assert path.endswith("/a/wrong.png") and surest.number.tolist() == expected


def test_a_summary_fits_into_100_columns(tmp_path, rows, capsys, monkeypatch):
    """Whatever the network is called."""
    monkeypatch.setattr(results, "draw", lambda *_: None)
    about = {"weights": "w" * 90, "name": "n" * 90, "published": {"acc@1": 50}, "pictures_root": ""}
    about |= {"threads": {"PyTorch": 2}, "processes": 2, "engine": "new", "transform": "t"}
    about |= {"threshold": None, "channels": "RGB", "preprocess": "transform"}
    results.write_results(tmp_path, rows, 11, [str(i) for i in range(30)], about)
    lines = capsys.readouterr().out.splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("pictures: "))]
    assert max(map(len, table)) <= 100 and sum("n" * 50 in line for line in table) == 1
