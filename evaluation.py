"""The evaluation of both networks over labelled pictures, for py_to_py_cls.py.

Its result is a table with a row for each picture, logs/NAME_pictures.csv, and all figures come from
it. The rows are written while it runs: nothing that was evaluated is lost, and torchrun's processes
share the work.
"""

import contextlib
import csv
import ctypes
import datetime
import hashlib
import json
import os
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from classification import (
    PICTURE_SUFFIXES,
    RANDOM,
    RequestError,
    fit_labels,
    get_blob,
    read_lines,
    read_onnx,
    read_picture,
)
from common import SEED, NetworksDisagree, find_bundled, whole_file
from networks import run_pytorch
from test_config import CLS_TEST_DATA_DIR, IMAGENET_VAL_DIR, LOGS_DIR, TestClsModuleConfig
from verify import MAX_RELATIVE_ERROR, Difference, run_opencv, time_pass

# The prefixes of their columns in the table, and their names.
NETWORKS = {"pytorch": "PyTorch", "opencv": f"OpenCV {cv2.__version__}"}

ROLL_CALL = 10  # batches between checks that all processes are alive
MAX_SKIPPED = 0.01  # of the pictures: over that, an evaluation ends with exit code 1
SHOWN = 10  # pictures that the summary lists; the table has all


class TooManySkipped(RequestError):
    """Too many pictures can't be read: the figures are those of another set."""

    exit_code = 1


class Row(NamedTuple):
    """A picture in the table; None, an empty cell, is unknown."""

    number: int  # from 0, in the order of the labels
    picture: str  # its path from the folder of the pictures
    label: int
    pytorch_class: int = None
    opencv_class: int = None
    pytorch_rank: int = None  # of the label; 1: the network names it
    opencv_rank: int = None
    pytorch_probability: float = None  # softmax, of the class that the network names
    opencv_probability: float = None
    l1: float = None  # mean |a - b| of the logits
    l_inf: float = None  # max |a - b|
    peak: float = None  # max |a|, of PyTorch's
    pytorch_ms: float = None  # the batch's time per picture
    opencv_ms: float = None
    batch: int = None  # from 0
    warm_up: bool = None  # whether the batch is the first of a process, which is slower
    skipped: str = None  # why the picture can't be read


# --- the labelled pictures ------------------------------------------------------------------------


@dataclass
class Data:
    """The labelled pictures of an evaluation."""

    pictures: list  # (path from the root, class ID)
    root: str  # their folder
    bundled: bool = False  # whether they come with this project
    folders: list = ()  # the names of the class folders, if their order makes them classes 0, 1 ...


def get_data(config, named_root, named_labels, class_names):
    """The Data of a TestClsConfig, from class folders or a label file.

    named_root, named_labels: whether the user named the folder, the label file; if neither, the
    bundled pictures stand in for the tutorial's folder. class_names: lines of --classes, or None.
    """
    root = config.img_root_dir
    if not named_root and not named_labels and not Path(root).exists():
        root = find_bundled(CLS_TEST_DATA_DIR)
        print(f"no {IMAGENET_VAL_DIR} here: evaluating on the bundled pictures")
        return Data(read_val_file(os.path.join(root, "val.txt"), root), root, bundled=True)
    if not Path(root).is_dir():
        raise RequestError(f"--img_root_dir {root}: no such folder")
    folders = sorted(e.name for e in os.scandir(root) if e.is_dir() and e.name[0] != ".")
    found = [find_pictures(root, name) for name in folders]
    if not named_labels and not any(found) and not os.path.isfile(config.img_cls_file):
        raise RequestError(f"{root}: no pictures in folders in it, and no {config.img_cls_file}")
    if named_labels or not any(found):
        return Data(read_val_file(config.img_cls_file, root), root)
    named = get_class_ids(folders, class_names)
    class_ids = named or range(len(folders))  # check_evaluation wants all classes then
    pictures = [(name, c) for c, names in zip(class_ids, found, strict=True) for name in names]
    print(
        f"{root}: {len(pictures)} pictures in {len(folders)} classes: folder {folders[0]} is class "
        f"{class_ids[0]}, ..., {folders[-1]} is class {class_ids[-1]}"
    )
    return Data(pictures, root, folders=() if named else folders)


def find_pictures(root, name):
    """The pictures in a class folder and its subfolders, without hidden ones and links."""
    pictures = []
    for folder, subfolders, files in os.walk(os.path.join(root, name)):
        subfolders[:] = sorted(subfolder for subfolder in subfolders if subfolder[0] != ".")
        files = sorted(file for file in files if file.lower().endswith(PICTURE_SUFFIXES))
        pictures += [os.path.relpath(os.path.join(folder, file), root) for file in files]
    return pictures


def get_class_ids(folders, class_names):
    """The class IDs if all folders are named by numbers, or lines (first words) of --classes."""
    if all(name.isascii() and name.isdecimal() for name in folders):
        return [int(name) for name in folders]
    lines = [line.strip() for line in class_names or []]
    for known in (lines, [line.partition(" ")[0] for line in lines]):
        if all(known.count(name) == 1 for name in folders):
            return [known.index(name) for name in folders]
    return None


def read_val_file(path, root):
    """[(name of a picture, class ID)] from a file like ImageNet's val.txt: lines of "name ID"."""
    lines = [(number, line) for number, line in enumerate(read_lines(path), 1) if line.strip()]
    found = {}  # {name: (class ID, number of the line)}
    for number, line in lines:
        *name, label = line.rsplit(maxsplit=1)
        if not name or not (label.isascii() and label.isdecimal() and len(label) < 10):
            raise RequestError(f"{path}, line {number}: '{line[:60]}' is not 'name class-ID'")
        name = os.path.normpath(name[0])
        class_id, first = found.setdefault(name, (int(label), number))
        if class_id != int(label):
            raise RequestError(
                f"{path}: {name} is class {class_id} in line {first}, and {label} in line {number}"
            )
    if len(found) < len(lines):
        print(f"NOTE: {path}: {len(lines) - len(found)} lines repeat others, and count once")
    if not found:
        raise RequestError(f"{path}: no pictures in it; it takes lines of 'name class-ID'")
    missing = [name for name in found if not os.path.isfile(os.path.join(root, name))]
    if len(missing) > MAX_SKIPPED * len(found):
        raise RequestError(
            f"{path}: of {len(found)} pictures, {len(missing)} don't exist in {root}: "
            f"{', '.join(missing[:1])}; it takes lines of 'name class-ID'"
        )
    return [(name, class_id) for name, (class_id, _) in found.items()]


def check_evaluation(network, preprocessing, data, outputs, args):
    """Raise RequestError for an evaluation that is impossible, or whose figures mean nothing."""
    p, classes = preprocessing, max(outputs, 2)  # a single logit tells class 0 from class 1
    if data.bundled and classes != 1000:
        raise RequestError(
            f"the bundled pictures are of ImageNet's 1000 classes, and the network has {classes}: "
            "give --img_root_dir, --test True or --evaluate False"
        )
    if data.folders and len(data.folders) != classes:
        raise RequestError(
            f"{data.root}: {len(data.folders)} class folders for {classes} classes: name them by "
            "class IDs or by lines of a --classes file, or have one for each class"
        )
    for name, class_id in data.pictures:
        if class_id >= classes:
            raise RequestError(
                f"{name} has class ID {class_id}, but the network's classes are 0 to {classes - 1}"
            )
    get_class_names(data, outputs, args)
    if args.preprocess == "tutorial":
        if p.initial_width < p.width or p.initial_height < p.height:
            raise RequestError(f"--rsz_width or --rsz_height is less than --frame_size {p.width}")
        return
    if network.transforms is None:
        raise RequestError("--preprocess torchvision is for torchvision's networks: leave it out")
    fields = attrgetter("scale", "mean", "std", "initial_width", "initial_height")
    same = np.allclose(np.hstack(fields(p)), np.hstack(fields(network.preprocessing)))
    (cut,) = network.transforms.crop_size
    if not same or cut != p.width or args.bgr_to_rgb is False:
        raise RequestError(
            f"--preprocess torchvision cuts out {cut} pixels, in RGB, with the weights' mean and "
            "std: leave out the options that say otherwise"
        )


def get_class_names(data, outputs, args):
    """The names of the classes: --classes, the folders', or ImageNet's; [] if none fit."""
    if data.folders and not args.classes:
        return data.folders
    path = args.classes or find_bundled(TestClsModuleConfig.classes)
    return fit_labels(read_lines(path), args.classes, max(outputs, 2))


# --- a batch of pictures, and both networks' answers ----------------------------------------------


def get_centre_blob(picture, preprocessing):
    """(1, 3, height, width): the true centre of the resized picture, as torchvision cuts it.

    blobFromImage's crop would shrink the picture to the blob and cut nothing off a square.
    """
    p = preprocessing
    picture = cv2.resize(picture.astype(np.float32), (p.initial_width, p.initial_height))
    top, left = (p.initial_height - p.height) // 2, (p.initial_width - p.width) // 2
    centre = picture[top : top + p.height, left : left + p.width]
    return get_blob(centre, replace(p, initial_width=None, initial_height=None))


def get_torchvision_blob(picture, transforms):
    """The same by the transforms of the weights; torchvision's published accuracy is theirs."""
    import torch

    rgb = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    return transforms(torch.from_numpy(rgb).permute(2, 0, 1))[None].numpy()


def read_batch(rows, root, make_blob, workers, buffer):
    """(blob (pictures, 3, height, width), their rows, the rows of pictures that can't be read).

    The workers decode one picture each into the rows of `buffer`, which serves every batch: fresh
    memory would be scattered more and more.
    """

    def read(place, row):
        try:
            buffer[place] = make_blob(read_picture(os.path.join(root, row.picture)))[0]
        except RequestError as error:
            return row._replace(skipped=str(error))
        return row

    rows = list(workers.map(read, range(len(rows)), rows))
    places = [place for place, row in enumerate(rows) if row.skipped is None]
    blob = buffer[: len(rows)] if len(places) == len(rows) else buffer[places]
    return blob, [rows[place] for place in places], [row for row in rows if row.skipped]


def keep_large_blocks():
    """Have glibc keep the memory of a layer's output for the next layer.

    By default it returns blocks of that size to the kernel, and PyTorch spends up to half the time
    of a batch of 50 in page faults. That isn't PyTorch's fault, and a comparison mustn't charge it.
    Other platforms' allocators are left alone.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def choose_engine(converted, shape, engine):
    """OpenCV's inference engine: the one asked for, or the fastest of those that are right."""
    if engine not in ("auto", *converted.engines):
        raise RequestError(f"--engine {engine} doesn't give PyTorch's answer: leave it out")
    if engine != "auto":
        return engine
    few = min(8, shape[0])
    blob = np.random.default_rng(SEED).standard_normal((few, *shape[1:]), np.float32)
    ms = {}
    for name in converted.engines:
        net = read_onnx(converted.path, name)
        ms[name] = 1000 * time_pass(partial(run_opencv, net, blob)) / few
    fastest = min(ms, key=ms.get)
    timings = ", ".join(f"{name} {ms[name]:.1f} ms" for name in ms)
    print(f"OpenCV's engines: {timings} per picture; taking {fastest}", flush=True)
    return fastest


def evaluate_batch(networks, blob, rows):
    """The rows of a blob's pictures with both networks' answers.

    networks: {"pytorch": run, "opencv": run}. A single logit z is a binary classifier's: its
    sigmoid is the softmax of (0, z).
    """
    columns, logits = {}, {}
    labels = np.array([[row.label] for row in rows])
    for name, forward in networks.items():
        start = time.perf_counter()
        output = forward(blob)
        ms = 1000 * (time.perf_counter() - start) / len(rows)
        logits[name] = output.astype(np.float64)
        scores = np.pad(logits[name], ((0, 0), (1 if output.shape[1] == 1 else 0, 0)))
        order = np.argsort(-scores, axis=1, kind="stable")
        highest = scores.max(axis=1, keepdims=True)
        columns[f"{name}_class"] = order[:, 0]
        columns[f"{name}_rank"] = 1 + (order == labels).argmax(axis=1)
        columns[f"{name}_probability"] = 1 / np.exp(scores - highest).sum(axis=1)
        columns[f"{name}_ms"] = np.full(len(rows), ms)
    difference = np.abs(logits["pytorch"] - logits["opencv"])
    columns["l1"], columns["l_inf"] = difference.mean(axis=1), difference.max(axis=1)
    columns["peak"] = np.abs(logits["pytorch"]).max(axis=1)
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    answers = [dict(zip(columns, value, strict=True)) for value in values]
    return [row._replace(**answer) for row, answer in zip(rows, answers, strict=True)]


# --- nothing lost ---------------------------------------------------------------------------------
#
# While an evaluation runs, each process appends its rows to a running file of its own. The file's
# name has a hash of all that the figures depend on, and the engine; each line ends in a checksum. A
# batch is done if all its rows are there. So a run that was killed and resumed ends with the
# figures of one that was never stopped, and several processes end with those of one, as long as
# PyTorch's rounding doesn't depend on its number of threads.


def get_key(network, converted, preprocessing, data, config, args):
    """Everything that the figures depend on: only a run with the same key is resumed."""
    pictures = hashlib.sha256()
    for name, label in data.pictures:
        path = os.path.join(data.root, name)
        # not the pixels, which takes as long as decoding; nobody can set st_ctime_ns back
        s = os.stat(path) if os.path.isfile(path) else None
        changed = s and (s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        pictures.update(ascii((name, label, changed)).encode())
    return {
        "network": network.name,
        "weights": network.weights,
        "made_from": converted.made_from,
        "onnx": converted.load_info,
        "versions": {name: version(name) for name in ("torch", "torchvision", "numpy")},
        "pictures_root": data.root,
        "pictures_sha256": pictures.hexdigest(),
        "batch_size": config.batch_size,
        "preprocess": args.preprocess,
        "preprocessing": repr(preprocessing),
        "channels": "RGB" if preprocessing.rgb else "BGR",
        "engine_option": args.engine,
    }


def find_running(name, digest="[0-9a-f]" * 12):
    """The running files of evaluations with this name, and with this hash or any."""
    return sorted(Path(LOGS_DIR).glob(f"{name}_{digest}_*_*.csv"))


def append_rows(path, rows):
    """Add rows to a running file, and sync it to the disk in case the power fails."""
    # JSON's strings keep a name with a newline in one line
    lines = [json.dumps(row)[1:-1] for row in rows]
    text = "".join(f"{line}, {zlib.crc32(line.encode())}\n" for line in lines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="ascii") as file:
            file.write(f"\n{text}")  # ends a line that was cut
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RequestError(f"{path}: can't be written: {error.strerror}") from None


def collect_rows(paths, batches):
    """The rows of whole batches in the running files that all processes have found, in order."""
    found = {}
    for path in paths:
        for line in path.read_text("ascii", "replace").splitlines():
            text, _, checksum = line.rpartition(", ")
            if checksum == str(zlib.crc32(text.encode())):  # else it is damaged
                row = Row(*json.loads(f"[{text}]"))
                found[row.number] = row
    rows = {number: row for others in gather(found) for number, row in others.items()}
    whole = [batch for batch in batches if all(row.number in rows for row in batch)]
    return [rows[row.number] for batch in whole for row in batch]


# --- the figures ----------------------------------------------------------------------------------


def get_table(rows):
    """The pictures that were read, as NumPy's record array: table.l1, table[:50] ..."""
    return np.rec.fromrecords([row for row in rows if row.skipped is None], names=Row._fields)


def get_batches(table):
    """The part of the table that is each batch's."""
    return np.split(table, np.flatnonzero(np.diff(table.batch)) + 1)


def get_difference(table):
    """The Difference over all its pictures; the relative error is the largest of a batch's."""
    relative = [batch.l_inf.max() / max(batch.peak.max(), 1e-30) for batch in get_batches(table)]
    return Difference(
        l1=float(table.l1.mean()),
        l_inf=float(table.l_inf.max()),
        relative=float(np.max(relative)),  # np: nan wins
        same_class=int((table.pytorch_class == table.opencv_class).sum()),
        pictures=len(table),
    )


def get_figures(rows, total):
    """All the figures of the evaluation."""
    table = get_table(rows)
    figures = {"pictures": total, "read": len(table), "partial": len(rows) < total}
    figures["skipped"] = [[row.picture, row.skipped] for row in rows if row.skipped]
    timed = table if table.warm_up.all() else table[~table.warm_up]
    for name, title in NETWORKS.items():
        figures[title] = {
            "top1": 100 * int((table[f"{name}_rank"] <= 1).sum()) / len(table),
            "top5": 100 * int((table[f"{name}_rank"] <= 5).sum()) / len(table),
            "ms_mean": float(timed[f"{name}_ms"].mean()),
            "ms_median": float(np.median(timed[f"{name}_ms"])),
            "ms_p95": float(np.percentile(timed[f"{name}_ms"], 95)),
        }
    figures["difference"] = vars(get_difference(table))
    apart = table[table.pytorch_class != table.opencv_class]
    figures["disagreements"] = apart[["picture", "pytorch_class", "opencv_class"]].tolist()
    wrong = table[table.pytorch_rank > 1]
    pairs = Counter(wrong[["label", "pytorch_class"]].tolist())
    figures["confused"] = [[*pair, count] for pair, count in pairs.most_common(5)]
    return figures


def get_summary(title, figures, about, describe):
    """The lines that end the log and the output: what is odd, then a table of both networks."""
    skipped, apart, read = figures["skipped"], figures["disagreements"], figures["read"]
    lines = [f"skipped: {len(skipped)} pictures that can't be read"] if skipped else []
    lines += [f"* {reason}" for _, reason in skipped[:SHOWN]]
    lines += [f"not the same class: {len(apart)} pictures"] if apart else []
    lines += [f"* {name}: PyTorch {a}, OpenCV {b}" for name, a, b in apart[:SHOWN]]
    count = read if read == figures["pictures"] else f"{read} of {figures['pictures']}"
    header = f"{title}, {'PARTIAL: ' if figures['partial'] else ''}{count} pictures"
    width = max(len(header), 42)
    lines.append(f"{header:{width}}" + "".join(f"{name:>15}" for name in NETWORKS.values()))
    for label, key in (
        (f"top-1 accuracy, % of {read}", "top1"),
        (f"top-5 accuracy, % of {read}", "top5"),
        ("ms per picture, mean", "ms_mean"),
        ("ms per picture, median", "ms_median"),
        ("ms per picture, 95th percentile of batches", "ms_p95"),
    ):
        cells = "".join(f"{figures[name][key]:15.2f}" for name in NETWORKS.values())
        lines.append(f"{label:{width}}{cells}")
    for name, value in about["published"].items():
        lines.append(f"published by torchvision: {name} {value} %")
    lines.append(f"pictures: {about['pictures_root']}, channels in the order {about['channels']}")
    threads = ", ".join(f"{name} {n}" for name, n in about["threads"].items())
    each = f", in each of {about['processes']} processes" if about["processes"] > 1 else ""
    lines.append(f"OpenCV's engine: {about['engine']}; threads: {threads}{each}")
    lines.append(f"PyTorch vs OpenCV: {Difference(**figures['difference'])}")
    lines += ["most often confused, label -> PyTorch's answer:"] if figures["confused"] else []
    lines += [f"* {describe(a)} -> {describe(b)}: {n}" for a, b, n in figures["confused"]]
    return lines


def get_log_lines(table):
    """The tutorial's lines for each batch: accuracy so far, the batch's times and differences."""
    lines, done = [], 0
    for batch in get_batches(table):
        done += len(batch)
        for name, title in NETWORKS.items():
            ranks = table[f"{name}_rank"][:done]
            top1, top5 = (100 * (ranks <= k).mean() for k in (1, 5))
            lines.append(f"{done} Accuracy for {title}: top-1 {top1:.2f}, top-5 {top5:.2f}")
            lines.append(f"{done} Inference time, ms {title}: {batch[f'{name}_ms'][0]:.2f}")
        lines.append(f"{done} PyTorch vs OpenCV: {get_difference(batch)}")
    return lines


def draw_times(table, figures, title, path):
    """Draw the inference time of each batch, and the median, as a PNG."""
    # Figure, not pyplot: it needs no display and no choice of a backend
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="batch", ylabel="ms per picture", title=title)
    firsts = np.array([batch[0] for batch in get_batches(table)])
    for number, (name, network) in enumerate(NETWORKS.items()):
        median, color = figures[network]["ms_median"], f"C{number}"
        label = f"{network}: median {median:.2f} ms"
        axes.plot(firsts["batch"], firsts[f"{name}_ms"], color=color, marker=".", label=label)
        axes.axhline(median, color=color, linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0, top=1.15 * axes.get_ylim()[1])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    with whole_file(path) as part:
        figure.savefig(part, dpi=120)


def draw_wrong(table, root, describe, title, path):
    """Draw the twelve wrong pictures of which PyTorch was most sure; no file if none are."""
    from matplotlib.figure import Figure

    wrong = table[table.pytorch_rank > 1]
    if not len(wrong):
        path.unlink(missing_ok=True)
        return
    surest = wrong[np.argsort(-wrong.pytorch_probability, kind="stable")][:12]
    lines = -(-len(surest) // 4)
    figure = Figure(figsize=(12, 0.6 + 3.5 * lines), layout="constrained")
    figure.suptitle(title, fontsize=14)
    for place, row in enumerate(surest, 1):
        picture = cv2.cvtColor(read_picture(os.path.join(root, row.picture)), cv2.COLOR_BGR2RGB)
        zoom = 400 / max(picture.shape)
        axes = figure.add_subplot(lines, 4, place, box_aspect=1, xticks=[], yticks=[])
        axes.set_frame_on(False)
        axes.imshow(cv2.resize(picture, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA))
        axes.set_aspect("equal", adjustable="datalim")
        label, answer = describe(row.label)[:30], describe(row.pytorch_class)[:30]
        percent = 100 * row.pytorch_probability
        axes.set_xlabel(f"label: {label}\nPyTorch: {answer}, {percent:.0f} %", fontsize=12)
    with whole_file(path) as part:
        figure.savefig(part, dpi=100)


def write_results(name, rows, figures, about, class_names):
    """The table, log, JSON, chart and contact sheet in LOGS_DIR; the summary is printed as well."""
    ends = ("pictures.csv", "log.txt", "summary.json", "time.png", "wrong.png")
    csv_path, log, summary, chart, wrong = (Path(LOGS_DIR) / f"{name}_{end}" for end in ends)
    weights = about["weights"]
    title = f"{name}, {'RANDOM' if weights == RANDOM else weights} weights"

    def describe(class_id):
        return class_names.get(class_id, f"class {class_id}").partition(",")[0]

    table, lines = get_table(rows), get_summary(title, figures, about, describe)
    # backslashreplace: the name of a file may have bytes that aren't UTF-8
    how = {"encoding": "utf-8", "errors": "backslashreplace"}
    with whole_file(csv_path) as part, open(part, "w", newline="", **how) as file:
        csv.writer(file).writerows([Row._fields, *rows])
    with whole_file(log) as part:
        part.write_text("\n".join([title, *get_log_lines(table), *lines, ""]), **how)
    with whole_file(summary) as part:
        part.write_text(json.dumps(about | figures, indent=2) + "\n", "utf-8")
    draw_times(table, figures, f"{title}: inference time, {len(table)} pictures", chart)
    title = f"{title}: the surest of the wrong answers"
    draw_wrong(table, about["pictures_root"], describe, title, wrong)
    lines += [f"table: {csv_path}", f"log: {log}", f"summary: {summary}", f"chart: {chart}"]
    lines += [f"wrong pictures: {wrong}"] if wrong.exists() else []
    print(*lines, sep="\n", flush=True)


# --- many processes -------------------------------------------------------------------------------


def get_processes():
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def get_rank():
    """Which of torchrun's processes this one is; 0 without it."""
    return int(os.environ.get("RANK", 0))


def join_processes():
    """Join torchrun's processes, if there are several; only rank 0 prints from now on."""
    if get_processes() == 1:
        return
    import torch.distributed as dist

    # gloo notices by itself that a rank has died, but not that its machine has lost its power
    dist.init_process_group("gloo", timeout=datetime.timedelta(hours=1))
    if get_rank() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def gather(value):
    """[the `value` of each process, by rank]; also a barrier. RequestError if one has died."""
    if get_processes() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * get_processes()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError:
        raise RequestError("another process has ended; repeat the command to continue") from None
    return values


@contextlib.contextmanager
def first_process_first():
    """Rank 0 runs the block first, then one process per machine, then the others.

    What the first downloads and converts is then there for the others.
    """
    turn = 0 if get_rank() == 0 else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2
    for current in range(3):
        if current == turn:
            yield
        gather(None)


# --- the run --------------------------------------------------------------------------------------


def evaluate(network, converted, preprocessing, data, config, args):
    """Run both networks over the pictures and write the results.

    Resumes a stopped run with the same key. Raises NetworksDisagree if the networks do,
    TooManySkipped if too many pictures can't be read, and on Ctrl-C KeyboardInterrupt, after
    writing the results so far as partial.
    """
    import torch

    p = replace(preprocessing, rgb=config.bgr_to_rgb)
    key = get_key(network, converted, p, data, config, args)
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    # what differs from the defaults is in the name of the results, so no run replaces another's
    options = {args.preprocess: "tutorial", args.engine: "auto", key["channels"]: "RGB"}
    differs = [option for option, default in options.items() if option != default]
    name = "_".join([converted.path.stem, *differs])
    total = len(data.pictures)
    size = min(config.batch_size, total)
    rows = [Row(i, *picture, batch=i // size) for i, picture in enumerate(data.pictures)]
    batches = [rows[first : first + size] for first in range(0, total, size)]
    engine, done = resume(name, digest, batches, args)
    whole = {row.batch for row in done}
    missing = [batch for batch in batches if batch[0].batch not in whole]
    if done:
        print(f"resuming after {len(done)} of {total} pictures; --resume False starts over")

    make_blob = partial(get_centre_blob, preprocessing=p)
    if args.preprocess == "torchvision":
        make_blob = partial(get_torchvision_blob, transforms=network.transforms)
    keep_large_blocks()
    buffer = np.empty((size, 3, p.height, p.width), np.float32)
    engine = gather(get_rank() == 0 and choose_engine(converted, buffer.shape, engine))[0]
    net = read_onnx(converted.path, engine)
    network.model.to(memory_format=torch.channels_last)  # in which convolutions are fastest
    pytorch = partial(run_pytorch, network.model, memory_format=torch.channels_last)
    networks = {"pytorch": pytorch, "opencv": partial(run_opencv, net)}
    path = Path(LOGS_DIR) / f"{name}_{digest}_{engine}_{get_rank()}.csv"
    start = time.perf_counter()
    interrupted = run_batches(missing, data.root, networks, make_blob, buffer, path)
    seconds = time.perf_counter() - start

    rows = collect_rows(find_running(name, digest), batches)
    if not interrupted and all(row.skipped for row in rows):
        raise RequestError(f"none of the {total} pictures can be read: {rows[0].skipped}")
    if get_rank() == 0 and not all(row.skipped for row in rows):
        figures = get_figures(rows, total)
        about = {"engine": engine, "processes": get_processes(), "published": network.published}
        about["threads"] = {"PyTorch": torch.get_num_threads(), "OpenCV": cv2.getNumThreads()}
        about["seconds"] = seconds  # of this process's loop, since its last start
        names = dict(enumerate(get_class_names(data, converted.outputs, args)))
        write_results(f"{name}_partial" if interrupted else name, rows, figures, key | about, names)
    if interrupted:
        raise KeyboardInterrupt
    gather(None)  # the running files are kept until rank 0 has written the results
    for path in find_running(name, digest):
        path.unlink(missing_ok=True)
    if get_rank() == 0:
        check_figures(figures)


def resume(name, digest, batches, args):
    """(the engine to take, the rows that are there) of a run that may have been stopped."""
    running = find_running(name, digest)
    others = sorted({*find_running(name)} - {*running})
    if others:
        print(f"NOTE: {others[0]}: stopped with other pictures or options, and left alone")
    if not args.resume:
        for path in running:
            path.unlink(missing_ok=True)
        running = []
    engines = [path.stem.split("_")[-2] for found in gather(running) for path in found]
    return [*engines, args.engine][0], collect_rows(running, batches)


def run_batches(batches, root, networks, make_blob, buffer, path):
    """Evaluate this process's share of the batches; return whether Ctrl-C has ended it.

    batches: [[Row]]; buffer: for a whole batch's blob; path: the running file.
    """
    share = batches[get_rank() :: get_processes()]
    turns = -(-len(batches) // get_processes())  # the same number in each process
    interrupted = False
    hidden = None if get_rank() == 0 else True  # None: shown on a terminal
    with (
        ThreadPoolExecutor(os.cpu_count()) as workers,
        tqdm(total=sum(map(len, share)), unit=" pictures", disable=hidden) as bar,
    ):
        for turn in range(turns):
            if turn % ROLL_CALL == 0 and any(gather(interrupted)):
                break
            if interrupted or turn >= len(share):
                continue
            try:
                # decoding has all cores between the passes, and none during them
                rows = [row._replace(warm_up=turn == 0) for row in share[turn]]
                blob, read, skipped = read_batch(rows, root, make_blob, workers, buffer)
                append_rows(path, skipped + (evaluate_batch(networks, blob, read) if read else []))
                bar.update(len(rows))
            except KeyboardInterrupt:
                interrupted = True
    return any(gather(interrupted))


def check_figures(figures):
    """Raise if the finished evaluation failed: NetworksDisagree or TooManySkipped."""
    difference = Difference(**figures["difference"])
    # "not <=" and not ">", which would let nan pass. A tie that falls the other way isn't a fault.
    if not difference.relative <= MAX_RELATIVE_ERROR:
        raise NetworksDisagree(f"PyTorch and OpenCV disagree on these pictures: {difference}")
    skipped = len(figures["skipped"])
    if skipped > MAX_SKIPPED * figures["pictures"]:
        raise TooManySkipped(f"{skipped} of {figures['pictures']} pictures can't be read")
