"""OpenCV 5.0.0, new engine with AVX2: a grouped 1x1 Conv writes past its memory, or is wrong.

conv32fC8 passes groups whose channels aren't a multiple of 8 to conv32fC8_1x1_kpair, which can't
compute them; conv32fC8_3x3s1_kpair gets no groups.
"""

import cv2
import numpy as np
from onnx import helper, numpy_helper

node = helper.make_node("Conv", ["x", "w"], ["y"], group=4, kernel_shape=[1, 1])
x, y = (helper.make_tensor_value_info(name, 1, [1, 240, 16, 16]) for name in "xy")
weights = np.random.default_rng(0).standard_normal((240, 60, 1, 1), np.float32)
graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weights, "w")])
model = helper.make_model(graph, ir_version=9).SerializeToString()
net = cv2.dnn.readNetFromONNX(np.frombuffer(model, np.uint8))
net.setInput(np.ones((1, 240, 16, 16), np.float32))
output, expected = net.forward()[0, :, 0, 0], weights.sum(axis=(1, 2, 3))
print(f"{np.abs(output - expected).max():.1e} should be 0")
assert np.allclose(output, expected, atol=1e-4)
