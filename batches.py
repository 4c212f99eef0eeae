"""A batch of pictures in, their rows out: read, prepared, and answered by both networks."""

import ctypes
import os
import sys
import time
from dataclasses import replace

import cv2
import numpy as np

from classification import RequestError, get_blob, read_picture
from preprocessing import read_pil, run_transform
from results import NO_ANSWER


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


def get_transforms_blob(path, transform):
    """The same, as the network's transform makes it of the picture that PIL reads."""
    return run_transform(transform, read_pil(path))


def read_batch(rows, root, make_blobs, workers, buffers):
    """(blobs, the rows of their pictures, the rows of pictures that can't be read).

    make_blobs, buffers, blobs: PyTorch's and OpenCV's, or one for both. The workers read one
    picture each into the rows of the buffers, which serve every batch: fresh memory would be
    scattered more and more.
    """

    def read(place, row):
        path = os.path.join(root, row.picture)
        try:
            for buffer, make_blob in zip(buffers, make_blobs, strict=True):
                buffer[place] = make_blob(path)
        except RequestError as error:
            return row._replace(skipped=str(error))
        return row

    rows = list(workers.map(read, range(len(rows)), rows))
    places = [place for place, row in enumerate(rows) if row.skipped is None]
    chosen = slice(len(rows)) if len(places) == len(rows) else places
    blobs = [buffer[chosen] for buffer in buffers]
    return blobs, [rows[place] for place in places], [row for row in rows if row.skipped]


def get_scores(outputs, activation):
    """float64 (pictures, classes), the highest of the answer, from outputs (pictures, outputs).

    A single output is a binary classifier's, of class 1: a logit z stands for (0, z), whose softmax
    is the sigmoid of z, and a probability p for (1 - p, p).
    """
    scores = outputs.astype(np.float64)
    if scores.shape[1] == 1:
        scores = np.hstack([1 - scores if activation else np.zeros_like(scores), scores])
    return scores


def evaluate_batch(networks, blobs, rows, activation=None):
    """The rows of the pictures of a batch with both networks' answers.

    networks: {"pytorch": run, "opencv": run}; blobs: theirs, or one for both, float32 (pictures, 3,
    height, width). activation: what the networks end in, if their outputs are probabilities.
    """
    columns, logits = {}, {}
    labels, places = np.array([[row.label] for row in rows]), np.arange(len(rows))
    for blob, (name, forward) in zip((blobs[0], blobs[-1]), networks.items(), strict=True):
        start = time.perf_counter()
        logits[name] = forward(blob)
        columns[f"{name}_ms"] = np.full(len(rows), 1000 * (time.perf_counter() - start) / len(rows))
        scores = get_scores(logits[name], activation)
        nan = np.isnan(scores).any(axis=1)  # is no answer, and wrong
        order = np.argsort(-scores, axis=1, kind="stable")
        answers = np.where(nan, NO_ANSWER, order[:, 0])
        ranks = np.where(nan, scores.shape[1], (order == labels).argmax(axis=1))
        columns |= {f"{name}_class": answers, f"{name}_rank": 1 + ranks}
        with np.errstate(invalid="ignore"):  # inf - inf
            powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities = scores if activation else powers / powers.sum(axis=1, keepdims=True)
        columns[f"{name}_probability"] = probabilities[places, order[:, 0]]
        columns[f"{name}_label_probability"] = probabilities[places, labels[:, 0]]
    with np.errstate(invalid="ignore"):
        difference = np.abs(logits["pytorch"].astype(np.float64) - logits["opencv"])
    columns["l1"], columns["l_inf"] = difference.mean(axis=1), difference.max(axis=1)
    columns["peak"] = np.abs(logits["pytorch"]).max(axis=1)
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    answers = [dict(zip(columns, value, strict=True)) for value in values]
    return [row._replace(**answer) for row, answer in zip(rows, answers, strict=True)]


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
