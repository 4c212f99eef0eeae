"""OpenCV 5.0.0: ReduceLogSumExp doesn't take the maximum out, so it is inf above 88."""

import cv2
import numpy as np
import onnx

TEXT = """<ir_version: 9, opset_import: ["": 17]>
g (float[1, 2] x) => (float[1, 1] y) { y = ReduceLogSumExp <axes = [1]> (x) }"""
model = onnx.parser.parse_model(TEXT).SerializeToString()
net = cv2.dnn.readNetFromONNX(np.frombuffer(model, np.uint8))
net.setInput(np.float32([[100, 100]]))
output, expected = net.forward().item(), 100 + np.log(2)
print(f"{output:.4f} should be {expected:.4f}")
assert np.isclose(output, expected)
