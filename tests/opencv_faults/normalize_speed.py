"""OpenCV 5.0.0: ReduceL2 and Div, fused into Normalize, take several times as long as in steps."""

import time

import cv2
import numpy as np
import onnx

TEXT = """<ir_version: 9, opset_import: ["": 17]> g (float[1, 500, 64, 32] x) =>
(float[1, 500, 64, 32] y) { %s y = Div(x, norm) }"""
FUSED = "norm = ReduceL2 <axes = [-1]> (x)"
STEPS = """axes = Constant <value = int64[1] {-1}> () square = Mul(x, x)
sum = ReduceSum(square, axes) norm = Sqrt(sum)"""
cv2.setNumThreads(1)
times = []
for nodes in (FUSED, STEPS):
    model = onnx.parser.parse_model(TEXT % nodes).SerializeToString()
    net = cv2.dnn.readNetFromONNX(np.frombuffer(model, np.uint8))
    net.setInput(np.ones((1, 500, 64, 32), np.float32))
    net.forward()
    start = time.process_time()
    net.forward()
    times.append(1000 * (time.process_time() - start))
print("fused {:.1f} ms, in steps {:.1f} ms".format(*times))
assert times[0] < 1.2 * times[1]
