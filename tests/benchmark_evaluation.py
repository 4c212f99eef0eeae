"""The evaluation against the tutorial's loop, written plainly, on the same photographs:

    python tests/benchmark_evaluation.py
    python tests/benchmark_evaluation.py --memory

The photographs are the bundled ones, cropped, scaled and mirrored by a seeded generator. Both
programs run in turn, each in a process of its own; times are of their loops, without start-up.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BATCH = 50


def make_photographs(folder, number):
    """JPEGs of 500 pixels, as ImageNet's are."""
    random = np.random.default_rng(0)
    sources = [cv2.imread(str(p)) for p in sorted((ROOT / "test_data" / "cls").glob("*.jpg"))]
    for i in range(number):
        picture = sources[i % len(sources)]
        height, width = picture.shape[:2]
        part = random.uniform(0.6, 1)
        top, left = (int(random.uniform(0, 1 - part) * size) for size in (height, width))
        picture = picture[top : top + int(part * height), left : left + int(part * width)]
        zoom = 500 / max(picture.shape)
        picture = cv2.resize(picture, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA)
        picture = picture[:, ::-1] if random.random() < 0.5 else picture
        cv2.imwrite(f"{folder}/{i:05}.jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92])


def tutorial_loop(name, folder):
    """The tutorial's evaluation as it stands: a picture after the other, then both networks."""
    import torch

    from networks import Request, load_network

    model = load_network(Request(name, "random")).model
    net = cv2.dnn.readNetFromONNX(f"models/{name}-random.onnx")
    mean = np.float32([0.485, 0.456, 0.406])
    std = np.float32([0.229, 0.224, 0.225])
    names = sorted(os.listdir(folder))
    outputs = [[], []]
    start = time.perf_counter()
    for first in range(0, len(names), BATCH):
        batch = np.zeros((len(names[first : first + BATCH]), 3, 224, 224), np.float32)
        for row, picture in zip(batch, names[first : first + BATCH], strict=True):
            image = cv2.imread(f"{folder}/{picture}", cv2.IMREAD_COLOR).astype(np.float32)
            image = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), (256, 256))
            row[:] = ((image[16:240, 16:240] / 255.0 - mean) / std).transpose(2, 0, 1)
        with torch.no_grad():
            outputs[0].append(model(torch.FloatTensor(batch)).numpy())
        net.setInput(batch)
        outputs[1].append(net.forward())
    seconds = time.perf_counter() - start
    np.save("tutorial.npy", np.stack([np.concatenate(o) for o in outputs]))
    print(seconds)


def run(*command):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run_evaluation(name, folder, preprocess):
    """(the summary that py_to_py_cls.py writes, seconds of its forward passes, from its table)."""
    options = ["--weights", "random", "--img_root_dir", folder, "--img_cls_file", "labels.txt"]
    options += ["--preprocess", preprocess, "--batch_size", BATCH]
    run(ROOT / "py_to_py_cls.py", "--model_name", name, *options)
    folder = max(Path("logs").glob(f"{name}-random_*"), key=lambda path: path.stat().st_mtime)
    with open(folder / "pictures.csv", newline="") as file:
        ms = [float(row["pytorch_ms"]) + float(row["opencv_ms"]) for row in csv.DictReader(file)]
    return json.loads((folder / "summary.json").read_text()), sum(ms) / 1000


def get_logits(name, folder, engine, number):
    """Both networks' logits as py_to_py_cls.py has them, (2, number, classes)."""
    import torch

    from classification import ENGINES
    from evaluation import Plan, get_blobs
    from networks import Request, load_network
    from verify import run_opencv, run_pytorch

    network = load_network(Request(name, "random"))
    p = replace(network.preprocessing, resize=(), initial_width=256, initial_height=256)
    paths = [f"{folder}/{n}" for n in sorted(os.listdir(folder))[:number]]
    plan = Plan("tutorial", p, "", "RGB", engine, number)
    blob = np.concatenate([get_blobs(path, plan, None) for path in paths])
    net = cv2.dnn.readNetFromONNX(f"models/{name}-random.onnx", ENGINES[engine])
    model = network.model.to(memory_format=torch.channels_last)
    logits = run_pytorch(model, blob)
    return np.stack([logits, run_opencv(net, blob)])


def compare_programs(name, folder, rounds):
    run(
        ROOT / "py_to_py_cls.py", "--model_name", name, "--weights", "random", "--evaluate", "False"
    )
    names = sorted(os.listdir(folder))
    speed, overhead, own_overhead = [], [], []
    for _ in range(rounds):
        tutorial = float(run(__file__, "--tutorial", name, folder).splitlines()[-1])
        logits = np.load("tutorial.npy")
        # labels that are right for every second picture
        labels = logits[0].argmax(axis=1) + np.arange(len(names)) % 2
        labels %= logits.shape[2]
        Path("labels.txt").write_text(
            "".join(f"{n} {label}\n" for n, label in zip(names, labels, strict=True))
        )
        own, own_seconds = run_evaluation(name, folder, "own")
        own_overhead.append(own["seconds"] / own_seconds)
        summary, forward_seconds = run_evaluation(name, folder, "tutorial")
        networks = [summary["pytorch"], summary["opencv"]]
        speed.append(tutorial / summary["seconds"])
        overhead.append(summary["seconds"] / forward_seconds)
        accuracy = [100 * (o.argmax(axis=1) == labels).mean() for o in logits]
        same = np.allclose([n["top1"] for n in networks], accuracy, rtol=0, atol=1e-9)
    engine = summary["engine"]
    l_inf = np.abs(get_logits(name, folder, engine, 100) - logits[:, :100]).max()
    print(
        f"{name:16} {statistics.median(speed):8.2f} {statistics.median(overhead):10.3f} "
        f"{statistics.median(own_overhead):10.3f} "
        f"{'yes' if same else 'NO':>10} {l_inf:10.1e} {engine:>8}",
        flush=True,
    )


def compare_memory(name, folder):
    """Peak memory of a long evaluation against a short one, each in a process of its own."""
    pictures = sorted(Path(folder).iterdir())
    peaks = []
    for i in range(10_000):  # a picture that is listed twice counts once
        os.link(pictures[i % len(pictures)], Path(folder, f"{i}.jpg"))
    for number in (1000, 10_000):
        Path("labels.txt").write_text("".join(f"{i}.jpg 0\n" for i in range(number)))
        options = ["--weights", "random", "--img_root_dir", folder, "--img_cls_file", "labels.txt"]
        command = [sys.executable, str(ROOT / "py_to_py_cls.py"), "--model_name", name, *options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        peaks.append(os.wait4(process.pid, 0)[2].ru_maxrss / 1024)
        print(f"{number} pictures: peak memory {peaks[-1]:.0f} MiB", flush=True)
    print(f"ratio: {peaks[1] / peaks[0]:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("networks", nargs="*", default=["resnet50", "squeezenet1_0"])
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--tutorial", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tutorial:
        tutorial_loop(*args.networks)
        return
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("photographs").mkdir()
        make_photographs("photographs", args.pictures)
        if args.memory:
            compare_memory("squeezenet1_1", "photographs")
        else:
            print("network           x faster  / forward        own   accuracy      L_inf   engine")
            for name in args.networks:
                compare_programs(name, "photographs", args.rounds)
        os.chdir("/")


if __name__ == "__main__":
    main()
