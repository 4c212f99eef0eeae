"""Damaged files of every kind, seeded: each must end with exit 0, 1 or 2 and at most one line.

    python tests/fuzz.py                    # 1200 cases, two minutes
    python tests/fuzz.py --seconds 60
    python tests/fuzz.py --seed 123         # one case, with its output

The cases run in a child process, because a damaged file can crash OpenCV.
"""

import argparse
import contextlib
import io
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PICTURE = ROOT / "test_data" / "cls" / "koala.jpg"
LABELS = ROOT / "test_data" / "cls" / "imagenet_classes.txt"
CASES = 1200
PER_CHILD = 50
WORDS = [
    "", "0", "-1", "1", "nan", "inf", "1e39", "True", "no", "224", "300", "1 2 3", "[1, 2]", "é",
]  # fmt: skip
OPTIONS = [
    "--scale", "--mean", "--std", "--rgb", "--crop", "--width", "--height", "--initial_width",
    "--initial_height", "--top_k", "--classes", "--engine", "--zoo", "--output", "--backend",
]  # fmt: skip
NETWORK = """
import torch

def build():
    torch.manual_seed(1)
    layers = torch.nn.Conv2d(3, 4, 5, 8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4, 6))
"""


def mutate(data, rng):
    """The bytes with a few of them changed, cut off, repeated or exchanged."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([1, 1, 4, 100]))
        how = rng.choice(["change", "change", "cut", "remove", "repeat", "insert"])
        if how == "change":
            data[at:end] = rng.randbytes(end - at)
        elif how == "cut" and rng.random() < 0.2:
            del data[at:]
        elif how == "remove":
            del data[at:end]
        elif how == "repeat":
            data[at:at] = data[at:end]
        elif how == "insert":
            data[at:at] = rng.choice(WORDS).encode()
    return bytes(data)


def prepare():
    """In the current folder: a network, its checkpoint, its converted file and the entry."""
    import torch

    Path("my_net.py").write_text(NETWORK)
    sys.path.insert(0, ".")
    import my_net

    torch.save({"model": my_net.build().state_dict(), "epoch": 3}, "net.pth")
    Path("six.txt").write_text("".join(f"class {i}\n" for i in range(6)))
    Path("val.txt.good").write_text("koala.jpg 3\nfig.jpg 2\n")
    code, output = call("py_to_py_cls", *CONVERT)
    assert code == 0, output
    for path, good in GOOD.items():
        shutil.copy(path, good)


NETWORK_OPTIONS = ["--model_name", "my_net:build", "--weights", "net.pth", "--classes", "six.txt"]
CONVERT = [*NETWORK_OPTIONS, "--evaluate", "False"]
MODEL = "models/my_net-build-net.onnx"
GOOD = {MODEL: "net.onnx.good", "net.pth": "net.pth.good", "models/models.yml": "models.yml.good"}
ENTRY = ["my_net-build-net", "--input", str(PICTURE)]
DATA = ["--img_root_dir", str(PICTURE.parent), "--img_cls_file", "val.txt"]
KINDS = {  # how often; the file that is damaged, its source; the script and its options
    "picture": (3, "picture.jpg", PICTURE, "classification", [ENTRY[0], "--input", "picture.jpg"]),
    "zoo": (3, "models/models.yml", "models.yml.good", "classification", ENTRY),
    "labels": (2, "labels.txt", "six.txt", "classification", [*ENTRY, "--classes", "labels.txt"]),
    "options": (3, None, None, "classification", ENTRY),
    "model": (3, MODEL, "net.onnx.good", "classification", ENTRY),
    "checkpoint": (3, "net.pth", "net.pth.good", "py_to_py_cls", CONVERT),
    "val": (1, "val.txt", "val.txt.good", "py_to_py_cls", NETWORK_OPTIONS + DATA),
}


def run_case(seed):
    """(exit code, stderr) of the program with one damaged file, or with odd options."""
    rng = random.Random(seed)
    (kind,) = rng.choices([*KINDS], [weight for weight, *_ in KINDS.values()])
    _, path, source, script, options = KINDS[kind]
    if kind == "options":
        chosen = rng.choices(OPTIONS, k=rng.choice([1, 2, 4]))
        words = (word for option in chosen for word in (option, *rng.choice(WORDS).split(" ")))
        return call(script, *options, *words)
    Path(path).write_bytes(mutate(Path(source).read_bytes(), rng))
    return call(script, *options)


def call(script, *args):
    """(exit code, stderr) of a script's main() in this process."""
    from classification import run

    module = __import__(script)
    sys.argv = [f"{script}.py", *args]
    # files, because run() sets the error handler of both
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(module.main)
        except SystemExit as exit_:
            code = exit_.code or 0
        except BaseException:
            code = " | ".join(traceback.format_exc().splitlines()[-3:])
    err.flush()
    return code, err.buffer.getvalue().decode()


def get_fault(code, stderr, before):
    """What is wrong with a case; None if nothing is."""
    lines = [line for line in stderr.splitlines() if not line.startswith(("NOTE", "WARNING"))]
    left = {str(p) for p in Path().rglob(".*")} - before
    if code not in (0, 1, 2):
        return f"exit {code}"
    if len(lines) > 1 and "pictures" not in lines[0]:  # tqdm's bar is another line
        return f"{len(lines)} lines on stderr: {stderr}"
    if bool(code) != bool(lines) and "pictures" not in stderr:
        return f"exit {code} with {stderr!r}"
    return f"left behind: {left}" if left else None


def run_cases(first, last):
    """Run the cases in a new folder; print each seed before, and what is wrong after it."""
    faults = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        prepare()
        before = {str(p) for p in Path().rglob(".*")}
        for seed in range(first, last):
            print(f"seed {seed}", flush=True)
            code, stderr = run_case(seed)
            if last - first == 1:
                print(f"exit {code}\n{stderr}")
            if fault := get_fault(code, stderr, before):
                print(f"FAULT at seed {seed}: {fault}", flush=True)
                faults += 1
            for path, good in GOOD.items():
                shutil.copy(good, path)
    return faults


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--seed", type=int, help="run this case only")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)  # of a child
    args = parser.parse_args()
    if args.seed is not None:
        return run_cases(args.seed, args.seed + 1)
    if args.first is not None:
        return run_cases(args.first, args.first + PER_CHILD)
    start, faults, done = time.monotonic(), 0, 0
    while done < CASES and time.monotonic() < start + args.seconds:
        command = [sys.executable, __file__, "--first", str(done)]
        child = subprocess.run(command, capture_output=True, text=True)
        lines = child.stdout.splitlines()
        found = [line for line in lines if line.startswith("FAULT")]
        if child.returncode < 0 or not lines:
            found.append(f"FAULT at {lines[-1:]}: exit {child.returncode} {child.stderr[-300:]}")
        print(*found, sep="\n", end="\n" if found else "")
        faults += len(found)
        done += PER_CHILD
    print(f"{done} cases, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
