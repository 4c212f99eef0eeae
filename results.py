"""The rows of an evaluation in; its table, figures, log, chart and sheet out.

All figures come from the table, pictures.csv, which has a row for each picture.
"""

import csv
import io
import json
import textwrap
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from classification import RANDOM, RequestError, one_line, read_picture
from common import whole_file
from verify import Difference

# The prefixes of their columns in the table, and their names.
NETWORKS = {"pytorch": "PyTorch", "opencv": f"OpenCV {cv2.__version__}"}

NO_ANSWER = -1  # the class that a network answers whose outputs are nan
SHOWN = 10  # pictures that the summary lists; the table has all
WIDTH = 100  # columns of the summary
SHEET = 12  # wrong pictures on the sheet, those of which PyTorch was most sure


class Row(NamedTuple):
    """A picture in the table; None, an empty cell, is unknown."""

    number: int  # from 0, in the order of the labels
    picture: str  # its path from the folder of the pictures
    label: int
    pytorch_class: int = None
    opencv_class: int = None
    pytorch_rank: int = None  # of the label; 1: the network names it
    opencv_rank: int = None
    pytorch_probability: float = None  # of the class that the network names
    opencv_probability: float = None
    pytorch_label_probability: float = None
    opencv_label_probability: float = None
    l1: float = None  # mean |a - b| of the logits
    l_inf: float = None  # max |a - b|
    peak: float = None  # max |a|, of PyTorch's
    pytorch_ms: float = None  # the batch's time per picture
    opencv_ms: float = None
    batch: int = None  # from 0
    warm_up: bool = None  # whether the batch is the first of a process, which is slower
    skipped: str = None  # why the picture can't be read


def get_table(rows):
    """The pictures that were read, as NumPy's record array: table.l1, table[:50] ..."""
    return np.rec.fromrecords([row for row in rows if row.skipped is None], names=Row._fields)


def get_batches(table):
    """The part of the table that is each batch's."""
    return np.split(table, np.flatnonzero(np.diff(table.batch)) + 1)


def get_difference(table):
    """The Difference over all its pictures; the relative error is the largest of a batch's."""
    relative = [batch.l_inf.max() / max(batch.peak.max(), 1e-30) for batch in get_batches(table)]
    l1, l_inf = float(table.l1.mean()), float(table.l_inf.max())
    same = (table.pytorch_class == table.opencv_class) & (table.pytorch_class != NO_ANSWER)
    return Difference(l1, l_inf, float(np.max(relative)), int(same.sum()), len(table))  # nan wins


def get_figures(rows, total, classes, weights):
    """All the figures of the evaluation of `total` pictures, which JSON can hold but for nan."""
    table = get_table(rows)
    figures = {"pictures": total, "read": len(table), "classes": classes}
    figures["partial"] = len(rows) < total
    figures["skipped"] = [[row.picture, row.skipped] for row in rows if row.skipped]
    timed = table if table.warm_up.all() else table[~table.warm_up]
    for name in NETWORKS:
        figures[name] = {
            "top1": 100 * int((table[f"{name}_rank"] <= 1).sum()) / len(table),
            "top5": 100 * int((table[f"{name}_rank"] <= 5).sum()) / len(table),
            "ms_mean": float(timed[f"{name}_ms"].mean()),
            "ms_median": float(np.median(timed[f"{name}_ms"])),
            "ms_p95": float(np.percentile(timed[f"{name}_ms"], 95)),
        }
    figures["difference"] = vars(get_difference(table))
    apart = table[table.pytorch_class != table.opencv_class]
    figures["disagreements"] = apart[["picture", "pytorch_class", "opencv_class"]].tolist()
    nan = (table.pytorch_class == NO_ANSWER) | (table.opencv_class == NO_ANSWER)
    figures["nan"] = table.picture[nan].tolist()
    wrong = table[table.pytorch_rank > 1][["label", "pytorch_class"]]
    pairs = Counter(wrong.tolist()).most_common(5)
    figures["confused"] = [[*pair, count] for pair, count in pairs if count > 1]
    figures["notes"] = get_notes(table, classes, weights)
    return figures


def get_notes(table, classes, weights):
    """What looks as if the class IDs were those of another order."""
    notes, answers = [], Counter((table.pytorch_class - table.label).tolist())
    right = f"{answers[0]} of PyTorch's {len(table)} answers are right"
    for shift in (1, -1):
        if answers[shift] > max(answers[0], answers[-shift]):
            shifted = f"{answers[shift]} are the label {shift:+}"
            notes.append(f"{right}, {shifted}: do the class IDs begin with 0?")
    guessed = answers[0] <= len(table) * 2 / classes
    if guessed and len(table) >= 50 and classes >= 10 and weights != RANDOM:
        note = "no better than guessing: are the class IDs in the order of the training?"
        notes.append(f"{right}, {note} Those of ImageNet's development kit aren't")
    return notes


def get_summary(title, figures, about, names):
    """The lines that end the log and the output: what is odd, then a table of both networks."""
    apart = [f"{name}: PyTorch {a}, OpenCV {b}" for name, a, b in figures["disagreements"]]
    lines, read = [], figures["read"]
    for what, found in (
        ("skipped", [reason for _, reason in figures["skipped"]]),
        ("wrong, since the logits are nan", figures["nan"]),
        ("not the same class", apart),
    ):
        lines += [f"{what}: {len(found)} pictures"] if found else []
        lines += [f"* {item}" for item in found[:SHOWN]]
    lines += [f"NOTE: {note}" for note in figures["notes"]] + textwrap.wrap(title, WIDTH)
    count = read if read == figures["pictures"] else f"{read} of {figures['pictures']}"
    header = f"{'PARTIAL: ' if figures['partial'] else ''}{count} pictures"
    lines.append(f"{header:44}" + "".join(f"{name:>17}" for name in NETWORKS.values()))
    for label, key in (
        (f"top-1 accuracy, % of {read}", "top1"),
        *([(f"top-5 accuracy, % of {read}", "top5")] if figures["classes"] > 5 else []),
        ("ms per picture, mean", "ms_mean"),
        ("ms per picture, median", "ms_median"),
        ("ms per picture, 95th percentile of batches", "ms_p95"),
    ):
        lines.append(f"{label:44}" + "".join(f"{figures[name][key]:17.2f}" for name in NETWORKS))
    lines += [f"published by torchvision: {k} {value} %" for k, value in about["published"].items()]
    lines.append(f"pictures: {about['pictures_root']}, channels in the order {about['channels']}")
    if about["preprocess"] == "tutorial":
        lines.append("prepared as in the tutorial, not as the network's own are: another accuracy")
    if about["transform"]:
        lines.append(f"PyTorch's are prepared by {about['transform']}, OpenCV's by cv2 and NumPy:")
        lines.append("the differences from end to end are reported, and not judged")
    threads = ", ".join(f"{name} {n}" for name, n in about["threads"].items())
    each = f", in each of {about['processes']} processes" if about["processes"] > 1 else ""
    if about["threshold"] is not None:
        lines.append(f"one output: the answer is class 1 if it is above {about['threshold']}")
    lines.append(f"OpenCV's engine: {about['engine']}; threads: {threads}{each}")
    lines.append(f"PyTorch vs OpenCV: {Difference(**figures['difference'])}")
    lines += ["most often confused, label -> PyTorch's answer:"] if figures["confused"] else []
    lines += [f"* {names[a]} -> {names[b]}: {n}" for a, b, n in figures["confused"]]
    return lines


def get_log_lines(table, classes):
    """The tutorial's lines for each batch: accuracy so far, the batch's times and differences."""
    lines, done = [], 0
    for batch in get_batches(table):
        done += len(batch)
        for name, title in NETWORKS.items():
            ranks = table[f"{name}_rank"][:done]
            tops = (f"top-{k} {100 * (ranks <= k).mean():.2f}" for k in (1, 5) if k < classes)
            lines.append(f"{done} Accuracy for {title}: {', '.join(tops)}")
            lines.append(f"{done} Inference time, ms {title}: {batch[f'{name}_ms'][0]:.2f}")
        lines.append(f"{done} PyTorch vs OpenCV: {get_difference(batch)}")
    return lines


def get_cells(row, names):
    """{column: value} of a picture in the table, with the names of the classes beside their IDs."""
    cells = {}
    for field, value in row._asdict().items():
        cells[field] = value
        if field == "label" or field.endswith("_class"):
            name = f"{field.removesuffix('_class')}_name"
            cells[name] = None if value is None else names[value]
    return cells


def write_results(folder, rows, total, names, about):
    """Write the table, log, JSON, chart and sheet into the folder; print and return the figures.

    rows: of all `total` pictures, or of fewer: then the files' names begin with "partial_".
    names: of the classes. about: what the summary says beside the figures.
    """
    weights, classes = about["weights"], len(names)
    figures = get_figures(rows, total, classes, weights)
    title = f"{about['name']}, {'RANDOM' if weights == RANDOM else weights} weights"
    names = [*names, "nan"]  # that of NO_ANSWER
    short = [name.partition(",")[0] for name in names]  # the first of its synonyms
    table, lines = get_table(rows), get_summary(title, figures, about, short)
    cells, csv_file = [get_cells(row, names) for row in rows], io.StringIO()
    csv.writer(csv_file).writerows([cells[0], *(row.values() for row in cells)])
    # JSON has no nan
    difference = {k: v if np.isfinite(v) else None for k, v in figures["difference"].items()}
    summary = about | figures | {"difference": difference}
    start = f"{folder}/{'partial_' if figures['partial'] else ''}"
    for what, end, text in (
        ("table", "pictures.csv", csv_file.getvalue()),
        ("log", "log.txt", "\n".join([title, *get_log_lines(table, classes), *lines, ""])),
        ("summary", "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n"),
    ):
        with whole_file(f"{start}{end}") as part:
            # the name of a file may have bytes that aren't UTF-8
            part.write_text(text, "utf-8", "backslashreplace", newline="")
        lines.append(f"{what}: {start}{end}")
    print(*lines, sep="\n", flush=True)
    draw(Path(f"{start}time.png"), draw_times, table, figures, title)
    wrong = table[table.pytorch_rank > 1]
    surest = wrong[np.argsort(-wrong.pytorch_probability, kind="stable")][:SHEET]
    draw(Path(f"{start}wrong.png"), draw_wrong, surest, about["pictures_root"], short, title)
    if not figures["partial"]:
        for path in folder.glob("partial_*"):
            path.unlink(missing_ok=True)
    return figures


def draw(path, function, *args):
    """Draw a PNG. What can't be drawn is left out with a line: the figures are written already."""
    try:
        import matplotlib

        path.unlink(missing_ok=True)  # an older one
        with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of each letter that no font has
            function(path, *args)
    except Exception as error:  # whatever matplotlib raises
        print(f"{path}: left out: {type(error).__name__}: {one_line(error)}")


def draw_times(path, table, figures, title):
    """Draw the inference time of each batch, and the median."""
    # Figure, not pyplot: it needs no display and no choice of a backend
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="batch", ylabel="ms per picture")
    title = f"{title}: inference time, {len(table)} pictures"
    axes.set_title("\n".join(textwrap.wrap(title, 80)))
    batches = np.array([batch[0] for batch in get_batches(table)])
    for color, (name, network) in zip(("C0", "C1"), NETWORKS.items(), strict=True):
        median = figures[name]["ms_median"]
        label = f"{network}: median {median:.2f} ms"
        axes.plot(batches["batch"], batches[f"{name}_ms"], color, marker=".", label=label)
        axes.axhline(median, color=color, linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0, top=1.15 * axes.get_ylim()[1])
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    with whole_file(path) as part:
        figure.savefig(part, dpi=120)
    print(f"chart: {path}")


def draw_wrong(path, rows, root, names, title):
    """Draw the pictures of these rows with the names of their labels and of PyTorch's answers."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = []
    for row in rows:
        answer = f"PyTorch: {100 * row.pytorch_probability:.0f} %, {names[row.pytorch_class]}"
        captions = [row.picture, f"label: {names[row.label]}", answer]
        captions = ["".join(c if c.isprintable() else "?" for c in text) for text in captions]
        try:
            shown.append((read_picture(Path(root, row.picture)), captions))
        except RequestError as error:  # deleted meanwhile, for instance
            print(f"{path}: left out: {error}")
    if not shown:
        return
    letters = "".join(text for _, captions in shown for text in captions)
    matplotlib.rcParams["font.family"] = find_fonts(path, letters)
    lines = -(-len(shown) // 4)
    figure = Figure(figsize=(12, 0.6 + 3.6 * lines), dpi=100, layout="constrained")
    title = f"{title}: the surest of the wrong answers"
    figure.suptitle("\n".join(textwrap.wrap(title, 90)), fontsize=14)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for place, (picture, captions) in enumerate(shown, 1):
        zoom = 400 / max(picture.shape)
        size = [max(1, round(zoom * side)) for side in picture.shape[1::-1]]
        axes = figure.add_subplot(lines, 4, place, box_aspect=1, xticks=[], yticks=[])
        axes.set_frame_on(False)
        axes.imshow(cv2.resize(picture, size, interpolation=cv2.INTER_AREA)[:, :, ::-1])
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xlabel("\n".join(shorten(text, renderer) for text in captions), fontsize=10)
    with whole_file(path) as part:
        figure.savefig(part)
    print(f"wrong pictures: {path}")


def find_fonts(path, letters):
    """Families of installed fonts that have all the letters; it's said if the PNG lacks some."""
    from matplotlib.font_manager import fontManager, get_font

    missing, families = set(map(ord, letters)), []
    for font in sorted(fontManager.ttflist, key=lambda font: font.name != "DejaVu Sans"):
        found = missing and missing & get_font(font.fname).get_charmap().keys()
        if found and not font.name.startswith("Last Resort"):  # which has a box for everything
            families.append(font.name)
            missing -= found
    if missing:
        hint = "install one (fonts-noto-cjk has Chinese, Japanese and Korean)"
        print(f"{path}: no installed font has U+{min(missing):04X} ...: {hint}")
    return families


def shorten(text, renderer, limit=280):
    """The text without its middle, so that a caption is at most `limit` px wide."""
    from matplotlib.font_manager import FontProperties

    font, short, kept = FontProperties(size=10), text, len(text)
    while renderer.get_text_width_height_descent(short, font, False)[0] > limit:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return short
