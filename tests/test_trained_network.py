"""A network trained on ImageNet, taken to OpenCV: it names what is on the pictures."""

import pytest
from conftest import PICTURES
from trained_network import OPTIONS, write_onnx

LABELS = dict(line.split() for line in (PICTURES / "val.txt").read_text().splitlines())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "efficientnet_lite0.onnx"
    write_onnx(path)
    return path


def count_recognised(run, trained, options):
    """(top-1, top-5): how many of the bundled pictures have their label among the answers."""
    result = run("classification.py", "--input", trained, PICTURES, "--top_k", "5", *options)
    assert result.returncode == 0, result.stderr
    top1 = top5 = 0
    for block in result.stdout.split(f"{PICTURES}/")[1:]:
        label = LABELS[block.partition(":")[0]]
        ids = [line.split()[3].rstrip(",") for line in block.splitlines() if "class ID" in line]
        assert len(ids) == 5
        top1, top5 = top1 + (label == ids[0]), top5 + (label in ids)
    return top1, top5


def test_pictures_are_recognised(run, trained):
    top1, top5 = count_recognised(run, trained, OPTIONS.split())
    assert top1 >= 10
    assert top5 == len(LABELS) == 12


def test_wrong_preprocessing_is_seen(run, trained):
    """That the test above can fail: without the scale factor half of them are lost."""
    top1, top5 = count_recognised(run, trained, [*OPTIONS.split(), "--scale", "1"])
    assert top1 < 8 and top5 < 9
