"""OpenCV 5.0.0: LogSoftmax is the logarithm of a softmax that is 0: -inf instead of -200."""

import cv2
import numpy as np
import onnx

TEXT = """<ir_version: 9, opset_import: ["": 17]>
g (float[1, 2] x) => (float[1, 2] y) { y = LogSoftmax <axis = 1> (x) }"""
model = onnx.parser.parse_model(TEXT).SerializeToString()
net = cv2.dnn.readNetFromONNX(np.frombuffer(model, np.uint8))
net.setInput(np.float32([[0, 200]]))
output, expected = net.forward(), [[-200, 0]]
print(f"{output} should be {expected}")
assert np.allclose(output, expected)
