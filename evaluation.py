"""The evaluation of both networks over labelled pictures, for py_to_py_cls.py.

Accuracy, inference time and how far the answers are apart, batch by batch; nothing that was
evaluated is lost, and torchrun's processes share the batches.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import glob
import hashlib
import json
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from common import (
    PICTURE_SUFFIXES,
    SEED,
    NetworksDisagree,
    RequestError,
    find_bundled,
    get_blob,
    read_lines,
    read_onnx,
    read_picture,
    whole_file,
)
from conversion import get_key, hash_graph
from networks import get_torchvision_weights, get_transforms, is_own, run_pytorch
from test_config import CLS_TEST_DATA_DIR, IMAGENET_VAL_DIR, LOGS_DIR
from verify import MAX_RELATIVE_ERROR, Difference, compare, run_opencv

NETWORKS = ("PyTorch", f"OpenCV {cv2.__version__}")

ROLL_CALL = 10  # batches between checks that all processes are alive
MAX_SKIPPED = 0.01  # of the pictures: over that, an evaluation ends with exit code 1


# The rows of the summary: the keys of each network's figures.
ROWS = {
    "top-1 accuracy, %": "top1",
    "top-5 accuracy, %": "top5",
    "ms per picture, mean": "ms_mean",
    "ms per picture, median": "ms_median",
    "ms per picture, 95th percentile": "ms_p95",
}


class TooManySkipped(RequestError):
    """Too many pictures can't be read: the figures are those of another set."""

    exit_code = 1


# --- the labelled pictures ------------------------------------------------------------------------


@dataclass
class Data:
    """The labelled pictures of an evaluation."""

    pictures: list  # (path, class ID)
    root: str  # their folder
    bundled: bool  # whether they come with this project


def get_data(config, named_root, named_labels):
    """The Data of a TestClsConfig, from a label file or from class folders.

    named_root, named_labels: whether the user named the folder, the label file. The bundled
    pictures stand in only for the tutorial's own folder, and only if the user named nothing.
    """
    root, label_file = config.img_root_dir, config.img_cls_file
    if not named_root and not named_labels and not Path(root).exists():
        root = find_bundled(CLS_TEST_DATA_DIR)
        print(f"no {IMAGENET_VAL_DIR} here: evaluating on the bundled pictures")
        return Data(read_val_file(os.path.join(root, "val.txt"), root), root, True)
    if not Path(root).is_dir():
        raise RequestError(
            f"{root}: no such folder; --img_root_dir takes the folder of the pictures"
        )
    if not named_labels and not any(map(is_picture_name, os.listdir(root))):
        return Data(read_class_folders(root), root, False)
    return Data(read_val_file(label_file, root), root, False)


def is_picture_name(name):
    return name.lower().endswith(PICTURE_SUFFIXES)


def read_class_folders(root):
    """[(path, class ID)] from one folder per class; sorted, they are the classes 0, 1, 2 ...

    The layout of torchvision.datasets.ImageFolder: pictures may be deeper inside.
    """
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    classes = [name for name in names if not name.startswith(".")]
    if len(classes) < len(names):
        print(f"{root}: skipping hidden folders, {', '.join(sorted({*names} - {*classes}))}")
    pictures = []
    real_root = os.path.realpath(root)
    seen = {os.path.realpath(os.path.join(root, name)) for name in classes}
    for class_id, name in enumerate(classes):
        top = os.path.join(root, name)
        for folder, subfolders, files in os.walk(top, followlinks=True):
            real = os.path.realpath(folder)
            # a link to a folder that was visited, or to one above: its pictures count once
            if folder != top and (real in seen or os.path.commonpath([real, real_root]) == real):
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            pictures += [
                (os.path.join(folder, f), class_id) for f in sorted(files) if is_picture_name(f)
            ]
    if not pictures:
        raise RequestError(f"{root}: no pictures and no folders of pictures in it")
    print(
        f"{root}: {len(pictures)} pictures in {len(classes)} classes: folder {classes[0]} is class "
        f"0, ..., {classes[-1]} is class {len(classes) - 1}"
    )
    return pictures


def read_val_file(path, root):
    """[(path of the picture, class ID)] from a file like ImageNet's val.txt: lines of "name ID"."""
    lines = read_lines(path)
    pictures = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        *name, label = line.rsplit(maxsplit=1)
        if not name or not (label.isascii() and label.isdecimal() and len(label) < 10):
            raise RequestError(f"{path}, line {number}: '{line[:60]}' is not 'name class-ID'")
        pictures.append((os.path.join(root, name[0]), int(label)))
    if not pictures:
        raise RequestError(f"{path}: no pictures in it; it takes lines of 'name class-ID'")
    return pictures


def check_class_ids(pictures, classes):
    """Raise RequestError if a label isn't one of the network's `classes`."""
    for path, class_id in pictures:
        if class_id >= classes:
            raise RequestError(
                f"{path} has class ID {class_id}, but the network's {classes} classes are "
                f"0 to {classes - 1}; give its own pictures with --img_root_dir, and their labels"
            )


def get_data_fingerprint(pictures, root):
    """SHA-256 over the pictures' names, sizes and labels, and one over when they were changed.

    The first tells a copy of a data set from another set, the second whether it was touched since.
    The pictures themselves aren't read: that would take as long as decoding them.
    """
    data, times = hashlib.sha256(), hashlib.sha256()
    for path, class_id in pictures:
        name = os.path.relpath(path, root)
        size = times_ns = None
        if os.path.isfile(path):
            status = os.stat(path)
            # st_ctime_ns: nobody can set it back, as cp --preserve does with the time of change
            size, times_ns = status.st_size, (status.st_mtime_ns, status.st_ctime_ns)
        data.update(f"{name}\n{size}\n{class_id}\n".encode(errors="surrogateescape"))
        times.update(f"{times_ns}\n".encode())
    return {"data_sha256": data.hexdigest(), "data_times_sha256": times.hexdigest()}


# --- preprocessing --------------------------------------------------------------------------------


def get_centre_blob(picture, preprocessing):
    """(1, 3, height, width): the true centre of the resized picture, as torchvision cuts it.

    blobFromImage's crop would shrink the picture to the blob and cut nothing off a square.
    """
    p = preprocessing
    picture = cv2.resize(picture.astype(np.float32), (p.initial_width, p.initial_height))
    top, left = (p.initial_height - p.height) // 2, (p.initial_width - p.width) // 2
    centre = picture[top : top + p.height, left : left + p.width]
    return get_blob(centre, dataclasses.replace(p, initial_width=None, initial_height=None))


def get_torchvision_blob(picture, transforms):
    """The same by the transforms of the weights; torchvision's published accuracy is theirs."""
    import torch

    rgb = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    return transforms(torch.from_numpy(rgb).permute(2, 0, 1))[None].numpy()


def get_blob_maker(network, preprocessing, how):
    """(picture -> blob, its description for the key) for --preprocess tutorial or torchvision."""
    p = preprocessing
    if how == "torchvision":
        if is_own(network.name):
            raise RequestError(
                "--preprocess torchvision is for torchvision's networks: leave it out, and give "
                "the preprocessing options"
            )
        transforms = get_transforms(network.name, network.weights)
        if transforms.crop_size != [p.width]:
            raise RequestError(
                f"--preprocess torchvision cuts {transforms.crop_size[0]} pixels, and the frame "
                f"size is {p.width}: leave one of the two options out"
            )
        return lambda picture: get_torchvision_blob(picture, transforms), str(transforms)
    for side in ("width", "height"):
        resized, cut = getattr(p, f"initial_{side}"), getattr(p, side)
        if resized is None or resized < cut:
            raise RequestError(
                f"--rsz_{side} {resized} is less than --frame_size {cut}, which is cut out of the "
                "resized picture"
            )
    return lambda picture: get_centre_blob(picture, p), repr(p)


def read_batch(batch, make_blob, workers, buffer):
    """(blob, labels, names, skipped) of [(path, class ID)]: blob (pictures, 3, height, width).

    The workers decode one picture each into the rows of `buffer`, which serves every batch: fresh
    memory would be scattered more and more. What can't be read is skipped, as [path, reason].
    """

    def read(row, path):
        try:
            buffer[row] = make_blob(read_picture(path))[0]
        except RequestError as error:
            return str(error)
        return None

    paths = [path for path, _ in batch]
    reasons = list(workers.map(read, range(len(batch)), paths))
    rows = [row for row, reason in enumerate(reasons) if reason is None]
    skipped = [[p, reason] for p, reason in zip(paths, reasons, strict=True) if reason is not None]
    blob = buffer[: len(batch)] if not skipped else buffer[rows]
    return blob, [batch[row][1] for row in rows], [paths[row] for row in rows], skipped


# --- the two networks -----------------------------------------------------------------------------


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


def prepare_pytorch(model):
    """run(blob) -> logits, in the memory layout in which PyTorch's convolutions are fastest."""
    import torch

    model.to(memory_format=torch.channels_last)
    return lambda blob: run_pytorch(model, blob, memory_format=torch.channels_last)


def choose_engine(converted, blob, engine):
    """OpenCV's inference engine: the one asked for, or the fastest of those that are right.

    Each has one pass to warm up and one that counts.
    """
    if engine != "auto":
        if engine not in converted.engines:
            raise RequestError(
                f"--engine {engine} doesn't give PyTorch's answer with {converted.path}: leave it "
                "out"
            )
        return engine
    seconds = {}
    for name in converted.engines:
        net = read_onnx(converted.path, name)
        run_opencv(net, blob)
        start = time.perf_counter()
        run_opencv(net, blob)
        seconds[name] = time.perf_counter() - start
    name = min(seconds, key=seconds.get)
    timings = ", ".join(f"{n} {s * 1000 / len(blob):.1f} ms" for n, s in seconds.items())
    print(f"OpenCV's engines: {timings} per picture; taking {name}", flush=True)
    return name


def evaluate_batch(networks, blob, labels, names):
    """One record of the evaluation: what a batch adds to the figures.

    networks: {"PyTorch": run, "OpenCV": run}; labels and names as in `blob`'s rows.
    """
    logits, record = {}, {"pictures": len(labels)}
    for network, forward in networks.items():
        start = time.perf_counter()
        logits[network] = forward(blob)
        seconds = time.perf_counter() - start
        record[network] = {
            "top1": count_correct(logits[network], labels, 1),
            "top5": count_correct(logits[network], labels, 5),
            "ms": seconds * 1000 / len(labels),
        }
    record["difference"] = dataclasses.asdict(compare(*logits.values()))
    classes = [values.argmax(axis=1).tolist() for values in logits.values()]
    record["disagreements"] = [
        [name, a, b] for name, a, b in zip(names, *classes, strict=True) if a != b
    ]
    return record


def count_correct(logits, labels, k):
    """How many rows of `logits` have their label among the k highest."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return int((best == np.array(labels)[:, None]).any(axis=1).sum())


# --- nothing lost ---------------------------------------------------------------------------------
#
# Each finished batch is a line of JSON in a state file, whose name contains a hash of all that
# the figures depend on. All figures are computed from these records, in the order of the batches.
# So a run that was killed and resumed ends with the figures of one that was never stopped, and
# several processes end with those of one, as long as PyTorch's rounding doesn't depend on its
# number of threads.


def get_evaluation_key(network, converted, shape, described, data, config, args):
    """Everything that the figures depend on: only a run with the same key is resumed."""
    return get_key(network, shape) | {
        "onnx_sha256": hash_graph(converted.path),
        "data": data.root,
        **get_data_fingerprint(data.pictures, data.root),
        "batch_size": config.batch_size,
        "preprocess": args.preprocess,
        "preprocessing": described,
        "engine_option": args.engine,
    }


def find_states(stem, key):
    """(state file of this process, state files of this run that are there already)."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    found = sorted(Path(LOGS_DIR).glob(f"{glob.escape(stem)}_{digest}_*.state"))
    return Path(LOGS_DIR) / f"{stem}_{digest}_{get_rank()}.state", found


def read_state(path):
    """(engine, {batch: record}) of a state file, without broken lines."""
    records, engine = {}, None
    with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # cut by a power failure
                continue
            if "engine" in record:
                engine = record["engine"]
            else:
                records[record["batch"]] = record
    return engine, records


def append_state(path, record):
    """Add a line to the state file, and sync it to the disk in case the power fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            # a broken last line must not swallow this one
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RequestError(
            f"{path}: can't be written: {error.strerror}; what was evaluated before is kept: "
            "repeat the command to continue"
        ) from None


# --- the figures ----------------------------------------------------------------------------------


def combine(differences):
    """The Difference over all batches; L1 is the mean over all pictures."""
    pictures = sum(d.pictures for d in differences)
    return Difference(
        l1=sum(d.l1 * d.pictures for d in differences) / pictures,
        l_inf=max(d.l_inf for d in differences),
        relative=float(np.max([d.relative for d in differences])),  # np: nan wins
        same_class=sum(d.same_class for d in differences),
        pictures=pictures,
    )


def get_times(records, network):
    """ms per picture of each batch, without the first of each process, if there are others."""
    times = [r[network]["ms"] for r in records if network in r and not r["warm_up"]]
    return times or [r[network]["ms"] for r in records if network in r]


def get_figures(records, total, published):
    """All the figures of the evaluation, from the records in the order of their batches."""
    records = [records[batch] for batch in sorted(records)]
    skipped = [item for r in records for item in r["skipped"]]
    figures = {
        "pictures": total,
        "read": sum(r["pictures"] for r in records),
        "skipped": skipped,
        "partial": sum(r["pictures"] + len(r["skipped"]) for r in records) < total,
        "published": published,
    }
    for network in NETWORKS:
        times = get_times(records, network)
        figures[network] = {
            f"top{k}": 100
            * sum(r[network][f"top{k}"] for r in records if network in r)
            / figures["read"]
            for k in (1, 5)
        } | {
            "ms_mean": float(np.mean(times)),
            "ms_median": float(np.median(times)),
            "ms_p95": float(np.percentile(times, 95)),
        }
    differences = [Difference(**r["difference"]) for r in records if "difference" in r]
    figures["difference"] = dataclasses.asdict(combine(differences))
    figures["disagreements"] = [item for r in records for item in r.get("disagreements", [])]
    return figures


def get_summary(title, figures, about):
    """The lines that end the log and the output: a table of both networks, and what differs."""
    read, total = figures["read"], figures["pictures"]
    count = f"{read}" if read == total else f"{read} of {total}"
    rows = [[f"{title}, {'PARTIAL: ' if figures['partial'] else ''}{count} pictures", *NETWORKS]]
    for label, key in ROWS.items():
        rows.append([label, *(f"{figures[network][key]:.2f}" for network in NETWORKS)])
    rows.append(["threads", *map(str, about["threads"].values())])
    width = max(len(row[0]) for row in rows)
    lines = ["  ".join([row[0].ljust(width), *(c.rjust(13) for c in row[1:])]) for row in rows]
    if figures["published"]:
        published = ", ".join(f"{k} {v} %" for k, v in figures["published"].items())
        lines.append(f"published by torchvision: {published}")
    each = f", in each of {about['processes']} processes" if about["processes"] > 1 else ""
    lines.append(f"OpenCV's engine: {about['engine']}{each}")
    lines.append(f"PyTorch vs OpenCV: {Difference(**figures['difference'])}")
    for name, a, b in figures["disagreements"]:
        lines.append(f"* not the same class: {name}: PyTorch {a}, OpenCV {b}")
    if figures["skipped"]:
        lines.append(f"skipped: {len(figures['skipped'])} pictures that can't be read")
        lines += [f"* {reason}" for _, reason in figures["skipped"]]
    return lines


def get_log_lines(records):
    """The tutorial's lines for each batch: accuracy and differences so far, the batch's times."""
    lines, done, correct = [], 0, {network: [0, 0] for network in NETWORKS}
    for batch in sorted(records):
        record = records[batch]
        done += record["pictures"]
        for network in NETWORKS:
            if network in record:
                for i, k in enumerate((1, 5)):
                    correct[network][i] += record[network][f"top{k}"]
                top1, top5 = (100 * c / done for c in correct[network])
                ms = record[network]["ms"]
                lines.append(f"{done} Accuracy for {network}: top-1 {top1:.2f}, top-5 {top5:.2f}")
                lines.append(f"{done} Inference time, ms {network}: {ms:.2f}")
        if "difference" in record:
            lines.append(f"{done} PyTorch vs OpenCV: {Difference(**record['difference'])}")
        lines += [f"{done} skipped: {reason}" for _, reason in record["skipped"]]
    return lines


def draw_times(records, title, path):
    """Draw the inference time of each batch, and its median, as a PNG."""
    # Figure, not pyplot: it needs no display and no choice of a backend
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="batch", ylabel="ms per picture", title=title)
    marker = "o-" if len(records) <= 50 else "-"
    for number, network in enumerate(NETWORKS):
        batches = [batch for batch in sorted(records) if network in records[batch]]
        times = [records[batch][network]["ms"] for batch in batches]
        median = np.median(get_times([records[batch] for batch in batches], network))
        label = f"{network}: median {median:.1f} ms"
        axes.plot(np.array(batches) + 1, times, marker, color=f"C{number}", label=label)
        axes.axhline(median, color=f"C{number}", linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0, top=1.15 * axes.get_ylim()[1])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    with whole_file(path) as part:
        figure.savefig(part, dpi=120, format="png")


def get_published(network):
    """{"acc@1": %, "acc@5": %} of torchvision's own weights, {} of others."""
    if network.weights.kind != "torchvision":
        return {}
    entry = get_torchvision_weights(network.name)[network.weights.name]
    return entry.meta["_metrics"]["ImageNet-1K"]


def get_about(key, engine, seconds, records):
    """What you need to repeat the run, besides the figures. records: of this process."""
    import torch

    passes = [r[n]["ms"] * r["pictures"] for r in records.values() for n in NETWORKS if n in r]
    return key | {
        "engine": engine,
        "processes": get_processes(),
        "processor": get_processor(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "threads": {"torch": torch.get_num_threads(), "opencv": cv2.getNumThreads()},
        "seconds": seconds,  # of this process, since its last start
        "forward_seconds": sum(passes) / 1000,
    }


def get_processor():
    """The processor's name; platform.processor() has none on Linux."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_results(stem, title, records, figures, about):
    """The log, the JSON and the chart in LOGS_DIR; the summary is printed as well."""
    log_path, json_path, chart_path = (
        Path(LOGS_DIR) / f"{stem}_{end}" for end in ("log.txt", "summary.json", "time.png")
    )
    summary = get_summary(title, figures, about)
    with whole_file(log_path) as part:
        part.write_text("\n".join([title, *get_log_lines(records), *summary, ""]), "utf-8")
    with whole_file(json_path) as part:
        part.write_text(json.dumps(about | figures, indent=2) + "\n", "utf-8")
    draw_times(records, f"{title}: inference time, {figures['read']} pictures", chart_path)
    print(*summary, f"log: {log_path}", f"summary: {json_path}", f"chart: {chart_path}", sep="\n")
    sys.stdout.flush()


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
        raise RequestError(
            "another process of this run has ended; what was evaluated is kept: repeat the command "
            "to continue"
        ) from None
    return values


def in_turn(function):
    """The result of `function`: rank 0 first, then one process per machine, then the others.

    What the first downloads and converts is then there for the others.
    """
    result = None
    for turn in (get_rank() == 0, os.environ.get("LOCAL_RANK", "0") == "0", True):
        if turn and result is None:
            result = function()
        gather(None)
    return result


# --- the run --------------------------------------------------------------------------------------


def evaluate(network, converted, preprocessing, data, config, args):
    """Run both networks over the pictures and write the results.

    Resumes a stopped run with the same key. Raises NetworksDisagree if the networks do,
    TooManySkipped if too many pictures can't be read, and on Ctrl-C KeyboardInterrupt, after
    writing the results so far as partial.
    """
    check_class_ids(data.pictures, converted.classes)
    preprocessing = dataclasses.replace(preprocessing, rgb=config.bgr_to_rgb)
    make_blob, described = get_blob_maker(network, preprocessing, args.preprocess)
    size = min(config.batch_size, len(data.pictures))
    shape = (size, 3, preprocessing.height, preprocessing.width)
    key = get_evaluation_key(network, converted, shape, described, data, config, args)
    stem = converted.path.stem
    state_path, state_files, engine, records = resume(stem, key, len(data.pictures), args.resume)

    keep_large_blocks()
    if get_rank() == 0:
        few = np.random.default_rng(SEED).standard_normal(
            (min(8, shape[0]), *shape[1:]), np.float32
        )
        engine = choose_engine(converted, few, engine or args.engine)
    engine = gather(engine)[0]
    append_state(state_path, {"engine": engine})
    net = read_onnx(converted.path, engine)
    forwards = (prepare_pytorch(network.model), lambda blob: run_opencv(net, blob))
    networks = dict(zip(NETWORKS, forwards, strict=True))
    batches = [data.pictures[i : i + shape[0]] for i in range(0, len(data.pictures), shape[0])]
    start = time.perf_counter()
    new, interrupted = run_batches(batches, records, networks, make_blob, shape, state_path)
    seconds = time.perf_counter() - start

    for found in gather(new):
        records |= found
    read = sum(record["pictures"] for record in records.values())
    if not read and not interrupted:
        reason = records[0]["skipped"][0][1]
        raise RequestError(f"none of the {len(data.pictures)} pictures can be read: {reason}")
    if read and get_rank() == 0:
        about = get_about(key, engine, seconds, new)
        figures = get_figures(records, len(data.pictures), get_published(network))
        random = network.weights.kind == "random"
        title = f"{stem}, {'RANDOM' if random else network.weights.name} weights"
        write_results(stem, title, records, figures, about)
    if interrupted:
        raise KeyboardInterrupt
    gather(None)  # the states are kept until rank 0 has written the figures
    for path in {*state_files, state_path}:
        path.unlink(missing_ok=True)
    if get_rank() == 0:
        check_figures(figures)


def resume(stem, key, pictures, wanted):
    """(state file of this process, state files found, their engine or None, {batch: record})."""
    state_path, state_files = find_states(stem, key)
    if not wanted:
        for path in state_files:
            path.unlink(missing_ok=True)
        gather(None)
        state_files = []
    engine, records = None, {}
    for states in gather([read_state(path) for path in state_files]):
        for found_engine, found_records in states:
            engine, records = engine or found_engine, records | found_records
    if records:
        done = sum(r["pictures"] + len(r["skipped"]) for r in records.values())
        print(f"resuming after {done} of {pictures} pictures; --resume False starts over")
    return state_path, state_files, engine, records


def run_batches(batches, records, networks, make_blob, shape, state_path):
    """({batch: record} of this process's share of what `records` lacks, whether Ctrl-C ended it).

    shape: of a whole batch's blob.
    """
    missing = [i for i in range(len(batches)) if i not in records]
    todo = missing[get_rank() :: get_processes()]
    buffer = np.empty(shape, np.float32)
    new, interrupted = {}, False
    with (
        ThreadPoolExecutor(os.cpu_count()) as workers,
        tqdm(
            total=sum(len(batches[i]) for i in todo),
            unit=" pictures",
            disable=None if get_rank() == 0 else True,  # None: only on a terminal
        ) as bar,
    ):
        for turn in range(-(-len(missing) // get_processes())):  # the same number in each process
            if turn % ROLL_CALL == 0 and any(gather(interrupted)):
                break
            if interrupted or turn >= len(todo):
                continue
            i = todo[turn]
            try:
                # decoding has all cores between the passes, and none during them
                blob, labels, names, skipped = read_batch(batches[i], make_blob, workers, buffer)
                record = {"batch": i, "warm_up": turn == 0, "pictures": 0, "skipped": skipped}
                if labels:
                    record |= evaluate_batch(networks, blob, labels, names)
                append_state(state_path, record)
                new[i] = record
                bar.update(len(batches[i]))
            except KeyboardInterrupt:
                interrupted = True
    return new, interrupted


def check_figures(figures):
    """Raise if the finished evaluation failed: NetworksDisagree or TooManySkipped."""
    difference = Difference(**figures["difference"])
    # "not <=" and not ">", which would let nan pass. A tie that falls the other way isn't a fault.
    if not difference.relative <= MAX_RELATIVE_ERROR:
        raise NetworksDisagree(f"PyTorch and OpenCV disagree on these pictures: {difference}")
    if len(figures["skipped"]) > MAX_SKIPPED * figures["pictures"]:
        raise TooManySkipped(
            f"{len(figures['skipped'])} of {figures['pictures']} pictures can't be read: the "
            "figures are those of the others"
        )
