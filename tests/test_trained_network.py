"""A network trained on ImageNet, taken to OpenCV: it names what is on the pictures."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import PICTURES, ROOT, find_result, get_output, near, read_answer, run_picture
from PIL import Image
from torchvision import transforms

LABELS = dict(line.split() for line in (PICTURES / "val.txt").read_text().splitlines())
NAMES = (PICTURES / "imagenet_classes.txt").read_text().splitlines()
ALIAS = "trained_network-build_model"
OPTIONS = ["--scale", "0.0078125", "--mean", "127", "127", "127", "--std", "1", "1", "1"]


@pytest.mark.slow
def test_trained_network(run, folder):
    """A function in a file beside the user: converted, tested, evaluated, and known by its name."""
    shutil.copy(ROOT / "tests" / "trained_network.py", folder)
    options = ["--model_name", "trained_network:build_model", *OPTIONS]
    output = get_output(run("py_to_py_cls.py", *options, "--test", "True", "--evaluate", "True"))
    assert "RANDOM" not in output
    assert "label: lesser panda, red panda" in output

    summary = json.loads(find_result(folder, "summary.json", ALIAS).read_text())
    for network in ("pytorch", "opencv"):
        assert summary[network]["top1"] >= 100 * 10 / 12
        assert summary[network]["top5"] == 100
    assert summary["difference"]["same_class"] == 12 and summary["disagreements"] == []

    from trained_network import build_model

    model = build_model().eval()
    resized = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    names = ("chelsea_cat.jpg", "coffee.jpg", "koala.jpg")
    for name, label in zip(names, ("Egyptian cat", "espresso", "koala"), strict=True):
        logits = run_picture(model, (np.float32(resized(Image.open(PICTURES / name))) - 127) / 128)
        assert NAMES[logits.argmax()].split(",")[0] == label
        result = run("classification.py", ALIAS, "--input", PICTURES / name)
        assert read_answer(result) == near(logits, abs=1e-3)

    # that the answers could be wrong: without the scale factor half of the pictures are lost
    result = run("classification.py", ALIAS, "--input", PICTURES, "--scale", "1")
    answers = re.findall(rf"^{PICTURES}/(.*):\n\* class ID: (\d+),", result.stdout, re.M)
    assert len(answers) == 12
    assert sum(LABELS[name] == class_id for name, class_id in answers) < 8
