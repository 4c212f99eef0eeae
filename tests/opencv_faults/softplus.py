"""OpenCV 5.0.0: Softplus is inf above 88, where it is x."""

import cv2
import numpy as np
import onnx

TEXT = """<ir_version: 9, opset_import: ["": 17]>
g (float[1, 2] x) => (float[1, 2] y) { y = Softplus(x) }"""
model = onnx.parser.parse_model(TEXT).SerializeToString()
net = cv2.dnn.readNetFromONNX(np.frombuffer(model, np.uint8))
net.setInput(np.float32([[1, 100]]))
output, expected = net.forward(), np.log1p(np.exp([[1, 100]]))
print(f"{output} should be {expected}")
assert np.allclose(output, expected)
