"""Every network of the tutorial's list, converted and compared; and their files in other OpenCVs:

python -m pytest --all-models tests/test_all_models.py

What one worker has converted or installed, the others take.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import tarfile
import venv

import cv2
import pytest
from conftest import MODELS, PICTURES, ROOT, get_output, near, read_answer
from filelock import FileLock

from classification import read_zoo
from networks import Request, load_network

KOALA = PICTURES / "koala.jpg"
PACKAGES = [
    "opencv-python==4.10.*",
    "opencv-python==4.14.*",
    "opencv-python-headless==4.10.*",
    "opencv-python-headless==4.14.*",
    "opencv-python-headless==5.0.*",
]


pytestmark = pytest.mark.all_models


@contextlib.contextmanager
def make_once(folder):
    """Yield the folder to the worker that has to fill it, and None to those after it."""
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            yield None
            return
        folder.mkdir()
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder)
            raise


@pytest.fixture
def convert(shared, execute):
    """convert(name): the network's file, alone in its folder, and the program's output."""

    def convert(name):
        with make_once(shared / name) as folder:
            if folder:
                options = ["--model_name", name, "--weights", "random", "--evaluate", "False"]
                command = [sys.executable, ROOT / "py_to_py_cls.py", *options]
                (folder / "output.txt").write_text(get_output(execute(*command, cwd=folder)))
        path = shared / name / "models" / f"{name}-random.onnx"
        return path, (shared / name / "output.txt").read_text()

    return convert


@pytest.mark.parametrize("name", MODELS)
def test_network(convert, name):
    path, output = convert(name)
    assert path.is_file()
    errors = [float(e) for e in re.findall(r" (\d\.\de-\d\d)\b", output)]
    assert len(errors) in (6, 8)  # two engines, three or four comparisons each
    assert 0 < max(errors) < 1e-4
    print(f"{name}: relative error {max(errors):.1e}")


@pytest.fixture(scope="session")
def answers(get_logits):
    """{network: PyTorch's logits of the koala}, preprocessed without the project."""
    found = {}
    for name in MODELS:
        found[name] = get_logits(load_network(Request(name, "random")).model, KOALA)
    return found


@pytest.fixture(scope="session")
def install(shared):
    """install(package): the Python of an environment with this OpenCV and NumPy."""

    def install(package):
        environment = shared / package.replace("*", "x")
        python = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        with make_once(environment) as folder:
            if folder:
                venv.create(folder, with_pip=True)
                subprocess.run([python, "-m", "pip", "install", "-q", package, "numpy"], check=True)
        return python

    return install


@pytest.mark.parametrize("package", PACKAGES)
def test_opencv_version(convert, answers, install, execute, package):
    """classification.py gives PyTorch's answer with all the files, in an environment of its own."""
    python = install(package)
    found = execute(python, "-c", "import cv2; print(cv2.__version__)").stdout.strip()
    assert package.partition("==")[2].rstrip("*") in found
    script = ROOT / "classification.py"
    engines = re.search(r"--engine \{(.*)\}", execute(python, script, "--help").stdout)[1]
    assert engines == ("new,classic,auto" if found.startswith("5") else "auto")
    for name, logits in answers.items():
        path, _ = convert(name)
        by_name = [path.stem, "--zoo", path.with_name("models.yml"), "--input", KOALA]
        for options in (by_name, ["--input", path, KOALA])[: 2 if name == MODELS[0] else 1]:
            result = execute(python, script, *options)
            assert read_answer(result) == near(logits, rel=1e-4, abs=1e-4)
    print(f"{package}: OpenCV {found} gives PyTorch's answer with {len(answers)} networks")


# --- OpenCV's own sample --------------------------------------------------------------------------

# Runs a script without its windows, and prints the text that it writes on the picture.
WITHOUT_WINDOWS = """
import os, runpy, sys, cv2
cv2.namedWindow = cv2.imshow = lambda *args: None
cv2.waitKey = lambda *args: -1
cv2.putText = lambda picture, text, *args: print("text:", text)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""

STD = ["--std", "0.229", "0.224", "0.225"]
CROP = ["--crop", "True"]  # OpenCV's samples don't know the entry's `resize`
# package: the options for OpenCV's sample, and how far the logits may be apart: 4.10's rounds
# pixels to whole numbers
SAMPLES = {
    "opencv-python-headless==5.0.*": ([], 0.006),
    "opencv-python-headless==4.10.*": ([*STD, *CROP], 0.03),
}


@pytest.fixture(scope="session")
def download_samples(shared):
    """download_samples(package): the folder samples/dnn of OpenCV's source package."""

    def download(package):
        samples = shared / f"samples-{package.replace('*', 'x')}"
        with make_once(samples) as folder:
            if folder:
                command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", package]
                command += ["--no-binary", "opencv-python-headless", "-d", folder]
                if subprocess.run(command).returncode:
                    pytest.skip(f"the source package of {package} can't be downloaded")
                with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
                    for member in archive:
                        if "/opencv/samples/dnn/" in member.name and member.isfile():
                            archive.extract(member, folder, filter="data")
        return next(samples.glob("*/opencv/samples/dnn"))

    return download


@pytest.fixture
def koala(folder):
    """The picture in the size of the blob, in a format without loss."""
    path = folder / "koala.png"
    cv2.imwrite(str(path), cv2.resize(cv2.imread(str(KOALA)), (224, 224)))
    return path


@pytest.mark.parametrize("package", SAMPLES)
def test_opencvs_sample(convert, install, execute, download_samples, koala, package):
    """OpenCV's own classification.py takes each entry by name, and names the class that ours does.

    It runs in the entries' folder, for the files that they name.
    """
    python, sample = install(package), download_samples(package) / "classification.py"
    theirs, tolerance = SAMPLES[package]
    for name in MODELS:
        path, _ = convert(name)
        command = [python, "-c", WITHOUT_WINDOWS, sample, path.stem, "--zoo", "models.yml"]
        output = get_output(execute(*command, "--input", koala, *theirs, cwd=path.parent))
        shown = [text.rpartition(": ") for text in re.findall("^text: (.*)$", output, re.M)]
        shown = [(float(logit), label) for label, _, logit in shown if not logit.endswith(" ms")]
        logit, label = max(shown)

        command = [python, ROOT / "classification.py", "--top_k", "5", *CROP, "--input", koala]
        command += ["--zoo", path.with_name("models.yml"), "--", path.stem]
        output = get_output(execute(*command))
        labels = re.findall("label: (.*)$", output, re.M)
        logits = [float(c) for c in re.findall("confidence: (.*)$", output, re.M)]
        assert logits[labels.index(label)] == pytest.approx(logits[0], abs=tolerance)
        assert logits[0] == pytest.approx(logit, abs=tolerance)
    print(f"the sample of {package} answers like ours with {len(MODELS)} networks")


# A stand-in for the Caffe networks of OpenCV 4.10: the mean of each channel, in the shape
# (1, 3, 1, 1) that its SqueezeNet has
PROTOTXT = """
input: "data"
input_shape { dim: 1 dim: 3 dim: 224 dim: 224 }
layer {
  name: "pool" type: "Pooling" bottom: "data" top: "pool"
  pooling_param { pool: AVE global_pooling: true }
}
"""


@pytest.mark.parametrize("package", SAMPLES)
def test_all_of_opencvs_entries(
    convert, install, execute, download_samples, koala, env, folder, package
):
    """Ours, under another name in OpenCV's folder, answers like OpenCV's with each of its entries.

    The models stand in for theirs, where their environment variables say.
    """
    path, _ = convert("squeezenet1_1")
    samples, python = folder / "dnn", install(package)
    shutil.copytree(download_samples(package), samples)
    shutil.copy(ROOT / "classification.py", samples / "classification_onnx.py")
    shutil.copytree(path.parent, samples / "models")  # where ours looks first
    (folder / "data" / "dnn").mkdir(parents=True)
    env["OPENCV_DOWNLOAD_CACHE_DIR"] = str(folder / "cache")
    for variable in ("OPENCV_SAMPLES_DATA_PATH", "OPENCV_DNN_TEST_DATA_PATH"):
        env[variable] = str(folder / "data")
    entries = read_zoo(samples / "models.yml")
    assert set(entries) >= {"squeezenet", "googlenet"}
    for name, entry in entries.items():
        caffe = "config" in entry
        if caffe:
            (folder / "data" / "dnn" / entry["config"]).write_text(PROTOTXT)
            (folder / "data" / "dnn" / entry["model"]).write_bytes(b"")
        else:
            (folder / "cache" / entry["load_info"]["sha1"]).mkdir(parents=True)
            shutil.copy(path, folder / "cache" / entry["load_info"]["sha1"] / entry["model"])
        labels = folder / "data" / "dnn" / entry.get("labels", entry.get("classes"))
        labels.write_text("".join(f"name {i}\n" for i in range(3 if caffe else 1000)))
        command = [python, "-c", WITHOUT_WINDOWS, samples / "classification.py", name]
        output = get_output(execute(*command, "--input", koala, cwd=samples))
        texts = re.findall(r"^text: (name \d+): (-?\d+\.\d+)$", output, re.M)
        logit, label = max((float(logit), label) for label, logit in texts)
        for options in ([], ["--labels", labels.name]):
            command = [python, samples / "classification_onnx.py", name, *options]
            result = execute(*command, "--input", koala, cwd=samples)
            assert f"label: {label}\n" in result.stdout
            # theirs resizes whole numbers, and prints two decimals
            tolerance = 0.02 if entry["width"] == 224 else 0.2
            assert read_answer(result)[1] == pytest.approx(logit, abs=tolerance)
    print(f"the {len(entries)} entries of {package} give its sample's answers")
