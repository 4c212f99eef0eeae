"""OpenCV's next release, which has the new engine alone; put this folder first in PYTHONPATH:

PYTHONPATH=$PWD/tests/without_classic python -m pytest
"""

import sys
from pathlib import Path

here = str(Path(__file__).parent)
sys.path[:] = [path for path in sys.path if path != here]
del sys.modules["cv2"]
import cv2  # noqa: E402

sys.path.insert(1, here)  # for xdist's workers
del cv2.dnn.ENGINE_CLASSIC, cv2.dnn.ENGINE_AUTO
