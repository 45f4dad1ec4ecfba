"""Every kernel compiles for A100 and H100/H200 on a machine without a GPU, and none spills a register."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_all.py")
KERNELS = {
    "norm_forward", "norm_backward", "long_norm_forward", "long_norm_backward", "long_norm_sums", "swiglu_forward",
    "swiglu_backward", "gelu_forward", "gelu_backward", "rotate", "cross_entropy", "divergence", "topk_gradient",
    "row_logsumexp",
}  # fmt: skip


def compile_all(cache: Path, *arguments: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[3])}
    run = subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(rows: list[dict], capabilities: set[int]) -> None:
    for row in rows:
        print(row)
    assert {(row["capability"], row["kernel"]) for row in rows} == {(c, k) for c in capabilities for k in KERNELS}
    assert [row for row in rows if row["spills"]] == []
    assert [row for row in rows if row["shared"] > 48 * 1024] == []
    crowded = [row for row in rows if row["kernel"] == "norm_backward" and row["registers"] > 64]
    assert [row for row in crowded if "fp32" not in row["case"]] == [], "launch.resident_programs counts on 64"
    narrow = [row for row in rows if row["widest_access"] < 128 and "padded" not in row["case"]]
    assert narrow == [], "rows that are aligned are read in whole vectors"
    raced = [row for row in rows if row["kernel"] in ("cross_entropy", "divergence") and row["reads_what_is_written"]]
    assert raced == [], "the label's logit is read before the barrier that the gradients wait for"


@pytest.mark.slow
def test_kernels_compile_for_hopper_without_spills(tmp_path):
    check(compile_all(tmp_path, "90"), {90})


@pytest.mark.nightly
def test_kernels_compile_for_ampere_and_hopper_in_every_variant(tmp_path):
    check(compile_all(tmp_path, "80", "90", "--all"), {80, 90})
