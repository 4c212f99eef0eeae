"""OpenCV 5.0.0: Log(Exp(x) + b) is fused to Softplus(x), which it is for b = 1 only."""

import cv2
import numpy as np
import onnx

TEXT = """<ir_version: 9, opset_import: ["": 17]>
g (float[1, 2] x) => (float[1, 2] y) <float b = {9}> { e = Exp(x) a = Add(e, b) y = Log(a) }"""
model = onnx.parser.parse_model(TEXT).SerializeToString()
net = cv2.dnn.readNetFromONNX(np.frombuffer(model, np.uint8))
net.setInput(np.float32([[0, 1]]))
output, expected = net.forward(), np.log(np.exp([[0, 1]]) + 9)
print(f"{output} should be {expected}")
assert np.allclose(output, expected)
