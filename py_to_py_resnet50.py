"""ResNet-50 from PyTorch to OpenCV, step by step: convert it, read it, see the same answer.

    python py_to_py_resnet50.py
    python py_to_py_resnet50.py --input_img cat.jpg

The converted network is kept in models/ in the current folder.
"""

import cv2
import numpy as np

import classification
from classification import RANDOM_WARNING, OneLineParser, read_labels, read_picture, run
from common import RANDOM, add_to_zoo, convert, find_bundled, get_onnx_path, load_network
from test_config import MODELS_DIR, TestClsModuleConfig
from verify import NetworksDisagree, compare


def get_pytorch_onnx_model(original_model, origin, img_path):
    """Convert the network, OpenCV's answer on the picture verified; return the file's path."""
    full_model_path = get_onnx_path("resnet50", origin, MODELS_DIR)
    convert(original_model, origin, full_model_path, get_preprocessed_img(img_path))
    # so that "python classification.py resnet50" knows the file and its preprocessing
    labels = find_bundled(TestClsModuleConfig().classes)
    add_to_zoo("resnet50", full_model_path, classification.parse_args([]), labels)
    return str(full_model_path)


def get_preprocessed_img(img_path):
    """Blob of the picture: float32, (1, 3, 224, 224), as torchvision normalises it."""
    input_img = read_picture(img_path).astype(np.float32)
    input_img = cv2.resize(input_img, (256, 256))

    # of pixels from 0 to 1; blobFromImage subtracts before it scales, so its mean is times 255
    mean = np.array([0.485, 0.456, 0.406]) * 255.0
    std = [0.229, 0.224, 0.225]

    input_blob = cv2.dnn.blobFromImage(
        image=input_img,
        scalefactor=1 / 255.0,
        size=(224, 224),
        mean=mean,
        swapRB=True,  # BGR -> RGB
        crop=True,  # the centre; but a square picture is resized to 224x224, and nothing is cut
    )
    # blobFromImage knows no standard deviation
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
    import torch  # which takes seconds: only after the command line is read

    with torch.no_grad():
        out = original_net(torch.from_numpy(preproc_img)).numpy()
    print_prediction("PyTorch", out, imagenet_labels, origin)
    return out


def get_args():
    parser = OneLineParser(__doc__)
    parser.add_argument(
        "--input_img",
        default=find_bundled(TestClsModuleConfig.input_img),
        help="the picture that both networks classify (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        default="IMAGENET1K_V1",
        help="torchvision's name of the weights (IMAGENET1K_V1, IMAGENET1K_V2), a state-dict file, "
        "or 'random' (default: %(default)s)",
    )
    return parser.parse_args()


def main():
    args = get_args()
    read_picture(args.input_img)  # one that can't be read is told before the network is loaded
    original_model, origin = load_network("resnet50", args.weights)
    full_model_path = get_pytorch_onnx_model(original_model, origin, args.input_img)

    opencv_net = cv2.dnn.readNetFromONNX(full_model_path)
    print("OpenCV model was successfully read. Layer IDs: \n", opencv_net.getLayerNames())

    input_img = get_preprocessed_img(args.input_img)
    imagenet_labels = get_imagenet_labels(find_bundled(TestClsModuleConfig.classes))

    opencv_out = get_opencv_dnn_prediction(opencv_net, input_img, imagenet_labels, origin)
    pytorch_out = get_pytorch_dnn_prediction(original_model, input_img, imagenet_labels, origin)

    difference = compare(pytorch_out, opencv_out)
    if not difference.agree:
        raise NetworksDisagree(f"PyTorch and OpenCV disagree: {difference}")
    print(f"\nPyTorch and OpenCV agree: {difference}")


if __name__ == "__main__":
    run(main)
