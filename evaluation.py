"""The evaluation of both networks over labelled pictures, for py_to_py_cls.py.

Its result is a table with a row for each picture, logs/NAME_pictures.csv, and all figures come from
it. While it runs, the rows of each batch are kept in a file of their own, in a folder whose name
has a hash of all that the figures depend on. So a run that was killed and resumed ends with the
figures of one that was never stopped, and several processes end with those of one, as long as
PyTorch's rounding doesn't depend on its number of threads.
"""

import atexit
import contextlib
import csv
import ctypes
import datetime
import json
import os
import shutil
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from classification import ENGINES, RANDOM, RequestError, get_blob, read_picture
from common import NetworksDisagree, get_hash, whole_file
from labelled_pictures import MAX_SKIPPED, fit_labels
from networks import run_pytorch
from preprocessing import run_transform
from test_config import LOGS_DIR
from transforms import read_pil
from verify import MAX_RELATIVE_ERROR, Difference, run_opencv

# The prefixes of their columns in the table, and their names.
NETWORKS = {"pytorch": "PyTorch", "opencv": f"OpenCV {cv2.__version__}"}

# torchrun's: how many processes it has started, and which this one is.
PROCESSES, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))

ROLL_CALL = 10  # batches between checks that all processes are alive
SHOWN = 10  # pictures that the summary lists; the table has all


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


def check_evaluation(network, data, outputs, args):
    """Raise RequestError for an evaluation that is impossible, or whose figures mean nothing."""
    p = get_preprocessing(network, args)
    classes = max(outputs, 2)  # a single logit tells class 0 from class 1
    if data.bundled and classes != 1000:
        problem = f"the bundled pictures are of ImageNet's 1000 classes, the network has {classes}"
        raise RequestError(f"{problem}: give --img_root_dir, --test True or --evaluate False")
    if data.folders and len(data.folders) != classes:
        problem = f"{data.root}: {len(data.folders)} class folders for {classes} classes"
        raise RequestError(f"{problem}: name them by IDs or lines of --classes, or have one each")
    for name, class_id in data.pictures:
        if class_id >= classes:
            problem = f"{name} has class ID {class_id}"
            raise RequestError(f"{problem}, but the network's classes are 0 to {classes - 1}")
    fit_labels(data.names, args.classes, classes)
    if args.preprocess == "tutorial" and (p.initial_width < p.width or p.initial_height < p.height):
        raise RequestError(f"--rsz_width or --rsz_height is less than {p.width}x{p.height} pixels")
    if args.preprocess == "transform" and network.transform is None:
        problem = "--preprocess transform compares with the network's transform"
        raise RequestError(f"{problem}, and there is none for this size: give --transform")


def get_preprocessing(network, args):
    """The Preprocessing of --preprocess; the tutorial's has 256/224 of the size, and no resize."""
    p = args.preprocessing
    if args.preprocess != "tutorial":
        return p
    width, height = args.rsz_width or p.width * 256 // 224, args.rsz_height or p.height * 256 // 224
    return replace(p, resize=(), initial_width=width, initial_height=height)


def get_own_blob(path, preprocessing):
    """(3, height, width) of a picture, as classification.py prepares it."""
    return get_blob(read_picture(path), preprocessing)[0]


def get_tutorial_blob(path, preprocessing):
    """The same: the true centre of the picture resized by cv2.

    blobFromImage's crop would shrink the picture to the blob and cut nothing off a square.
    """
    p = preprocessing
    size = p.initial_width, p.initial_height
    picture = cv2.resize(read_picture(path).astype(np.float32), size)
    top, left = (p.initial_height - p.height) // 2, (p.initial_width - p.width) // 2
    centre = picture[top : top + p.height, left : left + p.width]
    return get_blob(centre, replace(p, initial_width=None, initial_height=None))[0]


def get_both_blobs(path, preprocessing, transform):
    """(6, height, width): the transform's of a picture, for PyTorch; ours of it, for OpenCV."""
    ours = get_own_blob(path, preprocessing)
    return np.concatenate([run_transform(transform, read_pil(path)), ours])


def read_batch(rows, root, make_blob, workers, buffer):
    """(blob (pictures, 3, height, width), their rows, the rows of pictures that can't be read).

    The workers decode one picture each into the rows of `buffer`, which serves every batch: fresh
    memory would be scattered more and more.
    """

    def read(place, row):
        try:
            buffer[place] = make_blob(os.path.join(root, row.picture))
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
    of a batch of 50 in page faults, which a comparison mustn't charge it.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def evaluate_batch(networks, blob, rows):
    """The rows of a blob's pictures with both networks' answers.

    networks: {"pytorch": run, "opencv": run}. A single logit z is a binary classifier's: its
    sigmoid is the softmax of (0, z).
    """
    columns, logits = {}, {}
    labels = np.array([[row.label] for row in rows])
    for name, forward in networks.items():
        start = time.perf_counter()
        # the transform's pictures and ours, or the same ones
        part = np.ascontiguousarray(blob[:, :3] if name == "pytorch" else blob[:, -3:])
        logits[name] = forward(part)
        columns[f"{name}_ms"] = np.full(len(rows), 1000 * (time.perf_counter() - start) / len(rows))
        scores = logits[name].astype(np.float64)
        scores = np.pad(scores, ((0, 0), (1 if scores.shape[1] == 1 else 0, 0)))
        order = np.argsort(-scores, axis=1, kind="stable")
        columns[f"{name}_class"] = order[:, 0]
        columns[f"{name}_rank"] = 1 + (order == labels).argmax(axis=1)
        highest = scores.max(axis=1, keepdims=True)
        columns[f"{name}_probability"] = 1 / np.exp(scores - highest).sum(axis=1)
    difference = np.abs(logits["pytorch"].astype(np.float64) - logits["opencv"])
    columns["l1"], columns["l_inf"] = difference.mean(axis=1), difference.max(axis=1)
    columns["peak"] = np.abs(logits["pytorch"]).max(axis=1)
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    answers = [dict(zip(columns, value, strict=True)) for value in values]
    return [row._replace(**answer) for row, answer in zip(rows, answers, strict=True)]


def get_key(network, converted, preprocessing, data, config, args):
    """Everything that the figures depend on: only a run with the same key is resumed."""
    pictures = []
    for name, label in data.pictures:
        path = os.path.join(data.root, name)
        # not the pixels, which takes as long as decoding; nobody can set st_ctime_ns back
        s = os.stat(path) if os.path.isfile(path) else None
        pictures.append((name, label, s and (s.st_size, s.st_mtime_ns, s.st_ctime_ns)))
    return {
        "network": network.request.name,
        "weights": network.weights,
        "made_from": converted.made_from,
        "onnx": converted.load_info,
        "engine": choose_engine(converted, args.engine),
        "versions": {name: version(name) for name in ("torch", "torchvision", "numpy")},
        "pictures_root": data.root,
        "pictures_sha256": get_hash(pictures),
        "batch_size": config.batch_size,
        "preprocess": args.preprocess,
        "preprocessing": repr(preprocessing),
        "channels": "RGB" if preprocessing.rgb else "BGR",
    }


def choose_engine(converted, engine):
    """OpenCV's inference engine: the one asked for, or the fastest of those that are right."""
    if engine not in ("auto", *converted.engines):
        raise RequestError(f"--engine {engine} doesn't give PyTorch's answer: leave it out")
    # two machines may have found different ones
    return gather(converted.engines[0] if engine == "auto" else engine)[0]


def write_batch(folder, rows):
    """Keep the rows of a batch. The file's name has the batch's number and a checksum."""
    text = json.dumps(rows)
    with whole_file(folder / f"{rows[0].batch}-{zlib.crc32(text.encode())}.json") as part:
        part.write_text(text, "ascii")


def read_batches(folder):
    """{number of a batch: its rows} of those that all processes have kept, in order."""
    found = {}
    for path in folder.glob("*.json"):
        number, _, checksum = path.stem.partition("-")
        text = path.read_text("ascii", "replace")
        if checksum == str(zlib.crc32(text.encode())):  # else it is damaged
            found[int(number)] = [Row(*row) for row in json.loads(text)]
    return dict(sorted(item for others in gather(found) for item in others.items()))


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
    same_class = int((table.pytorch_class == table.opencv_class).sum())
    return Difference(l1, l_inf, float(np.max(relative)), same_class, len(table))  # np: nan wins


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


def get_summary(title, figures, about, names):
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
    lines += [f"* {names[a]} -> {names[b]}: {n}" for a, b, n in figures["confused"]]
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
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    with whole_file(path) as part:
        figure.savefig(part, dpi=120)


def draw_wrong(table, root, names, title, path):
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
        label, answer = names[row.label][:30], names[row.pytorch_class][:30]
        percent = 100 * row.pytorch_probability
        axes.set_xlabel(f"label: {label}\nPyTorch: {answer}, {percent:.0f} %", fontsize=12)
    with whole_file(path) as part:
        figure.savefig(part, dpi=100)


def write_results(name, rows, figures, about, names):
    """The table, log, JSON, chart and contact sheet in LOGS_DIR; the summary is printed as well."""
    ends = ("pictures.csv", "log.txt", "summary.json", "time.png", "wrong.png")
    paths = [Path(LOGS_DIR) / f"{name}_{end}" for end in ends]
    csv_path, log, summary, chart, wrong = paths
    weights = about["weights"]
    title = f"{name}, {'RANDOM' if weights == RANDOM else weights} weights"
    names = [name.partition(",")[0] for name in names]  # the first of its synonyms
    table, lines = get_table(rows), get_summary(title, figures, about, names)
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
    draw_wrong(table, about["pictures_root"], names, title, wrong)
    kinds = ("table", "log", "summary", "chart", "wrong pictures")
    lines += [f"{kind}: {path}" for kind, path in zip(kinds, paths, strict=True) if path.exists()]
    print(*lines, sep="\n", flush=True)


def join_processes():
    """Join torchrun's processes, if there are several; only rank 0 prints from now on."""
    if PROCESSES == 1:
        return
    import torch.distributed as dist

    # gloo notices by itself that a rank has died, but not that its machine has lost its power
    dist.init_process_group("gloo", timeout=datetime.timedelta(hours=1))
    # seen once in PyTorch 2.15: signal 6 at the end of a process, by its message over a thread of
    # C++ that still ran, while nothing had left the group
    atexit.register(dist.destroy_process_group)
    if RANK != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def gather(value):
    """[the `value` of each process, by rank]; also a barrier. RequestError if one has died."""
    if PROCESSES == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * PROCESSES
    try:
        dist.all_gather_object(values, value)
    except RuntimeError:
        raise RequestError("another process has ended; repeat the command to continue") from None
    return values


@contextlib.contextmanager
def first_process_first():
    """On each machine one process runs the block first: the others find what it has converted."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_first:
        gather(None)  # until the first has converted
    yield
    if is_first:
        gather(None)
    gather(None)  # until all have found it


def evaluate(network, converted, data, config, args):
    """Run both networks over the pictures and write the results.

    Resumes a stopped run with the same key. Raises NetworksDisagree if the networks do,
    RequestError if too many pictures can't be read, and on Ctrl-C KeyboardInterrupt, after writing
    the results so far as partial.
    """
    import torch

    p, total = get_preprocessing(network, args), len(data.pictures)
    key = get_key(network, converted, p, data, config, args)
    # these three are in the name of the results, if they differ from the defaults
    options = {args.preprocess: "own", args.engine: "auto", key["channels"]: "RGB"}
    differs = [option for option, default in options.items() if option != default]
    name = "_".join([converted.path.stem, *differs])
    size = min(config.batch_size, total)
    rows = [Row(i, *picture, batch=i // size) for i, picture in enumerate(data.pictures)]
    batches = [rows[first : first + size] for first in range(0, total, size)]
    folder = Path(LOGS_DIR) / f"{name}_{get_hash(key)[:12]}"
    done = resume(folder, name, total, args.resume)
    missing = [batch for batch in batches if batch[0].batch not in done]

    make_blob = partial(get_own_blob, preprocessing=p)
    if args.preprocess == "tutorial":
        make_blob = partial(get_tutorial_blob, preprocessing=p)
    if args.preprocess == "transform":
        make_blob = partial(get_both_blobs, preprocessing=p, transform=network.transform)
    keep_large_blocks()
    channels = 6 if args.preprocess == "transform" else 3
    buffer = np.empty((size, channels, p.height, p.width), np.float32)
    network.model.to(memory_format=torch.channels_last)  # in which convolutions are fastest
    net = cv2.dnn.readNetFromONNX(str(converted.path), ENGINES[key["engine"]])
    networks = {"pytorch": partial(run_pytorch, network.model), "opencv": partial(run_opencv, net)}
    start = time.perf_counter()
    interrupted = run_batches(missing, data.root, networks, make_blob, buffer, folder)
    seconds = time.perf_counter() - start

    rows = [row for rows in read_batches(folder).values() for row in rows]
    if not interrupted and all(row.skipped for row in rows):
        raise RequestError(f"none of the {total} pictures can be read: {rows[0].skipped}")
    if RANK == 0 and not all(row.skipped for row in rows):
        figures = get_figures(rows, total)
        about = key | {"processes": PROCESSES, "published": network.published}
        about["threads"] = {"PyTorch": torch.get_num_threads(), "OpenCV": cv2.getNumThreads()}
        about["seconds"] = seconds  # of this process's loop, since its last start
        names = [f"class {i}" for i in range(max(converted.outputs, 2))]
        names = fit_labels(data.names, args.classes, len(names)) or names
        write_results(f"{name}_partial" if interrupted else name, rows, figures, about, names)
    if interrupted:
        raise KeyboardInterrupt
    gather(None)  # the batches are kept until rank 0 has written the results
    shutil.rmtree(folder, ignore_errors=True)
    if RANK == 0:
        check_figures(figures, args.preprocess != "transform")


def resume(folder, name, total, is_wanted):
    """The batches of a run that was stopped; none if there are none, or if they aren't wanted."""
    others = {*Path(LOGS_DIR).glob(f"{name}_{'[0-9a-f]' * 12}")} - {folder}
    if others:
        print(f"NOTE: {min(others)}: stopped with other pictures or options, and left alone")
    if not is_wanted:
        shutil.rmtree(folder, ignore_errors=True)
    gather(None)  # before another process reads what this one deletes
    done = read_batches(folder)
    if done:
        count = sum(map(len, done.values()))
        print(f"resuming after {count} of {total} pictures; --resume False starts over")
    return done


def run_batches(batches, root, networks, make_blob, buffer, folder):
    """Evaluate this process's share of the batches; return whether Ctrl-C has ended it.

    batches: [[Row]]; buffer: for a whole batch's blob; folder: where the batches are kept.
    """
    share = batches[RANK::PROCESSES]
    turns = -(-len(batches) // PROCESSES)  # the same number in each process
    interrupted = False
    hidden = None if RANK == 0 else True  # None: shown on a terminal
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
                read = evaluate_batch(networks, blob, read) if read else []
                write_batch(folder, sorted(skipped + read))
                bar.update(len(rows))
            except KeyboardInterrupt:
                interrupted = True
    return any(gather(interrupted))


def check_figures(figures, judged):
    """Raise NetworksDisagree if that is judged, or RequestError if too many were skipped."""
    difference = Difference(**figures["difference"])
    # "not <=" and not ">", which would let nan pass. A tie that falls the other way isn't a fault.
    if judged and not difference.relative <= MAX_RELATIVE_ERROR:
        raise NetworksDisagree(f"PyTorch and OpenCV disagree on these pictures: {difference}")
    skipped = len(figures["skipped"])
    if skipped > MAX_SKIPPED * figures["pictures"]:
        error = RequestError(f"{skipped} of {figures['pictures']} pictures can't be read")
        error.exit_code = 1
        raise error
