"""ResNet-50 from PyTorch to OpenCV: convert it, read it, compare the answers.

    python py_to_py_resnet50.py
    python py_to_py_resnet50.py --input_img cat.jpg

If both answers are the same, the converted network is kept in models/.
"""

import warnings
from pathlib import Path

import cv2
import numpy as np
import torch

from classification import RANDOM_SUFFIX, RANDOM_WARNING, make_parser, read_lines, read_picture, run
from common import NetworksDisagree, find_bundled, whole_file
from networks import Request, load_network
from test_config import MODELS_DIR, TestClsModuleConfig
from verify import compare


def get_pytorch_onnx_model(original_model, full_model_path):
    """Export the network to ONNX: PyTorch runs it once on zeros and records the operations."""
    warnings.simplefilter("ignore", DeprecationWarning)  # dynamo=False, in PyTorch 2.9+
    torch.onnx.export(
        original_model,
        torch.zeros(1, 3, 224, 224),
        full_model_path,
        input_names=["input"],
        output_names=["output"],
        dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},  # any number of pictures
        opset_version=17,
        dynamo=False,  # the exporter whose graphs OpenCV 5.0.0 reads best
    )


def get_preprocessed_img(img_path):
    """Blob of the picture: float32, (1, 3, 224, 224), normalized as torchvision does it."""
    input_img = cv2.resize(read_picture(img_path).astype(np.float32), (256, 256))

    # for pixels from 0 to 1; blobFromImage subtracts the mean before it scales, hence * 255
    mean = np.array([0.485, 0.456, 0.406]) * 255.0
    std = [0.229, 0.224, 0.225]

    input_blob = cv2.dnn.blobFromImage(
        image=input_img,
        scalefactor=1 / 255.0,
        size=(224, 224),
        mean=mean,
        swapRB=True,  # BGR -> RGB
        crop=True,  # scales to 224x224 first, so nothing is cut off a square picture
    )
    # blobFromImage has no parameter for the standard deviation
    input_blob[0] /= np.asarray(std, dtype=np.float32).reshape(3, 1, 1)
    return input_blob


def get_imagenet_labels():
    """The 1000 class names."""
    return read_lines(find_bundled(TestClsModuleConfig.classes))


def get_opencv_dnn_prediction(opencv_net, preproc_img):
    """Run the converted network on the blob; return its logits (1, 1000)."""
    opencv_net.setInput(preproc_img)
    return opencv_net.forward()


def get_pytorch_dnn_prediction(original_net, preproc_img):
    """Run the original network on the blob; return its logits (1, 1000)."""
    with torch.no_grad():
        return original_net(torch.from_numpy(preproc_img)).numpy()


def print_prediction(framework, out, imagenet_labels):
    class_id = int(np.argmax(out))
    print(f"\n{framework} prediction:")
    print(f"* shape:  {tuple(out.shape)}")
    print(f"* class ID: {class_id}, label: {imagenet_labels[class_id]}")
    print(f"* confidence: {out[0][class_id]:.4f}")  # the logit, not a probability


def main():
    parser = make_parser(__doc__)
    picture = find_bundled(TestClsModuleConfig.input_img)
    text = "the picture that both networks classify (default: a bundled one)"
    parser.add_argument("--input_img", default=picture, metavar="FILE", help=text)
    input_img = get_preprocessed_img(parser.parse_args().input_img)
    imagenet_labels = get_imagenet_labels()

    # models.resnet50(weights="IMAGENET1K_V1").eval(), or with random weights if you are offline
    network = load_network(Request("resnet50"))
    random = network.request.is_random

    name = "py_to_py_resnet50" + (RANDOM_SUFFIX if random else "")
    with whole_file(Path(MODELS_DIR) / f"{name}.onnx") as part:  # renamed only if they agree
        get_pytorch_onnx_model(network.model, str(part))
        opencv_net = cv2.dnn.readNetFromONNX(str(part))
        print("OpenCV model was successfully read. Layer IDs: \n", opencv_net.getLayerNames())

        opencv_out = get_opencv_dnn_prediction(opencv_net, input_img)
        print_prediction("OpenCV DNN", opencv_out, imagenet_labels)
        pytorch_out = get_pytorch_dnn_prediction(network.model, input_img)
        print_prediction("PyTorch", pytorch_out, imagenet_labels)

        difference = compare(pytorch_out, opencv_out)
        if not difference.agree:
            raise NetworksDisagree(f"PyTorch and OpenCV disagree: {difference}")
    print(f"\nPyTorch and OpenCV agree: {difference}")
    if random:
        print(RANDOM_WARNING)


if __name__ == "__main__":
    run(main)
