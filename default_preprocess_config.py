"""How torchvision's ImageNet networks want their pictures.

The numbers are torchvision's: mean (0.485, 0.456, 0.406), here times 255 for pixels from 0 to 255,
and std (0.229, 0.224, 0.225), https://docs.pytorch.org/vision/stable/models.html
"""

BASE_IMG_SCALE_FACTOR = 1 / 255

PYTORCH_RSZ_HEIGHT = 256
PYTORCH_RSZ_WIDTH = 256

pytorch_resize_input_blob = {
    "mean": [123.675, 116.28, 103.53],
    "scale": BASE_IMG_SCALE_FACTOR,
    "std": [0.229, 0.224, 0.225],
    "crop": True,
    "rgb": True,
    "rsz_height": PYTORCH_RSZ_HEIGHT,
    "rsz_width": PYTORCH_RSZ_WIDTH,
}
