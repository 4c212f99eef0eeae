"""OpenCV 5.0.0: reductions over three axes lose count from the third step along the first on.

ReduceInvoker in reduce2_layer.cpp sets current_step to a step of the outer axis, and should add it.
"""

import cv2
import numpy as np
import onnx

TEXT = """<ir_version: 9, opset_import: ["": 17]>
g (float[b, 2, 2, 2] x) => (float[1, 2, 1, 1] y) { y = ReduceMean <axes = [0, 2, 3]> (x) }"""
model = onnx.parser.parse_model(TEXT).SerializeToString()
net = cv2.dnn.readNetFromONNX(np.frombuffer(model, np.uint8))
x = np.arange(24, dtype=np.float32).reshape(3, 2, 2, 2)
net.setInput(x)
output, expected = net.forward().ravel(), x.mean(axis=(0, 2, 3))
print(f"{output} should be {expected}")
assert np.allclose(output, expected)
