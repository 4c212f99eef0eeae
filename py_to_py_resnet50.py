"""ResNet-50 from PyTorch to OpenCV, step by step: convert it, read it, see the same answer.

python py_to_py_resnet50.py
python py_to_py_resnet50.py --input_img cat.jpg
"""

import cv2
import numpy as np
import torch

from classification import RANDOM_WARNING, OneLineParser, read_labels, read_picture, run
from common import (
    DEFAULT_WEIGHTS,
    RANDOM,
    NetworksDisagree,
    compare,
    convert,
    find_bundled,
    get_onnx_path,
    load_network,
)
from test_config import MODELS_DIR, TestClsModuleConfig


def get_pytorch_onnx_model(original_model, origin, preproc_img):
    """Convert the network, with OpenCV's answer checked on the picture; return the file's path."""
    full_model_path = get_onnx_path("resnet50", origin, MODELS_DIR)
    convert(original_model, full_model_path, preproc_img)
    return str(full_model_path)


def get_preprocessed_img(img_path):
    """Blob of the picture: float32, (1, 3, 224, 224), as torchvision normalises it."""
    # read the image
    input_img = read_picture(img_path)
    input_img = input_img.astype(np.float32)

    input_img = cv2.resize(input_img, (256, 256))

    # define preprocess parameters
    mean = np.array([0.485, 0.456, 0.406]) * 255.0
    scale = 1 / 255.0
    std = [0.229, 0.224, 0.225]

    # prepare input blob to fit the model input:
    # 1. subtract mean
    # 2. scale to set pixel values from 0 to 1
    input_blob = cv2.dnn.blobFromImage(
        image=input_img,
        scalefactor=scale,
        size=(224, 224),  # img target size
        mean=mean,
        swapRB=True,  # BGR -> RGB
        crop=True,  # center crop: of a square picture nothing is cut, it is resized to 224x224
    )
    # 3. divide by std
    input_blob[0] /= np.asarray(std, dtype=np.float32).reshape(3, 1, 1)
    return input_blob


def get_imagenet_labels(labels_path):
    """The 1000 class names."""
    return read_labels(labels_path)


def print_prediction(framework, out, imagenet_labels, origin):
    class_id = int(np.argmax(out))
    print(f"\n{framework} prediction:")
    print(f"* shape:  {tuple(out.shape)}")
    print(f"* class ID: {class_id}, label: {imagenet_labels[class_id]}")
    print(f"* confidence: {out[0][class_id]:.4f}")
    if origin == RANDOM:
        print(f"* {RANDOM_WARNING}")


def get_opencv_dnn_prediction(opencv_net, preproc_img, imagenet_labels, origin):
    """Run the converted network, print its answer, return its logits (1, 1000)."""
    opencv_net.setInput(preproc_img)
    out = opencv_net.forward()
    print_prediction("OpenCV DNN", out, imagenet_labels, origin)
    return out


def get_pytorch_dnn_prediction(original_net, preproc_img, imagenet_labels, origin):
    """Run the original network, print its answer, return its logits (1, 1000)."""
    original_net.eval()
    with torch.no_grad():
        out = original_net(torch.from_numpy(preproc_img)).numpy()
    print_prediction("PyTorch", out, imagenet_labels, origin)
    return out


def get_args():
    config = TestClsModuleConfig()
    parser = OneLineParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--input_img", default=find_bundled(config.input_img), help="the picture")
    parser.add_argument(
        "--weights",
        default=DEFAULT_WEIGHTS,
        help="torchvision's name of them, a state-dict file, or 'random' (default: %(default)s)",
    )
    return parser.parse_args()


def main():
    args = get_args()

    # get preprocessed image
    input_img = get_preprocessed_img(args.input_img)

    # get ImageNet labels
    imagenet_labels = get_imagenet_labels(find_bundled(TestClsModuleConfig().classes))

    # initialize PyTorch ResNet-50 model
    original_model, origin = load_network("resnet50", args.weights)

    # get the path to the converted into ONNX PyTorch model
    full_model_path = get_pytorch_onnx_model(original_model, origin, input_img)

    # read converted .onnx model with OpenCV API
    opencv_net = cv2.dnn.readNetFromONNX(full_model_path)
    print("OpenCV model was successfully read. Layer IDs: \n", opencv_net.getLayerNames())

    # obtain OpenCV DNN predictions
    opencv_out = get_opencv_dnn_prediction(opencv_net, input_img, imagenet_labels, origin)

    # obtain original PyTorch ResNet50 predictions
    pytorch_out = get_pytorch_dnn_prediction(original_model, input_img, imagenet_labels, origin)

    # compare
    difference = compare(pytorch_out, opencv_out)
    if not difference.agree:
        raise NetworksDisagree(f"PyTorch and OpenCV disagree: {difference}")
    print(f"\nPyTorch and OpenCV agree: {difference}")


if __name__ == "__main__":
    run(main)
