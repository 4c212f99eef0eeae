"""A network trained on ImageNet, taken to OpenCV: it names what is on the pictures."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import PICTURES, ROOT, read_answer

LABELS = dict(line.split() for line in (PICTURES / "val.txt").read_text().splitlines())
NAMES = (PICTURES / "imagenet_classes.txt").read_text().splitlines()
ALIAS = "trained_network-build_model"
OPTIONS = ["--scale", "0.0078125", "--mean", "127", "127", "127", "--std", "1", "1", "1"]


def test_trained_network(run, folder):
    """A function in a file beside the user: converted, tested, evaluated, and known by its name."""
    shutil.copy(ROOT / "tests" / "trained_network.py", folder)
    options = ["--model_name", "trained_network:build_model", *OPTIONS]
    result = run("py_to_py_cls.py", *options, "--test", "True", "--evaluate", "True")
    assert result.returncode == 0, result.stderr
    assert "RANDOM" not in result.stdout
    assert "label: lesser panda, red panda" in result.stdout

    summary = json.loads((folder / "logs" / f"{ALIAS}_summary.json").read_text())
    for network in ("PyTorch", f"OpenCV {cv2.__version__}"):
        assert summary[network]["top1"] >= 100 * 11 / 12
        assert summary[network]["top5"] == 100
    assert summary["difference"]["same_class"] == 12 and summary["disagreements"] == []

    expected = classify_with_pytorch()
    assert [NAMES[i].split(",")[0] for i, _ in expected.values()] == [
        "Egyptian cat",
        "espresso",
        "suspension bridge",
    ]
    for name, (class_id, logit) in expected.items():
        result = run("classification.py", ALIAS, "--input", PICTURES / name)
        assert read_answer(result.stdout) == (class_id, pytest.approx(logit, abs=1e-3))

    # that the answers could be wrong: without the scale factor half of the pictures are lost
    result = run("classification.py", ALIAS, "--input", PICTURES, "--scale", "1")
    blocks = result.stdout.split(f"{PICTURES}/")[1:]
    assert len(blocks) == 12
    right = sum(int(LABELS[b.partition(":")[0]]) == read_answer(b)[0] for b in blocks)
    assert right < 8


def classify_with_pytorch():
    """{picture: (class ID, logit)} by PyTorch, without the project's code."""
    from trained_network import build_model

    model = build_model().eval()
    found = {}
    for name in ("chelsea_cat.jpg", "coffee.jpg", "suspension_bridge.jpg"):
        rgb = cv2.imread(str(PICTURES / name))[:, :, ::-1].astype(np.float32)
        rgb = cv2.resize(cv2.resize(rgb, (256, 256)), (224, 224))
        with torch.no_grad():
            logits = model(torch.from_numpy((rgb - 127) / 128).permute(2, 0, 1)[None])
        found[name] = int(logits.argmax()), float(logits.max())
    return found
