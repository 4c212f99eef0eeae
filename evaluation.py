"""The evaluation of both networks over labelled pictures, for py_to_py_cls.py.

Accuracy, inference time and how far the answers are apart, batch by batch; nothing that was
evaluated is lost, and torchrun's processes share the batches.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

import classification
from classification import (
    RequestError,
    positive_int,
    read_lines,
    read_onnx,
    read_picture,
    whole_file,
)
from common import (
    RANDOM,
    find_bundled,
    get_content_size,
    get_weights,
    hash_content,
    is_own,
)
from test_config import CLS_TEST_DATA_DIR, IMAGENET_VAL_DIR, LOGS_DIR
from verify import (
    MAX_RELATIVE_ERROR,
    Difference,
    NetworksDisagree,
    compare,
    run_opencv,
    run_pytorch,
)

NETWORKS = ("PyTorch", f"OpenCV {cv2.__version__}")

# torchvision.datasets.ImageFolder's
PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"
)  # fmt: skip
# So many batches after which the processes of a run see whether all of them are still there.
ROLL_CALL = 10
MAX_SKIPPED = 0.01  # of the pictures: over that, an evaluation ends with exit code 1


class TooManySkipped(RequestError):
    """So many pictures can't be read that the figures are of another set."""

    exit_code = 1


# --- the labelled pictures ------------------------------------------------------------------------


def get_labelled_pictures(config, given):
    """([(path, class ID)], their folder, whether they are the bundled ones) of the evaluation.

    From a label file, or from class folders: see read_val_file and read_class_folders. The
    bundled pictures stand in only for the tutorial's own folder, and only where nobody named
    another.
    """
    named = {"img_root_dir", "img_cls_file"} & given.keys()
    root, label_file = config.img_root_dir, config.img_cls_file
    if not named and root == IMAGENET_VAL_DIR and not Path(root).exists():
        root = find_bundled(CLS_TEST_DATA_DIR)
        return read_val_file(os.path.join(root, "val.txt"), root), root, True
    if not Path(root).is_dir():
        raise RequestError(
            f"{root}: no such folder; --img_root_dir takes the folder of the pictures"
        )
    if "img_cls_file" not in given and not any(map(is_picture_name, os.listdir(root))):
        return read_class_folders(root), root, False
    return read_val_file(label_file, root), root, False


def is_picture_name(name):
    return name.lower().endswith(PICTURE_SUFFIXES)


def read_class_folders(root):
    """[(path, class ID)] from a folder for each class, in sorted order the classes 0, 1, 2 ...

    The layout of torchvision.datasets.ImageFolder: pictures may lie deeper.
    """
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    pictures = []
    for class_id, name in enumerate(classes):
        for folder, subfolders, files in os.walk(os.path.join(root, name), followlinks=True):
            subfolders.sort()
            pictures += [
                (os.path.join(folder, f), class_id) for f in sorted(files) if is_picture_name(f)
            ]
    if not pictures:
        raise RequestError(f"{root}: neither pictures nor folders of pictures in it")
    print(f"{root}: folder {classes[0]} is class 0, ..., {classes[-1]} is class {len(classes) - 1}")
    return pictures


def read_val_file(path, root):
    """[(path of the picture, class ID)] from a file like ImageNet's val.txt: lines of "name ID"."""
    lines = read_lines(path, "--img_cls_file takes lines of 'name class-ID'")
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
    """Raise RequestError where a label is none of the network's `classes`."""
    for path, class_id in pictures:
        if class_id >= classes:
            raise RequestError(
                f"{path} has class ID {class_id}, but the network's {classes} classes are "
                f"0 to {classes - 1}; give its own pictures with --img_root_dir, and their labels"
            )


def get_data_fingerprint(pictures, root):
    """SHA-256 over the pictures' names, sizes and labels, and one over when they were changed.

    The first tells a copy of a data set from another set, the second whether it was touched
    since. Their content is not read: that would take as long as decoding it.
    """
    data, times = hashlib.sha256(), hashlib.sha256()
    for path, class_id in pictures:
        name = os.path.relpath(path, root)
        size = time_ns = None
        if os.path.isfile(path):
            status = os.stat(path)
            size, time_ns = status.st_size, status.st_mtime_ns
        data.update(f"{name}\n{size}\n{class_id}\n".encode(errors="surrogateescape"))
        times.update(f"{time_ns}\n".encode())
    return {"data_sha256": data.hexdigest(), "data_times_sha256": times.hexdigest()}


# --- preprocessing --------------------------------------------------------------------------------


def check_frame_size(config, module_config, preprocessing):
    """Raise RequestError where the evaluation can't cut its frame, or would cut another one."""
    if not module_config.frame_width == module_config.frame_height == str(config.frame_size):
        raise RequestError(
            "evaluation mode takes square frames: --frame_size in place of --frame_width and "
            "--frame_height"
        )
    for name in ("rsz_width", "rsz_height"):
        if positive_int(preprocessing[name]) < config.frame_size:
            raise RequestError(
                f"--{name} {preprocessing[name]} is less than --frame_size {config.frame_size}, "
                "which is cut out of the resized picture"
            )


def get_tutorial_blob(path, preprocessing, config):
    """(1, 3, frame_size, frame_size): the centre of the resized picture, as torchvision cuts it.

    blobFromImage's crop would shrink the picture to the frame and cut nothing.
    """
    size = config.frame_size
    rsz_height = int(preprocessing["rsz_height"])
    rsz_width = int(preprocessing["rsz_width"])
    picture = cv2.resize(read_picture(path).astype(np.float32), (rsz_width, rsz_height))
    top, left = (rsz_height - size) // 2, (rsz_width - size) // 2
    blob = cv2.dnn.blobFromImage(
        picture[top : top + size, left : left + size],
        scalefactor=float(preprocessing["scale"]),
        mean=[float(value) for value in preprocessing["mean"]],
        swapRB=config.bgr_to_rgb,
    )
    blob /= np.array(preprocessing["std"], np.float32).reshape(1, 3, 1, 1)
    return blob


def get_torchvision_blob(path, transforms):
    """The same by the transforms of the weights, whose accuracy is the published one."""
    import torch

    rgb = cv2.cvtColor(read_picture(path), cv2.COLOR_BGR2RGB)
    return transforms(torch.from_numpy(rgb).permute(2, 0, 1))[None].numpy()


def check_transforms(transforms, frame_size):
    """Raise RequestError where torchvision's transforms make another frame than the network's."""
    if transforms.crop_size != [frame_size]:
        raise RequestError(
            f"--preprocess torchvision cuts {transforms.crop_size[0]} pixels, and --frame_size is "
            f"{frame_size}: leave it out"
        )


def get_blob_function(preprocessing, config):
    """get_blob(path) for a preprocessing, the tutorial's dictionary or torchvision's transforms."""
    if isinstance(preprocessing, dict):
        return lambda path: get_tutorial_blob(path, preprocessing, config)
    return lambda path: get_torchvision_blob(path, preprocessing)


def read_batch(batch, get_blob, workers, buffer):
    """(blob, labels, names, skipped) of [(path, class ID)]: blob (pictures, 3, height, width).

    Decoded by the workers, each with pictures of its own, into the rows of `buffer`, which is
    used again for each batch: fresh memory would be scattered more and more. What can't be read
    is skipped, as [path, reason].
    """

    def read(row, path):
        try:
            buffer[row] = get_blob(path)[0]
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

    By default it returns blocks of that size to the kernel, and PyTorch spends up to half of a
    batch of 50 in page faults: no fault of PyTorch's, and a comparison must not charge it for it.
    Other platforms' allocators are left alone.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def prepare_pytorch(model):
    """run(blob) -> logits, with the memory layout that PyTorch's convolutions are fastest in."""
    import torch

    model.to(memory_format=torch.channels_last)
    return lambda blob: run_pytorch(model, blob, memory_format=torch.channels_last)


def choose_engine(onnx_path, blob, engine, engines):
    """The name of OpenCV's inference engine: the one asked for, or the fastest of `engines`.

    engines: those that are right with the file. Each has one pass to warm up and one that counts.
    """
    if engine != "auto":
        if engine not in engines:
            raise RequestError(
                f"--engine {engine} doesn't give PyTorch's answer with {onnx_path}: leave it out"
            )
        return engine
    seconds = {}
    for name in engines:
        net = read_with_engine(onnx_path, name)
        run_opencv(net, blob)
        start = time.perf_counter()
        run_opencv(net, blob)
        seconds[name] = time.perf_counter() - start
    name = min(seconds, key=seconds.get)
    timings = ", ".join(f"{n} {s * 1000 / len(blob):.1f} ms" for n, s in seconds.items())
    print(f"OpenCV's engines: {timings} per picture; taking {name}")
    return name


def read_with_engine(onnx_path, engine):
    return read_onnx(onnx_path, classification.available(classification.ENGINES)[engine])


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
# Each finished batch is a line of JSON in a state file, whose first line says what run it belongs
# to. All figures are computed from these records, in the order of the batches: so a run that was
# killed and goes on ends with the figures of one that was never stopped, and several processes
# end with those of one, as long as PyTorch's rounding doesn't depend on its number of threads.


def get_evaluation_key(args, config, preprocessing, onnx_path, pictures, root):
    """All that the figures depend on, besides get_conversion_key: only such a run is resumed."""
    return {
        "model": args.model_name,
        # without its metadata, which say the faster engine of that day
        "onnx_sha256": hash_content(onnx_path, get_content_size(onnx_path)),
        "data": root,
        **get_data_fingerprint(pictures, root),
        "batch_size": config.batch_size,
        "frame_size": config.frame_size,
        "bgr_to_rgb": config.bgr_to_rgb,
        "preprocess": args.preprocess,
        "preprocessing": {k: v for k, v in preprocessing.items() if k not in ("crop", "rgb")}
        if isinstance(preprocessing, dict)
        else str(preprocessing),
        "engine_option": args.engine,
    }


def get_state_paths(stem, key, rank):
    """(state file of this process, state files of such a run that are there already).

    The key in their name keeps other runs' states apart.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    found = sorted(Path(LOGS_DIR).glob(f"{stem}_{digest}_*.state"))
    return Path(LOGS_DIR) / f"{stem}_{digest}_{rank}.state", found


def read_state(path):
    """(engine, {batch: record}) of a state file, without lines that broke off."""
    records, engine = {}, None
    with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # broken off by a power cut
                continue
            if "engine" in record:
                engine = record["engine"]
            else:
                records[record["batch"]] = record
    return engine, records


def merge_states(states):
    """(engine, records) of what the processes have read, each a list of read_state's results."""
    found = [state for process in states for state in process]
    engine = next((engine for engine, _ in found if engine), None)
    return engine, {batch: r for _, records in found for batch, r in records.items()}


def append_state(path, record):
    """Add a line to the state file, so that it is there after a power cut."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            # a line that broke off before must not swallow this one
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RequestError(
            f"{path}: can't be written: {error.strerror}; what was evaluated before is kept: the "
            "same command goes on from there"
        ) from None


# --- the figures ----------------------------------------------------------------------------------


def combine(differences):
    """One Difference of all the batches': L1 is the mean over all pictures."""
    pictures = sum(d.pictures for d in differences)
    return Difference(
        l1=sum(d.l1 * d.pictures for d in differences) / pictures,
        l_inf=max(d.l_inf for d in differences),
        relative=float(np.max([d.relative for d in differences])),  # np: nan wins
        same_class=sum(d.same_class for d in differences),
        pictures=pictures,
    )


def get_times(records, network):
    """ms per picture of each batch, but for each process's first, which warms up (if it can)."""
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
    """The lines that end the log and the output."""
    read, total = figures["read"], figures["pictures"]
    count = f"{read}" if read == total else f"{read} of {total}"
    lines = [f"{title}, {'PARTIAL: ' if figures['partial'] else ''}{count} pictures:"]
    for network in NETWORKS:
        values = figures[network]
        published = ", ".join(f"{k} {v} %" for k, v in figures["published"].items())
        published = f" (published: {published})" if published else ""
        lines += [
            f"{network}:",
            f"* accuracy: top-1 {values['top1']:.2f} %, top-5 {values['top5']:.2f} %{published}",
            f"* inference time, ms per picture: mean {values['ms_mean']:.2f}, "
            f"median {values['ms_median']:.2f}, 95th percentile {values['ms_p95']:.2f}",
        ]
    threads, processes = about["threads"], about["processes"]
    each = f" in each of {processes} processes" if processes > 1 else ""
    lines.append(
        f"threads: PyTorch {threads['torch']}, OpenCV {threads['opencv']}{each}; "
        f"OpenCV's engine: {about['engine']}"
    )
    lines.append(f"PyTorch vs OpenCV: {Difference(**figures['difference'])}")
    for name, a, b in figures["disagreements"]:
        lines.append(f"* not the same class: {name}: PyTorch {a}, OpenCV {b}")
    if figures["skipped"]:
        lines.append(f"skipped: {len(figures['skipped'])} pictures, which could not be read")
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


def get_published(weights, model_name):
    """{"acc@1": %, "acc@5": %} of torchvision's own weights, {} of others."""
    entry = None if is_own(model_name) else get_weights(model_name).get(weights)
    return entry.meta["_metrics"]["ImageNet-1K"] if entry else {}


def get_about(key, engine, processes, seconds, forward_seconds):
    """What one needs to repeat the run, besides the figures."""
    import torch

    return key | {
        "engine": engine,
        "processes": processes,
        "processor": get_processor(),
        "python": platform.python_version(),
        "onnx_package": importlib.metadata.version("onnx"),
        "numpy": np.__version__,
        "threads": {"torch": torch.get_num_threads(), "opencv": cv2.getNumThreads()},
        "seconds": seconds,  # of this process, since it was started the last time
        "forward_seconds": forward_seconds,
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


def join_processes():
    """(rank, processes): those of torchrun, which this process joins, else (0, 1)."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        return 0, 1
    import torch.distributed as dist

    # gloo notices by itself that a rank has died, but not that its machine has lost its power
    dist.init_process_group("gloo", timeout=datetime.timedelta(hours=1))
    if dist.get_rank() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    return dist.get_rank(), processes


def gather(value, processes):
    """The `value` of each process, by rank, in every process; so it is a barrier as well.

    Raises RequestError where one of them has died.
    """
    if processes == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * processes
    try:
        dist.all_gather_object(values, value)
    except RuntimeError:
        raise RequestError(
            "another process of this run has ended; what was evaluated is kept: the same command "
            "goes on from there"
        ) from None
    return values


def in_turn(rank, processes, function):
    """The result of `function`: rank 0 first, then one process a machine, then the others.

    So that what the first downloads and converts is there for the others.
    """
    result = None
    for turn in (rank == 0, os.environ.get("LOCAL_RANK", "0") == "0", True):
        if turn and result is None:
            result = function()
        gather(None, processes)
    return result


# --- the run --------------------------------------------------------------------------------------


def evaluate(network, pictures, get_blob, sample_blob, key, args, rank, processes):
    """Run both networks over the pictures and write the results.

    key: all that the figures depend on; only a run of the same key is taken up again. Raises
    NetworksDisagree where the networks do, TooManySkipped where too many pictures can't be read,
    and on Ctrl-C, after the results so far are written as partial, KeyboardInterrupt.
    """
    onnx_path = network.onnx_path
    stem, size = onnx_path.stem, key["batch_size"]
    weights = "RANDOM" if key["weights"] == RANDOM else key["weights"]
    title = f"{stem}, {weights} weights"
    batches = [pictures[i : i + size] for i in range(0, len(pictures), size)]
    state_path, state_files = get_state_paths(stem, key, rank)
    if not args.resume:
        gather([path.unlink(missing_ok=True) for path in state_files], processes)
        state_files = []
    engine, records = merge_states(gather([read_state(p) for p in state_files], processes))
    if records:
        done = sum(r["pictures"] + len(r["skipped"]) for r in records.values())
        print(f"going on after {done} of {len(pictures)} pictures; --resume False starts anew")

    keep_large_blocks()
    few = np.repeat(sample_blob, min(8, size), axis=0)
    if rank == 0:
        engine = choose_engine(onnx_path, few, engine or args.engine, network.engines)
    engine = gather(engine, processes)[0]
    net = read_with_engine(onnx_path, engine)
    run_on_pytorch = prepare_pytorch(network.model)
    networks = dict(zip(NETWORKS, (run_on_pytorch, lambda b: run_opencv(net, b)), strict=True))
    check_class_ids(pictures, run_on_pytorch(few).shape[1])
    append_state(state_path, {"engine": engine})

    missing = [i for i in range(len(batches)) if i not in records]
    todo = missing[rank::processes]
    buffer = np.empty((min(size, len(pictures)), *sample_blob.shape[1:]), np.float32)
    start, forward_seconds, interrupted = time.perf_counter(), 0.0, False
    total = sum(len(batches[i]) for i in todo)
    with (
        ThreadPoolExecutor(os.cpu_count()) as workers,
        tqdm(total=total, unit=" pictures", disable=None if rank == 0 else True) as bar,
    ):
        for turn in range(-(-len(missing) // processes)):  # as many for each process
            if turn % ROLL_CALL == 0 and any(gather(interrupted, processes)):
                break
            if interrupted or turn >= len(todo):
                continue
            i = todo[turn]
            try:
                # decoding has all cores between the passes, and none during them
                blob, labels, names, skipped = read_batch(batches[i], get_blob, workers, buffer)
                record = {"batch": i, "warm_up": turn == 0, "pictures": 0, "skipped": skipped}
                if labels:
                    record |= evaluate_batch(networks, blob, labels, names)
                    forward_seconds += sum(record[n]["ms"] for n in NETWORKS) * len(labels) / 1000
                append_state(state_path, record)
                records[i] = record
                bar.update(len(batches[i]))
            except KeyboardInterrupt:
                interrupted = True
    seconds = time.perf_counter() - start

    for found in gather(records, processes):
        records |= found
    read = sum(record["pictures"] for record in records.values())
    if not read and not interrupted:
        reason = records[0]["skipped"][0][1]
        raise RequestError(f"none of the {len(pictures)} pictures can be read: {reason}")
    if read and rank == 0:
        about = get_about(key, engine, processes, seconds, forward_seconds)
        figures = get_figures(records, len(pictures), get_published(key["weights"], key["model"]))
        write_results(stem, title, records, figures, about)
    if interrupted:
        raise KeyboardInterrupt
    gather(None, processes)  # the states are kept until rank 0 has written the figures
    for path in {*state_files, state_path}:
        path.unlink(missing_ok=True)
    if rank == 0:
        check_figures(figures)


def check_figures(figures):
    """Raise what the exit code of a finished evaluation shall say."""
    difference = Difference(**figures["difference"])
    # "not over" would let nan pass; a tie that falls the other way is no fault of a conversion
    if not difference.relative <= MAX_RELATIVE_ERROR:
        raise NetworksDisagree(f"PyTorch and OpenCV disagree on these pictures: {difference}")
    if len(figures["skipped"]) > MAX_SKIPPED * figures["pictures"]:
        raise TooManySkipped(
            f"{len(figures['skipped'])} of {figures['pictures']} pictures could not be read: "
            "the figures are of the others"
        )
