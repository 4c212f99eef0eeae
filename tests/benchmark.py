"""How long the scripts take, against the least that could do the same:

    python tests/benchmark.py

classification.py against five lines of cv2 in a process of their own, in turn, as the median of
the ratios; on a video, against the sum of decoding, blob and forward pass; and py_to_py_cls.py
--test True with cached weights, with and without conversion, the latter against
classification.py alone. With --resize, only the CPU time of --resize and the centre's cut against
that of Pillow and torchvision, in turn, on one thread.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import models, transforms

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from classification import TORCHVISION, get_centre, make_parser, read_zoo  # noqa: E402

PICTURE = ROOT / "test_data" / "cls" / "red_panda.jpg"
RUNS = 15
VIDEO_RUNS = 5

FIVE_LINES = """
import sys, cv2, numpy as np
model, picture = sys.argv[1:]
std = np.float32([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
image, net = cv2.imread(picture), cv2.dnn.readNetFromONNX(model)
small, mean = cv2.resize(image.astype(np.float32), (256, 256)), (123.675, 116.28, 103.53)
net.setInput(cv2.dnn.blobFromImage(small, 1 / 255, (224, 224), mean, True, True) / std)
answer = str(net.forward().argmax())
cv2.putText(image, answer, (10, 30), cv2.FONT_HERSHEY_SIMPLEX, 1, (0, 255, 0))
cv2.imwrite("result.jpg", image)
"""


VIDEO_LOOP = """
import sys, cv2
sys.path.insert(0, sys.argv[3])
from types import SimpleNamespace
from classification import ENGINES, TORCHVISION, get_blob
preprocessing = SimpleNamespace(**TORCHVISION)
engine = ENGINES[sys.argv[4]]
net, capture = cv2.dnn.readNetFromONNX(sys.argv[1], engine), cv2.VideoCapture(sys.argv[2])
read, frame = capture.read()
while read:
    net.setInput(get_blob(frame, preprocessing))
    net.forward()
    read, frame = capture.read()
"""


def write_video(path, size, frames=150):
    """A zoom into each of the bundled pictures, one after the other."""
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 25, size)
    pictures = [cv2.imread(str(p)) for p in sorted(PICTURE.parent.glob("*.jpg"))]
    for number in range(frames):
        picture = pictures[number // 25 % len(pictures)]
        zoom = 1 + number % 25 / 50
        matrix = np.diag([zoom * s / p for s, p in zip(size, picture.shape[1::-1], strict=True)])
        writer.write(cv2.warpAffine(picture, np.hstack([matrix, np.zeros((2, 1))]), size))
    writer.release()


def seconds(*command):
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    return time.perf_counter() - start


def compare_resize(size, mode):
    """Print get_centre's CPU time over that of torchvision's transforms, the least of each."""
    picture = cv2.resize(cv2.imread(str(PICTURE)), size)
    image, options = Image.fromarray(picture), TORCHVISION | {"interpolation": mode}
    resize = transforms.Resize(256, transforms.InterpolationMode(mode))
    theirs = transforms.Compose([resize, transforms.CenterCrop(224)])
    passes = (lambda: get_centre(picture, SimpleNamespace(**options)), lambda: theirs(image))
    times = [[], []]
    for _ in range(20):
        for run, found in zip(passes, times, strict=True):
            start = time.process_time()
            for _ in range(5):
                run()
            found.append((time.process_time() - start) / 5)
    ours, pillows = (1000 * min(found) for found in times)
    title = f"{size[0]}x{size[1]}, {mode}:"
    print(f"{title:22}{ours:6.2f} ms, Pillow {pillows:6.2f} ms, ratio {ours / pillows:.2f}")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--resize", action="store_true", help="compare --resize with Pillow alone")
    if parser.parse_args().resize:
        cv2.setNumThreads(1)
        for size in ((500, 375), (4000, 3000)):
            for mode in ("bilinear", "bicubic"):
                compare_resize(size, mode)
        return
    os.environ.pop("DISPLAY", None)
    os.environ.pop("WAYLAND_DISPLAY", None)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        # random weights in the place of trained ones: they take as long
        torch.save(models.resnet50().state_dict(), "trained.pth")
        test = (ROOT / "py_to_py_cls.py", "--model_name", "resnet50", "--test", "True")
        test += ("--weights", "trained.pth")
        first = seconds(*test)
        again = [seconds(*test) for _ in range(3)]
        print(f"test mode of resnet50, weights cached:    {first:.1f} s")
        print(f"test mode of resnet50, converted before:  {statistics.median(again):.1f} s")

        script = (ROOT / "classification.py", "--input", "models/resnet50-trained.onnx", PICTURE)
        lines = ("-c", FIVE_LINES, "models/resnet50-trained.onnx", PICTURE)
        seconds(*script), seconds(*lines)
        pairs = [(seconds(*script), seconds(*lines)) for _ in range(RUNS)]
        ratio = statistics.median(a / b for a, b in pairs)
        a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"classification.py, resnet50:              {a:.2f} s")
        print(f"five lines of cv2:                        {b:.2f} s")
        print(f"ratio:                                    {ratio:.2f}")

        pairs = [(seconds(*test), seconds(*script)) for _ in range(5)]
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"test mode, converted before / classification.py: {ratio:.2f}")

        squeezenet = ["--model_name", "squeezenet1_0", "--weights", "random", "--evaluate", "no"]
        seconds(ROOT / "py_to_py_cls.py", *squeezenet)
        for network in ("resnet50-trained", "squeezenet1_0-random"):
            for size in ((640, 480), (1280, 720)):
                write_video("video.mp4", size)
                path = f"models/{network}.onnx"
                script = (ROOT / "classification.py", "--input", path, "video.mp4")
                engine = read_zoo("models/models.yml")[network]["engine"]
                loop = ("-c", VIDEO_LOOP, path, "video.mp4", ROOT, engine)
                pairs = [(seconds(*script), seconds(*loop)) for _ in range(VIDEO_RUNS)]
                ratio = statistics.median(a / b for a, b in pairs)
                title = f"video {size[0]}x{size[1]}, {network.partition('-')[0]}:"
                print(f"{title:42}{ratio:.2f} x the sum of its parts", flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main()
