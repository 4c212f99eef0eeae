"""OpenCV 5.0.0, new engine: AveragePool with ceil_mode is wrong for windows past the edge."""

import cv2
import numpy as np
import onnx

TEXT = """<ir_version: 9, opset_import: ["": 17]> g (float[1, 1, 3, 3] x) => (float[1, 1, 2, 2] y)
{ y = AveragePool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1,
                   count_include_pad = 1> (x) }"""
model = onnx.parser.parse_model(TEXT).SerializeToString()
net = cv2.dnn.readNetFromONNX(np.frombuffer(model, np.uint8))
net.setInput(np.ones((1, 1, 3, 3), np.float32))
output, expected = net.forward(), np.ones((1, 1, 2, 2))  # PyTorch's and onnxruntime's
print(f"{output} should be {expected}")
assert np.allclose(output, expected)
