"""The evaluation: its figures, what it does with odd data, and that nothing is lost."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from conftest import PICTURES, ROOT, check_one_line
from filelock import FileLock

LABELLED = [line.split() for line in (PICTURES / "val.txt").read_text().splitlines()]
CLS = str(ROOT / "py_to_py_cls.py")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Forty small photographs in four class folders, and the same with a label file."""
    root = tmp_path_factory.mktemp("data")
    lines = []
    for number in range(40):
        picture = cv2.imread(str(PICTURES / LABELLED[number % 12][0]))
        x = 10 * (number // 12)
        small = cv2.resize(picture[x : x + 200, x : x + 230], (120, 90))
        name = f"class{number % 4}/picture{number:02}.jpg"
        (root / "folders" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / "folders" / name), small)
        lines.append(f"{name} {number % 4}\n")
    (root / "labels.txt").write_text("".join(sorted(lines)))
    return root


@pytest.fixture
def command(data, weights, converted):
    """An evaluation in ten batches, on one engine, without a conversion.

    From the class folders, while `whole` is from the label file: so each test that compares the
    two shows as well that the folders in sorted order are the classes 0, 1, 2 ...
    """
    options = [
        "--model_name",
        "squeezenet1_1",
        "--weights",
        str(weights),
        "--model",
        str(converted),
    ]
    options += ["--img_root_dir", str(data / "folders"), "--batch_size", "4", "--engine", "new"]
    return [sys.executable, CLS, *options]


def read_figures(folder, name="squeezenet1_1_summary.json"):
    """The figures that must not depend on how the run went."""
    summary = json.loads((folder / "logs" / name).read_text())
    times = ("ms_mean", "ms_median", "ms_p95")
    for network in summary.values():
        if isinstance(network, dict) and "ms_mean" in network:
            for name in times:
                assert network.pop(name) > 0
    about = ("seconds", "forward_seconds", "processes", "threads", "processor")
    about += ("data", "data_times_sha256")  # of a worker's own copy
    return {k: v for k, v in summary.items() if k not in about}


@pytest.fixture(scope="session")
def whole(tmp_path_factory, data, weights, converted):
    """Figures of a run that was never stopped, from the label file; made by one worker for all."""
    folder = tmp_path_factory.getbasetemp().parent / "whole"
    with FileLock(f"{folder}.lock"):
        if not (folder / "logs" / "squeezenet1_1_summary.json").exists():
            folder.mkdir(exist_ok=True)
            options = ["--model_name", "squeezenet1_1", "--weights", weights, "--model", converted]
            options += ["--img_root_dir", data / "folders", "--img_cls_file", data / "labels.txt"]
            options += ["--batch_size", "4", "--engine", "new"]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            command = [sys.executable, CLS, *map(str, options)]
            subprocess.run(command, cwd=folder, check=True, env=env)
    assert sorted(p.name for p in (folder / "logs").iterdir()) == [
        "squeezenet1_1_log.txt",
        "squeezenet1_1_summary.json",
        "squeezenet1_1_time.png",
    ]
    return read_figures(folder)


def test_evaluation_is_right(run, folder, weights, squeezenet, get_logits):
    """Accuracy against labels chosen so that it is neither 0 nor 100, counted here by itself."""
    lines, top1, top5 = [], 0, 0
    for number, (name, _) in enumerate(LABELLED):
        order = np.argsort(-get_logits(squeezenet, PICTURES / name, centre_crop=True))
        rank = (0, 3, 7)[number % 3]
        top1, top5 = top1 + (rank < 1), top5 + (rank < 5)
        lines.append(f"{name} {order[rank]}\n")
    (folder / "labels.txt").write_text("".join(lines))
    shutil.copy(weights, folder / "own.pth")
    options = ["--model_name", "squeezenet1_1", "--weights", "own.pth", "--batch_size", "5"]
    options += ["--img_root_dir", PICTURES, "--img_cls_file", "labels.txt"]
    result = run("py_to_py_cls.py", *options)
    assert result.returncode == 0, result.stderr
    log = (folder / "logs" / "squeezenet1_1-own_log.txt").read_text()
    for k, right in ((1, top1), (5, top5)):
        figure = f" +{100 * right / 12:.2f}"
        for text in (result.stdout, log):
            assert len(re.findall(rf"^top-{k} accuracy, %{figure}{figure}$", text, re.M)) == 1
    assert "same class 12 of 12" in result.stdout
    done = re.findall(r"^(\d+) Accuracy for PyTorch", log, re.M)
    assert done == ["5", "10", "12"]
    l1, l_inf = map(float, re.findall(r"L1 (\S+), L_inf (\S+),", log)[-1])
    assert 0 < l1 <= l_inf < 1e-3
    chart = cv2.imread(str(folder / "logs" / "squeezenet1_1-own_time.png"))
    assert chart.shape[0] > 400 and chart.std() > 10
    summary = json.loads((folder / "logs" / "squeezenet1_1-own_summary.json").read_text())
    for network in ("PyTorch", f"OpenCV {cv2.__version__}"):
        assert summary[network]["top1"] == 100 * top1 / 12
        assert summary[network]["ms_median"] <= summary[network]["ms_p95"]
    assert summary["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_evaluation_blob_is_torchvisions(folder):
    """The true centre crop: torchvision's own transforms on the same resized picture."""
    from torchvision.transforms import v2

    from classification import TORCHVISION_PREPROCESSING
    from evaluation import get_centre_blob

    path = PICTURES / "koala.jpg"
    rgb = cv2.resize(cv2.imread(str(path))[:, :, ::-1].astype(np.float32), (256, 256)) / 255
    transforms = v2.Compose(
        [v2.CenterCrop(224), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    expected = transforms(torch.from_numpy(rgb).permute(2, 0, 1))[None].numpy()
    blob = get_centre_blob(cv2.imread(str(path)), TORCHVISION_PREPROCESSING)
    assert blob.dtype == np.float32
    assert np.abs(blob - expected).max() < 1e-5


def test_preprocess_of_the_weights(data):
    """--preprocess torchvision: what torchvision makes of the picture that PIL reads."""
    from PIL import Image
    from torchvision import models

    from evaluation import get_published, get_torchvision_blob
    from networks import Network, Weights, get_transforms

    transforms = get_transforms("resnet50", Weights("torchvision", "IMAGENET1K_V2"))
    path = PICTURES / "koala.jpg"
    expected = models.ResNet50_Weights.IMAGENET1K_V2.transforms()(Image.open(path))[None].numpy()
    blob = get_torchvision_blob(cv2.imread(str(path)), transforms)
    assert blob.shape == (1, 3, 224, 224)
    assert np.abs(blob - expected).mean() < 0.02
    network = Network("resnet50", Weights("torchvision", "IMAGENET1K_V1"), None)
    assert get_published(network) == {"acc@1": 76.13, "acc@5": 92.862}
    assert get_published(Network("resnet50", Weights("random", "random"), None)) == {}


def test_pictures_that_cannot_be_read(run, folder, weights, converted):
    """Skipped, counted and listed, with the figures of the others; over 1 % the exit code is 1."""
    for name, _ in LABELLED[:4]:
        shutil.copy(PICTURES / name, folder)
    (folder / "cut.jpg").write_bytes((PICTURES / "koala.jpg").read_bytes()[:9000])
    names = [name for name, _ in LABELLED[:4]] + ["cut.jpg", "missing.jpg"]
    (folder / "val.txt").write_text("".join(f"{name} 1\n\n" for name in names))
    options = ["--weights", weights, "--model", converted, "--img_root_dir", ".", "--batch_size", 2]
    result = run("py_to_py_cls.py", "--model_name", "squeezenet1_1", *options)
    check_one_line(result, "2 of 6 pictures", code=1)
    log = (folder / "logs" / "squeezenet1_1_log.txt").read_text()
    for text in (result.stdout, log):
        assert "skipped: 2 pictures" in text
        assert "cut.jpg: truncated" in text and "missing.jpg: No such file" in text
    assert read_figures(folder)["read"] == 4


def test_odd_pictures(run, folder, weights, converted):
    """Grey, CMYK, alpha, 16 bits, turned by EXIF, one pixel high."""
    from PIL import Image

    colour = Image.open(PICTURES / "koala.jpg").resize((300, 400))
    colour.save(folder / "plain.png")
    colour.convert("L").save(folder / "grey.jpg")
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    colour.convert("RGBA").save(folder / "alpha.png")
    deep = cv2.imread(str(folder / "plain.png")).astype(np.uint16) * 257
    cv2.imwrite(str(folder / "deep.png"), deep)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    colour.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif, quality=100)
    Image.new("RGB", (500, 1), (90, 120, 30)).save(folder / "flat.png")

    from classification import read_picture

    plain = read_picture(folder / "plain.png").astype(int)
    for name in ("alpha.png", "deep.png", "turned.jpg"):
        assert np.abs(read_picture(folder / name) - plain).mean() < 2, name

    names = sorted(p.name for p in folder.glob("*.*g"))
    assert len(names) == 7
    (folder / "val.txt").write_text("".join(f"{name} 1\n" for name in names))
    options = ["--weights", weights, "--model", converted, "--img_root_dir", "."]
    result = run("py_to_py_cls.py", "--model_name", "squeezenet1_1", *options)
    assert result.returncode == 0, result.stderr
    assert "same class 7 of 7" in result.stdout


def start(command, folder, env, **options):
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def count_batches(folder):
    """Whole lines of records in the state file."""
    return sum(p.read_text().count('"batch"') for p in folder.glob("logs/*.state"))


def stop_after(process, folder, batches, signum):
    while count_batches(folder) < batches and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signum)
    return process.communicate(timeout=60)


@pytest.mark.slow
def test_killed_at_several_points(folder, env, command, whole):
    """SIGKILL twice, and a line that broke off: the figures are those of an unbroken run."""
    stop_after(start(command, folder, env), folder, 2, signal.SIGKILL)
    first = count_batches(folder)
    stop_after(start(command, folder, env), folder, first + 2, signal.SIGKILL)
    assert 4 <= count_batches(folder) < 10
    assert not (folder / "logs" / "squeezenet1_1_summary.json").exists()
    (state,) = folder.glob("logs/*.state")
    with open(state, "a") as file:
        file.write('{"batch": 9, "pict')
    done = count_batches(folder) - 1
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"resuming after {4 * done} of 40 pictures" in result.stdout
    assert read_figures(folder) == whole
    assert not list(folder.glob("logs/*.state"))


def test_ctrl_c(folder, env, command):
    """The results so far, marked as partial."""
    process = start(command, folder, env)
    stdout, stderr = stop_after(process, folder, 2, signal.SIGINT)
    assert process.returncode == 130
    assert stderr.splitlines() == ["py_to_py_cls.py: stopped by Ctrl-C"]
    assert (
        "PARTIAL" in stdout and "PARTIAL" in (folder / "logs" / "squeezenet1_1_log.txt").read_text()
    )
    assert read_figures(folder)["partial"]


@pytest.mark.slow
def test_other_settings_take_nothing_over(folder, env, command):
    stop_after(start(command, folder, env), folder, 2, signal.SIGKILL)
    state = list(folder.glob("logs/*.state"))
    other = [*command, "--batch_size", "20"]
    result = subprocess.run(other, cwd=folder, env=env, capture_output=True, text=True)
    assert "resuming" not in result.stdout
    assert list(folder.glob("logs/*.state")) == state
    anew = [*command, "--resume", "False"]
    result = subprocess.run(anew, cwd=folder, env=env, capture_output=True, text=True)
    assert "resuming" not in result.stdout
    assert not list(folder.glob("logs/*.state"))


def test_class_folders_with_links_and_hidden_folders(folder, capsys):
    """Each real folder counts once; a hidden folder isn't a class and doesn't shift the others."""
    from evaluation import read_class_folders

    for name in (
        ".ipynb_checkpoints/x.jpg",
        "a/1.jpg",
        "a/deep/2.jpg",
        "a/.cache/y.jpg",
        "b/3.jpg",
    ):
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "set" / name).touch()
    os.symlink("..", folder / "set" / "a" / "loop")
    os.symlink("../..", folder / "set" / "b" / "up")
    os.symlink("../a/deep", folder / "set" / "b" / "again")
    found = read_class_folders(str(folder / "set"))
    assert [(os.path.basename(path), label) for path, label in found] == [
        ("1.jpg", 0),
        ("2.jpg", 0),
        ("3.jpg", 1),
    ]
    out = capsys.readouterr().out
    assert "3 pictures in 2 classes" in out and ".ipynb_checkpoints" in out


def test_fingerprint_of_the_data(folder):
    """Changed pictures of the same names and sizes are other data to go on with."""
    from evaluation import get_data_fingerprint

    shutil.copy(PICTURES / "koala.jpg", folder)
    pictures = [(str(folder / "koala.jpg"), 105)]
    before = get_data_fingerprint(pictures, folder)
    status = os.stat(folder / "koala.jpg")
    # another picture of the same size, and its times set back
    (folder / "koala.jpg").write_bytes(bytes(status.st_size))
    os.utime(folder / "koala.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))
    after = get_data_fingerprint(pictures, folder)
    assert after["data_sha256"] == before["data_sha256"]
    assert after["data_times_sha256"] != before["data_times_sha256"]
    other = get_data_fingerprint([(pictures[0][0], 106)], folder)
    assert other["data_sha256"] != before["data_sha256"]


@pytest.mark.slow
def test_full_disk(folder, env, command, whole):
    """A limit on the size of a file stands in for it: one line, and the state so far intact."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # noqa: E731
    process = start(command, folder, env, preexec_fn=limit)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert len(stderr.splitlines()) == 1 and "can't be written" in stderr
    assert count_batches(folder) >= 1
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert "resuming after" in result.stdout
    assert read_figures(folder) == whole


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def test_two_processes_give_the_figures_of_one(folder, env, command, whole):
    torchrun = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *command[1:]]
    result = subprocess.run(torchrun, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("same class 40 of 40") == 1
    assert read_figures(folder) == whole
    assert sorted(p.suffix for p in (folder / "logs").iterdir()) == [".json", ".png", ".txt"]


@pytest.mark.slow
def test_two_machines_give_the_figures_of_one(folder, env, command, whole, free_port):
    """Two agents, as they are started on two machines, each in a folder of its own."""
    agents = []
    for rank in range(2):
        (folder / f"machine{rank}").mkdir()
        torchrun = [*TORCHRUN, "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
        torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(free_port), *command[1:]]
        agents.append(start(torchrun, folder / f"machine{rank}", env))
    for agent in agents:
        _, stderr = agent.communicate(timeout=300)
        assert agent.returncode == 0, stderr
    assert read_figures(folder / "machine0") == whole
    assert not list((folder / "machine1").glob("logs/*.json"))


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run(folder, env, command, whole):
    """With an error, no hang; and one process continues from what both have done."""
    agent = start([*TORCHRUN, "--standalone", "--nproc-per-node", "2", *command[1:]], folder, env)
    while count_batches(folder) < 2 and agent.poll() is None:
        time.sleep(0.005)
    ranks = subprocess.run(
        ["pgrep", "-P", str(agent.pid), "-f", "py_to_py_cls"], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    agent.communicate(timeout=120)
    assert agent.returncode != 0
    assert not (folder / "logs" / "squeezenet1_1_summary.json").exists()
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert "resuming after" in result.stdout
    assert read_figures(folder) == whole


@pytest.mark.slow
def test_results_that_cannot_be_written_under_torchrun(folder, env, command, whole):
    """The states of all processes are kept."""
    (folder / "logs" / "squeezenet1_1_log.txt").mkdir(parents=True)
    torchrun = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *command[1:]]
    result = subprocess.run(torchrun, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode != 0 and "squeezenet1_1_log.txt: can't be written" in result.stderr
    assert count_batches(folder) == 10
    (folder / "logs" / "squeezenet1_1_log.txt").rmdir()
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert "resuming after 40 of 40 pictures" in result.stdout
    assert read_figures(folder) == whole
