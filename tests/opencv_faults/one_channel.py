"""OpenCV 5.0.0, new engine: a factor of one channel isn't repeated for the others.

Both operands are in blocks of 8 channels, and those of the one channel hold 7 zeros.
"""

import cv2
import numpy as np
import onnx

TEXT = """<ir_version: 9, opset_import: ["": 17]>
g (float[1, 1, 4, 4] x) => (float[1, 4, 4, 4] y) <float[4, 1, 1, 1] four = {1, 1, 1, 1},
float[1, 1, 1, 1] one = {1}> { a = Conv(x, four) b = Conv(x, one) y = Mul(a, b) }"""
model = onnx.parser.parse_model(TEXT).SerializeToString()
net = cv2.dnn.readNetFromONNX(np.frombuffer(model, np.uint8))
net.setInput(np.full((1, 1, 4, 4), 3, np.float32))
output, expected = net.forward(), np.full((1, 4, 4, 4), 9)
print(f"{output[0, :, 0, 0]} should be {expected[0, :, 0, 0]}")
assert np.array_equal(output, expected)
