"""Runs interpreted*.py where the kernels are interpreted: Triton reads TRITON_INTERPRET when a kernel is defined."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = ("interpreted.py", "interpreted_edges.py", "interpreted_training.py")


@pytest.mark.slow
def test_kernels_under_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    run = subprocess.run([*command, *files], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
