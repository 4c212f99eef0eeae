"""Pictures prepared as PyTorch's pipelines prepare them, and what a transform is measured to do."""

import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import PICTURES, check_one_line, get_output, near, read_answer, run_torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import v2

from classification import get_blob, get_centre
from networks import Request, load_network
from preprocessing import measure

KOALA = PICTURES / "koala.jpg"
MODES = {name: T.InterpolationMode(name) for name in ("bilinear", "bicubic", "lanczos", "nearest")}
SIZES = [(1, 500), (64, 64), (300, 300), (1300, 1000), (341, 256), (333, 251), (200, 600)]
SIZES += [(600, 200), (37, 1000), (256, 256), (224, 224), (257, 255)]
TO_TENSOR = T.ToTensor()
NORMALIZE = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
IMAGENETS = {"scale": 1 / 255, "mean": (123.675, 116.28, 103.53), "std": (0.229, 0.224, 0.225)}
PHOTOGRAPHS = ("bison.jpg", "camera_tripod.jpg", "chelsea_cat.jpg")


def make_noise(width, height):
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)


def options(resize, width=224, height=224, interpolation="bilinear", center="round"):
    return SimpleNamespace(**locals())


# --- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", MODES)
def test_pixels_are_pillows(size, interpolation):
    """Both forms of --resize, centres that are rounded up and down, and padded ones."""
    picture, mode = make_noise(*size), MODES[interpolation]
    for resize, width, height in [
        ((256,), 224, 224), ((235,), 224, 224), ((150,), 224, 100), ((64,), 64, 64),
        ((128, 200), 100, 90), ((224, 224), 224, 224),
    ]:  # fmt: skip
        if min(size) == 1 and interpolation != "bilinear":
            continue  # torchvision would make a side of 128,000 px
        to = resize[0] if len(resize) == 1 else resize[::-1]
        crop = T.Compose([T.Resize(to, mode), T.CenterCrop((height, width))])
        expected = np.asarray(crop(Image.fromarray(picture)))
        found = get_centre(picture, options(resize, width, height, interpolation))
        assert np.array_equal(found, expected), resize


def test_pixels_of_the_other_interpolations():
    """cv2's on the whole picture, and torch's nearest-exact."""
    picture = make_noise(331, 250)
    for name in ("linear", "cubic", "area"):
        whole = cv2.resize(picture, (340, 257), interpolation=getattr(cv2, f"INTER_{name.upper()}"))
        found = get_centre(picture, options((257,), 200, 224, f"cv2-{name}"))
        assert np.array_equal(found, whole[16:240, 70:270])
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    expected = v2.functional.resize(tensor, [170, 177], T.InterpolationMode.NEAREST_EXACT)
    found = get_centre(picture, options((177, 170), 177, 170, "nearest-exact"))
    assert np.array_equal(found, expected.permute(1, 2, 0).numpy())


def test_where_the_centre_begins():
    """3 px are cut off: 1.5 is rounded to 2, half to even, and floored to 1; first cuts, then
    resizes."""
    picture = make_noise(227, 227)
    assert np.array_equal(get_centre(picture, options((227,))), picture[2:226, 2:226])
    floored = get_centre(picture, options((227,), center="floor"))
    assert np.array_equal(floored, picture[1:225, 1:225])
    wide = make_noise(400, 300)
    square = Image.fromarray(np.ascontiguousarray(wide[:, 50:350])).resize((224, 224), 2)
    found = get_centre(wide, options((224, 224), center="first"))
    assert np.array_equal(found, np.asarray(square))


# --- what a transform does ------------------------------------------------------------------------


def compose(*steps, to_tensor=TO_TENSOR, normalize=NORMALIZE):
    return T.Compose([*steps, to_tensor, normalize])


def measure_it(transform):
    return measure(transform, [np.asarray(Image.open(PICTURES / n)) for n in PHOTOGRAPHS])


HALVES = {"scale": 1 / 255, "mean": (127.5,) * 3, "std": (0.5,) * 3}
CAFFE = T.Lambda(lambda image: torch.from_numpy(np.float32(image)[..., ::-1].copy()))
V2 = [v2.ToImage(), v2.Resize(256), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True)]
FLOOR = T.Lambda(lambda image: image.crop((left := (image.width - 224) // 2, top := (image.height - 224) // 2, left + 224, top + 224)))  # noqa: E501  # fmt: skip


@pytest.mark.parametrize(
    "transform, expected",
    [
        (compose(T.Resize(256), T.CenterCrop(224)), {"resize": (256,), **IMAGENETS}),
        (compose(T.Resize(232), T.CenterCrop(224)), {"resize": (232,), "center": "round"}),
        (compose(T.Resize(259), FLOOR), {"resize": (259,), "center": "floor"}),
        (compose(T.Resize(248, MODES["bicubic"]), T.CenterCrop(224)),
         {"resize": (248,), "interpolation": "bicubic"}),
        (compose(T.Resize(342, MODES["lanczos"]), T.CenterCrop(299)),
         {"resize": (342,), "interpolation": "lanczos", "width": 299}),
        (compose(T.Resize((150, 250))), {"resize": (250, 150), "width": 250, "crop": False}),
        (compose(T.Resize((257, 257)), T.CenterCrop(224)), {"resize": (257, 257), "crop": True}),
        (compose(T.Resize(40), T.CenterCrop((28, 32))), {"resize": (40,), "height": 28}),
        (compose(T.Resize(6), T.CenterCrop(4)), {"resize": (6,), "width": 4}),
        (compose(T.Resize(1000), T.CenterCrop(224)), {"resize": (1000,)}),
        (compose(T.CenterCrop(224), normalize=T.Resize(64)), None),
        (v2.Compose([*V2, v2.Normalize([0.5] * 3, [0.5] * 3)]), {"resize": (256,), **HALVES}),
        (compose(T.Resize(256), T.CenterCrop(227), to_tensor=CAFFE,
                 normalize=T.Lambda(lambda t: t.permute(2, 0, 1) - 100)),
         {"scale": 1, "mean": (100,) * 3, "std": (), "rgb": False}),
        (compose(T.ToTensor(), T.Resize(256, antialias=False), T.CenterCrop(224),
                 to_tensor=T.Lambda(lambda t: t)), {"interpolation": "cv2-linear"}),
    ],
)  # fmt: skip
def test_measured(transform, expected):
    """What each transform is said to do, and within half a grey level in every picture."""
    if expected is None:
        with pytest.raises(ValueError, match="without resizing it"):
            measure_it(transform)
        return
    measured, difference = measure_it(transform)
    fields = vars(measured.preprocessing)
    assert {key: fields[key] for key in expected} == expected
    assert difference < 0.5 and measured.mix is None
    picture = make_noise(500, 375)
    result = np.asarray(transform(Image.fromarray(picture)))
    blob = get_blob(np.ascontiguousarray(picture[..., ::-1]), measured.preprocessing)[0]
    levels = np.abs(blob - result).mean() / np.ptp(result) * 255
    assert levels < 0.5


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_is_a_convolution(channels):
    normalize = T.Normalize([0.5, 0.25, 0.1][:channels], [0.5, 0.2, 1.0][:channels])
    steps = T.Grayscale(channels), T.Resize(256), T.CenterCrop(224)
    transform = compose(*steps, normalize=normalize)
    measured, difference = measure_it(transform)
    assert difference < 0.5 and measured.preprocessing.std == ()
    picture = make_noise(500, 375)
    result = np.asarray(transform(Image.fromarray(picture)))
    assert np.abs(measured.get_result(picture) - result).mean() < 0.5 / 255 / 0.2


class Each:
    """Normalizes each picture by itself."""

    def __call__(self, picture):
        tensor = T.ToTensor()(picture.resize((64, 64)))
        return (tensor - tensor.mean()) / (tensor.std() + 1e-5)


@pytest.mark.parametrize(
    "transform, reason",
    [
        (compose(T.RandomResizedCrop(224)), "random"),
        (compose(T.Resize((64, 64)), T.RandomHorizontalFlip()), "random"),
        (compose(T.Resize(224)), "size of its result depends on the picture's"),
        (Each(), "white is the same as black: it normalizes each"),
        (compose(T.Resize((60, 60)), T.Pad(2)), "one colour isn't one any more: it pads"),
        (compose(T.Resize(64, max_size=70), T.CenterCrop(64)), "pads pictures that aren't square"),
        (compose(T.CenterCrop(224)), "cuts a piece out of the picture without resizing"),
        (T.Compose([T.Resize((64, 64)), T.Lambda(lambda p: p.convert("HSV")), T.ToTensor()]),
         "changes brightness or colours"),
        (compose(T.Resize((64, 64)), normalize=T.Lambda(lambda t: t**0.5)), "changes brightness"),
        (compose(T.Resize((64, 64)), normalize=T.Lambda(lambda t: t[[1, 2, 0]])), "order G B R"),
        (compose(T.Resize((64, 64)), normalize=T.Lambda(lambda t: t + t[[1, 2, 0]])), "mixes"),
        (compose(T.Resize((64, 64)), T.RandomHorizontalFlip(1.0)), "mirrors or turns"),
        (T.Compose([T.Resize(256), T.TenCrop(64), T.Lambda(
            lambda crops: torch.stack([T.ToTensor()(crop) for crop in crops]))]),
         r"shape \(10, 3, 64, 64\), not a tensor of shape \(3, height, width\)"),
        (T.Resize((64, 64)), "not a tensor"),
        (lambda picture: picture.nope, "fails with AttributeError: .*nope"),
    ],
)  # fmt: skip
def test_reasons_for_a_refusal(transform, reason):
    with pytest.raises(ValueError, match=reason):
        measure_it(transform)


# --- from the command line ------------------------------------------------------------------------

MINE = """
import torch
from torch import nn
from torchvision import transforms as T

class Net(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(channels, 8, 3, 2), nn.Linear(8, 10)
    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))

def grey():
    return Net(1)

normalize = T.Normalize([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
def transform():
    return T.Compose([T.Resize(40), T.CenterCrop(32), T.ToTensor(), normalize])
cifar = T.Compose([T.ToTensor(), normalize])
mnist = T.Compose([T.Resize((28, 28)), T.ToTensor(), T.Normalize([0.1307], [0.3081])])
sharp = T.Compose([T.Resize(40), T.CenterCrop(32), T.RandomAdjustSharpness(4, 1.0), T.ToTensor()])
"""


@pytest.mark.parametrize(
    "options, expected",
    [
        ("mine:Net --transform mine:transform", "resize [40], interpolation bilinear"),
        ("mine:Net --transform mine:cifar --frame_size 32", "resize [32, 32]"),
        ("mine:grey --transform mine:mnist", "resize [28, 28]"),
    ],
)
def test_your_transform(run, folder, options, expected):
    """The answer is that of your network to what your transform makes of the picture."""
    (folder / "mine.py").write_text(MINE)
    network, _, name, *size = options.split()
    result = run("py_to_py_cls.py", "--model_name", *options.split(), "--evaluate", "False")
    assert "preprocessing: the same pixels as mine:" in get_output(result)
    assert expected in result.stdout
    scope = {}
    exec(MINE, scope)
    model, transform = scope[network[5:]]().eval(), scope[name[5:]]
    picture = Image.open(KOALA).convert("L" if "grey" in network else "RGB")
    picture = picture.resize((32, 32), 2) if size else picture
    batch = (transform() if name == "mine:transform" else transform)(picture)[None].numpy()
    result = run("classification.py", network.replace(":", "-"), "--input", KOALA)
    assert read_answer(result) == near(
        run_torch(model, batch)[0], abs=0.01 if "grey" in network else 1e-4
    )


LIBRARIES = """
import sys, types
from torchvision import transforms as T

def make(size, resize, mode="bicubic"):
    mode = T.InterpolationMode(mode)
    steps = T.Resize(resize, mode), T.CenterCrop(size), T.ToTensor(), T.Normalize([0.5], [0.5])
    return T.Compose(steps)

def resolve_model_data_config(model):
    return {"input_size": model.pretrained_cfg["input_size"]}

def create_transform(input_size):
    return make(input_size[1:], 2 * input_size[1])

class AutoImageProcessor:
    def from_pretrained(folder):
        assert folder == "checkpoint"
        transform = make(24, (30, 30), "bilinear")
        return lambda picture: {"pixel_values": [transform(picture)]}

def load(**names):
    for name in ("timm", "timm.data", "transformers"):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(globals())
load()
"""


@pytest.mark.parametrize(
    "attributes, expected",
    [
        ("pretrained_cfg = {'input_size': (3, 32, 40)}", (40, 32, (64,), "bicubic")),
        # create_model(img_size=...) changes this, but not pretrained_cfg
        ("pretrained_cfg = {'input_size': (3, 32, 40)}; patch_embed = types.SimpleNamespace("
         "img_size=(16, 16))", (16, 16, (32,), "bicubic")),
        ("config = types.SimpleNamespace(_name_or_path='checkpoint')",
         (24, 24, (30, 30), "bilinear")),
        ("config = types.SimpleNamespace(_name_or_path='other', image_size=48)",
         (48, 48, (54,), "bilinear")),
    ],
)  # fmt: skip
def test_the_transform_of_a_library(folder, monkeypatch, capsys, attributes, expected):
    """timm's create_transform, transformers' image processor; else ImageNet's, and that is said."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("timm", "timm.data", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "carrying", raising=False)
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "preprocessor_config.json").write_text("{}")
    text = f"{MINE}\n{LIBRARIES}\nclass Carrier(Net):\n    {attributes}\n"
    (folder / "carrying.py").write_text(text)
    network = load_network(Request("carrying:Carrier"))
    p = network.preprocessing
    assert (p.width, p.height, p.resize, p.interpolation) == expected
    assert network.declared == ("other" not in attributes) == bool(network.transform)
    assert ("the same pixels as" in capsys.readouterr().out) == network.declared


@pytest.mark.parametrize(
    "options, words",
    [
        ("mine:Net --transform mine:cifar", "mine:cifar: it doesn't resize ... --frame_size"),
        ("mine:Net --transform mine:sharp", "no options do the same ... --resize 40"),
        ("mine:Net --transform mine:nope", "has no nope"),
        ("mine:Net --transform mine:transform --frame_size 64", "32x32 pixels; leave --frame_size"),
    ],
)
def test_transforms_that_are_refused(run, folder, options, words):
    (folder / "mine.py").write_text(MINE)
    result = run("py_to_py_cls.py", "--model_name", *options.split(), "--evaluate", "False")
    check_one_line(result, *words.split(" ... "))
    assert not (folder / "models").exists()


def test_a_file_is_for_the_size_of_your_transform(run, folder):
    """Another transform's size is another file, under the same name."""
    text = MINE.replace("T.Resize(40), T.CenterCrop(32)", "T.Resize(80), T.CenterCrop(64)")
    (folder / "mine.py").write_text(MINE)
    (folder / "larger.py").write_text(text)
    options = ["--model_name", "squeezenet1_1", "--weights", "random", "--evaluate", "False"]
    for module, size, found in (("mine", 32, False), ("larger", 64, False), ("larger", 64, True)):
        result = run("py_to_py_cls.py", *options, "--transform", f"{module}:transform")
        assert ("reused" in get_output(result)) == found
        assert f"width {size}, height {size}" in result.stdout
        get_output(run("classification.py", "squeezenet1_1-random", "--input", KOALA))
