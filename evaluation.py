"""The pictures' way through both networks, for py_to_py_cls.py; results.py makes figures of it.

Each evaluation has a folder of its own, logs/NAME_SET_HASH; the hash is of all that the figures
depend on. While it runs, the rows of each batch are kept there: a run that was killed and resumed
ends with the figures of one that was never stopped, as several processes do with a single one's.
"""

import contextlib
import ctypes
import datetime
import json
import os
import re
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from classification import ENGINES, RequestError, get_blob, read_picture, scale_resize
from common import NetworksDisagree, Preprocessing, get_hash, whole_file
from default_preprocess_config import PYTORCH_RSZ_HEIGHT, PYTORCH_RSZ_WIDTH
from labelled_pictures import MAX_SKIPPED, find_classes
from preprocessing import read_pil, run_transform
from processes import PROCESSES, RANK, gather
from results import NO_ANSWER, Row, write_results
from test_config import LOGS_DIR
from verify import MAX_RELATIVE_ERROR, run_opencv, run_pytorch

ROWS_VERSION = 1  # to be raised when what a row means changes: older batches aren't resumed
ROLL_CALL = 10  # batches between checks that all processes are alive
REPORT_EVERY = 60  # seconds, without a terminal


@dataclass(frozen=True)
class Plan:
    """All that the figures depend on, beside the network's file and the pictures."""

    preprocess: str  # own, tutorial or transform
    preprocessing: Preprocessing  # of OpenCV's pictures
    transform: str  # what makes PyTorch's; "" if it gets the same
    channels: str  # their order
    engine: str  # OpenCV's, or auto until choose_engine
    batch_size: int


def make_plan(network, data, outputs, config, args):
    """The Plan of the command line, or RequestError; the Data gets its class IDs."""
    if len(network.class_names) == outputs and not data.given:
        data.names, data.source = network.class_names, "the network's class names"
    find_classes(data, outputs)
    p = args.preprocessing
    if args.preprocess == "tutorial":
        tutorials = PYTORCH_RSZ_WIDTH, PYTORCH_RSZ_HEIGHT
        width, height = scale_resize(tutorials, (224, 224), (p.width, p.height))
        width, height = args.rsz_width or width, args.rsz_height or height
        p = replace(p, resize=(), initial_width=width, initial_height=height)
        if width < p.width or height < p.height:
            raise RequestError(f"--rsz_width or --rsz_height is less than {p.width}x{p.height}")
    if args.preprocess == "transform" and network.transform is None:
        raise RequestError("--preprocess transform needs one for this size: give --transform")
    transform = network.transform_name if args.preprocess == "transform" else ""
    channels, size = "RGB" if p.rgb else "BGR", min(config.batch_size, len(data.pictures))
    return Plan(args.preprocess, p, transform, channels, args.engine, size)


def choose_engine(converted, engine):
    """OpenCV's inference engine: the one asked for, or the fastest that gives the right answer."""
    if engine not in ("auto", *converted.engines):
        raise RequestError(f"--engine {engine} doesn't give PyTorch's answer: leave it out")
    return converted.engines[0] if engine == "auto" else engine


def get_key(network, converted, data, plan):
    """Everything that the figures depend on: only a run with the same key is resumed."""
    pictures = []
    for name, label in data.pictures:
        path = os.path.join(data.root, name)
        # not the pixels: that is as slow as decoding them; nobody can set st_ctime_ns back
        s = os.stat(path) if os.path.isfile(path) else None
        pictures.append((name, label, s and (s.st_size, s.st_mtime_ns, s.st_ctime_ns)))
    versions = {name: version(name) for name in ("torch", "torchvision", "numpy")}
    return {
        "rows": " ".join([str(ROWS_VERSION), *Row._fields]),
        "network": network.request.name,
        "weights": network.weights,
        "made_from": converted.sha256,
        "onnx": converted.load_info,
        "activation": converted.activation,
        "versions": versions | {"opencv": cv2.__version__},
        "pictures_root": data.root,
        "pictures_sha256": get_hash(pictures),
        **asdict(plan),
    }


def get_folder(converted, data, key):
    """logs/NAME_SET_HASH; SET is the last two names of the pictures' folder."""
    names = "-".join(Path(os.path.abspath(data.root)).parts[-2:])
    names = re.sub(r"[^\w.-]+", "-", names).strip("-")[-40:]
    return Path(LOGS_DIR, f"{converted.path.stem}_{names}_{get_hash(key)[:12]}")


def write_batch(folder, rows):
    """Keep the rows of a batch in NUMBER-CHECKSUM.json: a power failure can leave half a file."""
    text = json.dumps(rows)
    with whole_file(folder / f"{rows[0].batch}-{zlib.crc32(text.encode())}.json") as part:
        part.write_text(text, "ascii")


def gather_batches(folder):
    """{batch: its rows} of what all processes have kept, in order."""
    found = {}
    for path in folder.glob("*.json"):
        number, _, checksum = path.stem.partition("-")
        text = path.read_text("ascii", "replace")
        if checksum == str(zlib.crc32(text.encode())):  # else it is damaged
            found[int(number)] = [Row(*row) for row in json.loads(text)]
    return dict(sorted(item for others in gather(found) for item in others.items()))


def resume(batches, total, is_wanted):
    """{batch: its rows} that a stopped run has left; removes them if they aren't wanted."""
    folder = batches.parent
    others = folder.parent.glob(f"{folder.name[:-12]}{'?' * 12}/{batches.name}")
    if others := sorted({*others} - {batches}):
        problem = "belongs to an interrupted run with other pictures or options; kept"
        print(f"NOTE: {others[0].parent}: {problem}")
    if not is_wanted:
        shutil.rmtree(batches, ignore_errors=True)
    gather(None)  # before another process reads what this one deletes
    if done := gather_batches(batches):
        count = sum(map(len, done.values()))
        print(f"resuming after {count} of {total} pictures; --resume False starts over")
    return done


def evaluate(network, converted, data, plan, resumes=True):
    """Run both networks over the pictures and write the results.

    Resumes a stopped run with the same key. Raises NetworksDisagree, RequestError if too many
    pictures can't be read, and on Ctrl-C KeyboardInterrupt, after writing the results so far.
    """
    import torch

    # two machines may have found different ones
    plan = replace(plan, engine=gather(choose_engine(converted, plan.engine))[0])
    key = get_key(network, converted, data, plan)
    folder = get_folder(converted, data, key)
    kept, total, size = folder / "batches", len(data.pictures), plan.batch_size
    rows = [Row(i, *picture, batch=i // size) for i, picture in enumerate(data.pictures)]
    done = resume(kept, total, resumes)
    missing = [rows[i : i + size] for i in range(0, total, size) if i // size not in done]

    keep_large_blocks()
    shape = (size, 3, plan.preprocessing.height, plan.preprocessing.width)
    # they serve every batch: fresh memory would be scattered more and more
    buffers = [np.empty(shape, np.float32) for _ in range(2 if plan.transform else 1)]
    network.model.to(memory_format=torch.channels_last)  # in which convolutions are fastest
    net = cv2.dnn.readNetFromONNX(str(converted.path), ENGINES[plan.engine])
    networks = {"pytorch": partial(run_pytorch, network.model), "opencv": partial(run_opencv, net)}
    read = partial(read_batch, buffers, data.root, plan, network.transform)
    answer = partial(evaluate_batch, networks, activation=converted.activation)
    start = time.perf_counter()
    interrupted = run_batches(missing, total, read, answer, kept)
    seconds = time.perf_counter() - start

    rows = [row for rows in gather_batches(kept).values() for row in rows]
    if not interrupted and len(rows) < total:
        problem = f"{folder}: the rows of {total - len(rows)} pictures are gone"
        raise RequestError(f"{problem}: another run of this command has removed them; repeat it")
    if not interrupted and all(row.skipped for row in rows):
        raise RequestError(f"none of the {total} pictures can be read: {rows[0].skipped}")
    if RANK == 0 and not all(row.skipped for row in rows):
        about = key | {"name": converted.path.stem, "processes": PROCESSES}
        threshold = 0.5 if converted.activation else 0
        about["threshold"] = threshold if converted.outputs == 1 else None
        about |= {"published": network.published, "seconds": seconds}  # of this process's loop
        about["threads"] = {"PyTorch": torch.get_num_threads(), "OpenCV": cv2.getNumThreads()}
        figures = write_results(folder, rows, total, data.names, about)
    if interrupted:
        raise KeyboardInterrupt
    gather(None)  # the batches are kept until rank 0 has written the results
    shutil.rmtree(kept, ignore_errors=True)
    with contextlib.suppress(OSError):  # if it is empty: rank 0 runs on another machine
        folder.rmdir()
    if RANK == 0:
        check_figures(figures, judged=not plan.transform)


def run_batches(missing, total, read, answer, folder):
    """Evaluate this process's share of the missing batches; return whether Ctrl-C has ended it."""
    share = missing[RANK::PROCESSES]
    turns = -(-len(missing) // PROCESSES)  # the same number in each process
    interrupted, before = False, total - sum(map(len, missing))
    start = said = time.monotonic()
    # None: shown on a terminal alone
    bar = tqdm(total=sum(map(len, share)), unit=" pictures", disable=RANK > 0 or None)
    with bar, ThreadPoolExecutor(os.cpu_count()) as workers:
        for turn in range(turns):
            if turn % ROLL_CALL == 0 and any(gather(interrupted)):
                break
            if interrupted or turn >= len(share):
                continue
            try:
                # decoding has all cores between the passes, and none during them
                rows = [row._replace(warm_up=turn == 0) for row in share[turn]]
                write_batch(folder, answer(*read(rows, workers)))
                bar.update(len(share[turn]))
            except KeyboardInterrupt:
                interrupted = True
            now = time.monotonic()
            if now - said >= REPORT_EVERY and bar.disable:
                said, part = now, (turn + 1) / len(share)
                left = datetime.timedelta(seconds=round((now - start) * (1 / part - 1)))
                done = before + round(part * (total - before))
                print(f"{done} of {total} pictures, {left} left", flush=True)
    return any(gather(interrupted))


def get_blobs(path, plan, transform):
    """[PyTorch's blob of a picture, OpenCV's], or one for both: (3, height, width)."""
    picture, p = read_picture(path), plan.preprocessing
    if plan.preprocess == "tutorial":
        # blobFromImage's crop would shrink the picture to the blob and cut nothing off a square
        blob = get_blob(picture, replace(p, width=p.initial_width, height=p.initial_height))[0]
        top, left = (p.initial_height - p.height) // 2, (p.initial_width - p.width) // 2
        return [blob[:, top : top + p.height, left : left + p.width]]
    blob = get_blob(picture, p)[0]
    return [run_transform(transform, read_pil(path)), blob] if plan.transform else [blob]


def read_batch(buffers, root, plan, transform, rows, workers):
    """(blobs, rows) of a batch; a picture that can't be read is zeros, and its row says why."""

    def read(place, row):
        path = os.path.join(root, row.picture)
        try:
            for buffer, blob in zip(buffers, get_blobs(path, plan, transform), strict=True):
                buffer[place] = blob
        except (RequestError, ValueError) as error:  # ValueError: run_transform's
            for buffer in buffers:
                buffer[place] = 0
            reason = str(error).removeprefix(f"{path}: ")  # which read_picture's begins with
            return row._replace(skipped=f"{path}: {reason}")
        return row

    rows = list(workers.map(read, range(len(rows)), rows))
    return [buffer[: len(rows)] for buffer in buffers], rows


def evaluate_batch(networks, blobs, rows, activation=None):
    """The rows of a batch with both networks' answers, but for those that are skipped.

    networks: {"pytorch": run, "opencv": run}; blobs: theirs, or one for both, float32 (pictures, 3,
    height, width).
    """
    import torch

    columns, logits = {}, {}
    labels, places = np.array([[row.label] for row in rows]), np.arange(len(rows))
    for blob, (name, forward) in zip((blobs[0], blobs[-1]), networks.items(), strict=True):
        start = time.perf_counter()
        logits[name] = forward(blob)
        columns[f"{name}_ms"] = np.full(len(rows), 1000 * (time.perf_counter() - start) / len(rows))
        scores = logits[name].astype(np.float64)
        # A single output is of class 1: a logit z stands for (0, z), whose softmax is the sigmoid
        # of z, and a probability p for (1 - p, p).
        if scores.shape[1] == 1:
            scores = np.hstack([1 - scores if activation else np.zeros_like(scores), scores])
        nan = np.isnan(scores).any(axis=1)  # is no answer, and wrong
        order = np.argsort(-scores, axis=1, kind="stable")
        answers = np.where(nan, NO_ANSWER, order[:, 0])
        ranks = np.where(nan, scores.shape[1], (order == labels).argmax(axis=1))
        columns |= {f"{name}_class": answers, f"{name}_rank": 1 + ranks}
        probabilities = scores if activation else torch.from_numpy(scores).softmax(1).numpy()
        columns[f"{name}_probability"] = probabilities[places, order[:, 0]]
        columns[f"{name}_label_probability"] = probabilities[places, labels[:, 0]]
    with np.errstate(invalid="ignore"):  # inf - inf
        difference = np.abs(logits["pytorch"].astype(np.float64) - logits["opencv"])
    columns["l1"], columns["l_inf"] = difference.mean(axis=1), difference.max(axis=1)
    columns["peak"] = np.abs(logits["pytorch"]).max(axis=1)
    answers = [{name: column[i].item() for name, column in columns.items()} for i in places]
    pairs = zip(rows, answers, strict=True)
    return [row if row.skipped else row._replace(**answer) for row, answer in pairs]


def keep_large_blocks():
    """Have glibc keep the memory of a layer's output for the next layer."""
    # else PyTorch spends up to half the time of a batch of 50 in page faults
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def check_figures(figures, judged=True):
    """Raise NetworksDisagree if that is judged, or RequestError if too many were skipped."""
    difference, nan = figures["difference"], figures["nan"]
    if judged and nan:
        raise NetworksDisagree(f"the logits of {len(nan)} pictures are nan, of {nan[0]} for one")
    # "not <=" and not ">", which would let nan pass. A tie that falls the other way isn't a fault.
    if judged and not difference.relative <= MAX_RELATIVE_ERROR:
        raise NetworksDisagree(f"PyTorch and OpenCV disagree on these pictures: {difference}")
    skipped = len(figures["skipped"])
    if skipped > MAX_SKIPPED * figures["pictures"]:
        error = RequestError(f"{skipped} of {figures['pictures']} pictures can't be read")
        error.exit_code = 1
        raise error
