"""The kernels need torch and triton and nothing else, not even the rest of the package."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[3] / "megatron_inherit"
CODE = """
import importlib, pkgutil, sys
import torch, torch.distributed, triton, triton.language
known = {name.partition(".")[0] for name in sys.modules} | sys.stdlib_module_names
from megatron_inherit import kernels
for module in pkgutil.walk_packages(kernels.__path__, "megatron_inherit.kernels."):
    importlib.import_module(module.name)
from megatron_inherit.kernels.dispatch import linear_cross_entropy, rms_norm
hidden = torch.randn(8, 16, requires_grad=True)
head = torch.randn(32, 16, requires_grad=True)
linear_cross_entropy(rms_norm(hidden, torch.ones(16), 1e-5), head, torch.arange(8)).mean().backward()
assert hidden.grad.abs().sum() > 0
print(sorted({name.partition(".")[0] for name in sys.modules} - known))
"""


@pytest.mark.slow
def test_torch_and_triton_are_all_they_need(tmp_path):
    pytest.importorskip("triton")
    shutil.copytree(PACKAGE / "kernels", tmp_path / "megatron_inherit" / "kernels")
    (tmp_path / "megatron_inherit" / "__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{CODE}"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['megatron_inherit']"
