"""OpenCV 5.0.0: Gelu's attribute approximate="tanh" is ignored; the exact GELU is computed."""

import cv2
import numpy as np
import onnx

TEXT = """<ir_version: 9, opset_import: ["": 20]>
g (float[1, 1, 1, 1] x) => (float[1, 1, 1, 1] y) { y = Gelu <approximate = "tanh"> (x) }"""
model = onnx.parser.parse_model(TEXT).SerializeToString()
net = cv2.dnn.readNetFromONNX(np.frombuffer(model, np.uint8))
net.setInput(np.full((1, 1, 1, 1), 2, np.float32))
output, expected = net.forward().item(), 1 + np.tanh(np.sqrt(2 / np.pi) * (2 + 0.044715 * 8))
print(f"{output:.6f} should be {expected:.6f}")
assert abs(output - expected) < 1e-6
