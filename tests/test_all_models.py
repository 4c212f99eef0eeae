"""Every network of the list, converted and compared:

python -m pytest --all-models -n 0 -s tests/test_all_models.py
"""

import re

import pytest

from py_to_py_cls import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_network(request, run, folder, name):
    if not request.config.getoption("--all-models"):
        pytest.skip("needs --all-models")
    options = ["--model_name", name, "--weights", "random", "--evaluate", "False"]
    result = run("py_to_py_cls.py", *options)
    assert result.returncode == 0, result.stderr
    errors = [float(e) for e in re.findall(r"relative error (\S+),", result.stdout)]
    assert len(errors) == 2
    assert 0 < max(errors) < 1e-4
    assert (folder / "models" / f"{name}-random.onnx").is_file()
    print(f"{name}: relative error {max(errors):.1e}")
