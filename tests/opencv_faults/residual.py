"""OpenCV 5.0.0, new engine: a convolution whose output is added to another tensor repeats neither.

"residual added after convolution must have the same shape and the same type as the convolution".
"""

import cv2
import numpy as np
import onnx

TEXT = """<ir_version: 9, opset_import: ["": 17]>
g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) <float[1, 1, 1, 1] two = {2}>
{ b = Relu(x) mean = GlobalAveragePool(b) a = Conv(mean, two) y = Add(b, a) }"""
model = onnx.parser.parse_model(TEXT).SerializeToString()
net = cv2.dnn.readNetFromONNX(np.frombuffer(model, np.uint8))
net.setInput(np.full((1, 1, 4, 4), 3, np.float32))
output, expected = net.forward(), np.full((1, 1, 4, 4), 9)
print(f"{output[0, 0, 0]} should be {expected[0, 0, 0]}")
assert np.array_equal(output, expected)
