"""The rows of an evaluation in; its table, and figures, log, chart and sheet of that, out."""

import csv
import io
import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from warnings import catch_warnings

import cv2
import numpy as np
from PIL import Image, ImageOps

from classification import RANDOM, one_line, read_picture
from common import whole_file
from verify import Difference

# The prefixes of their columns in the table, and their names.
NETWORKS = {"pytorch": "PyTorch", "opencv": f"OpenCV {cv2.__version__}"}
# The columns of classes, and those of their names.
NAMES = {"label": "label_name", "pytorch_class": "pytorch_name", "opencv_class": "opencv_name"}

NO_ANSWER = -1  # the class that a network answers whose outputs are nan
SHOWN = 10  # pictures that the summary lists; the table has all
SHEET = 12  # wrong pictures on the sheet, those of which PyTorch was most sure


class Row(NamedTuple):
    """A picture in the table; None, an empty cell, is unknown."""

    number: int  # from 0, in the order of the labels
    picture: str  # its path from the folder of the pictures
    label: int
    label_name: str = None  # write_results fills in the names of the classes
    pytorch_class: int = None
    pytorch_name: str = None
    opencv_class: int = None
    opencv_name: str = None
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
    figures["difference"] = get_difference(table)
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
            found = f"{right}, {answers[shift]} are the label {shift:+}"
            notes.append(f"{found}: do the class IDs begin with 0?")
    guessed = answers[0] <= len(table) * 2 / classes
    if guessed and len(table) >= 50 and classes >= 10 and weights != RANDOM:
        note = "no better than guessing: are the class IDs in the order of the training?"
        notes.append(f"{right}, {note} Those of ImageNet's development kit aren't")
    return notes


def get_summary(title, figures, about, names):
    """The lines that end the log and the output: what is odd, then a table of both networks."""
    apart = [f"{name}: PyTorch {a}, OpenCV {b}" for name, a, b in figures["disagreements"]]
    lines, read, total = [], figures["read"], figures["pictures"]
    for what, found in (
        ("skipped", [reason for _, reason in figures["skipped"]]),
        ("wrong, since the logits are nan", figures["nan"]),
        ("not the same class", apart),
    ):
        if found:
            lines += [f"{what}: {len(found)} pictures", *(f"* {item}" for item in found[:SHOWN])]
    lines += [*(f"NOTE: {note}" for note in figures["notes"]), title]
    header = "PARTIAL: " if figures["partial"] else ""
    header += f"{read} pictures" if read == total else f"{read} of {total} pictures"
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
        how = "OpenCV's by cv2: the differences are reported, not judged"
        lines.append(f"PyTorch's are prepared by {about['transform']}, {how}")
    if about["threshold"] is not None:
        lines.append(f"one output: the answer is class 1 if it is above {about['threshold']}")
    threads = ", ".join(f"{name} {n}" for name, n in about["threads"].items())
    each = f", in each of {about['processes']} processes" if about["processes"] > 1 else ""
    lines.append(f"OpenCV's engine: {about['engine']}; threads: {threads}{each}")
    lines.append(f"PyTorch vs OpenCV: {figures['difference']}")
    if figures["confused"]:
        lines.append("most often confused, label -> PyTorch's answer:")
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


def write_results(folder, rows, total, names, about):
    """Write the table, log, JSON, chart and sheet into the folder; print and return the figures.

    With rows of fewer than `total` pictures, the files' names begin with "partial_". names: of the
    classes. about: what the summary says beside the figures.
    """
    weights, classes = about["weights"], len(names)
    title = f"{about['name']}, {'RANDOM' if weights == RANDOM else weights} weights"
    title = "\n".join(textwrap.wrap(title, 64))
    short = [name.partition(",")[0] for name in (*names, "nan")]  # the first of its synonyms
    names = {None: None, NO_ANSWER: "nan"} | dict(enumerate(names))
    rows = [row._replace(**{b: names[getattr(row, a)] for a, b in NAMES.items()}) for row in rows]
    table, figures = get_table(rows), get_figures(rows, total, classes, weights)
    lines, csv_file = get_summary(title, figures, about, short), io.StringIO()
    csv.writer(csv_file).writerows([Row._fields, *rows])
    # JSON has no nan: null stands for it
    summary = json.loads(json.dumps(about | figures, default=vars), parse_constant=lambda _: None)
    start = f"{folder}/{'partial_' if figures['partial'] else ''}"
    for what, end, text in (
        ("table", "pictures.csv", csv_file.getvalue()),
        ("log", "log.txt", "\n".join([title, *get_log_lines(table, classes), *lines, ""])),
        ("summary", "summary.json", json.dumps(summary, indent=2) + "\n"),
    ):
        with whole_file(f"{start}{end}") as part:
            # the name of a file may have bytes that aren't UTF-8
            part.write_text(text, "utf-8", "backslashreplace", newline="")
        lines.append(f"{what}: {start}{end}")
    print(*lines, sep="\n", flush=True)
    draw("chart", f"{start}time.png", draw_times, table, figures, title)
    wrong = table[table.pytorch_rank > 1]
    surest = wrong[np.argsort(-wrong.pytorch_probability, kind="stable")][:SHEET]
    if len(wrong):
        draw("wrong pictures", f"{start}wrong.png", draw_wrong, surest, about, short, title)
    if not figures["partial"]:
        for path in folder.glob("partial_*"):
            path.unlink(missing_ok=True)
    return figures


def draw(what, path, function, *args):
    """Save what the function draws. A failure costs a line: the figures are written already."""
    try:
        from matplotlib import figure, rcParams  # pyplot would need a display, or a backend

        rcParams["text.parse_math"] = False  # a name may have two "$"
        sheet = figure.Figure(layout="constrained")
        with whole_file(path) as part, catch_warnings(record=True, action="always") as caught:
            function(sheet, *args)
            sheet.savefig(part)
        print(f"{what}: {path}")
        for warning in caught[:1]:  # of letters that no font has
            print(f"{path}: {warning.message} Install one that has it (fonts-noto-cjk)")
    except Exception as error:  # whatever matplotlib raises
        print(f"{path}: left out: {type(error).__name__}: {one_line(error)}")


def draw_times(figure, table, figures, title):
    """Draw the inference time of each batch, and the median."""
    figure.set_size_inches(10.8, 5.4)
    axes = figure.add_subplot(xlabel="batch", ylabel="ms per picture")
    axes.set_title(f"{title}: inference time, {len(table)} pictures")
    for color, (name, network) in zip(("C0", "C1"), NETWORKS.items(), strict=True):
        median = figures[name]["ms_median"]
        label = f"{network}: median {median:.2f} ms"
        axes.plot(table.batch, table[f"{name}_ms"], color, marker=".", label=label)
        axes.axhline(median, color=color, linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0, top=1.15 * axes.get_ylim()[1])
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)


def draw_wrong(figure, rows, about, names, title):
    """Draw the pictures of these rows with the names of their labels and of PyTorch's answers."""
    lines = -(-len(rows) // 4)
    figure.set_size_inches(12, 0.6 + 3.6 * lines)
    figure.suptitle(f"{title}: the surest of the wrong answers", fontsize=14)
    fonts = find_fonts(str(rows.tolist()))
    for place, row in enumerate(rows, 1):
        picture = read_picture(Path(about["pictures_root"], row.picture))[:, :, ::-1]
        answer = f"PyTorch: {100 * row.pytorch_probability:.0f} %, {names[row.pytorch_class]}"
        captions = [row.picture, f"label: {names[row.label]}", answer]
        captions = [text if len(text) <= 40 else f"{text[:20]}...{text[-17:]}" for text in captions]
        captions = ["".join(c if c.isprintable() else "?" for c in text) for text in captions]
        axes = figure.add_subplot(lines, 4, place, xticks=[], yticks=[], frame_on=False)
        axes.imshow(ImageOps.pad(Image.fromarray(picture), (400, 400), color="white"))
        caption = axes.set_xlabel("\n".join(captions), fontfamily=fonts)
        # 40 letters can be wider than a picture, which has 290 px
        caption.set_fontsize(10 * min(1, 280 / caption.get_window_extent().width))


def find_fonts(letters):
    """DejaVu Sans, and the families of installed fonts that have letters which it lacks."""
    from matplotlib.font_manager import findfont, fontManager, get_font

    missing = {*map(ord, letters)} - get_font(findfont("DejaVu Sans")).get_charmap().keys()
    fonts = [f for f in fontManager.ttflist if f.weight == 400] if missing else []
    found = {f.name for f in fonts if missing & get_font(f.fname).get_charmap().keys()}
    # the font of last resort has a box for everything
    return ["DejaVu Sans", *sorted(name for name in found if not name.startswith("Last Resort"))]
