"""A real full file system: refused before writing where that can be known, else exit code 7 and nothing left."""

import os
import subprocess
import sys

import pytest

from megatron_inherit.cli.main import main
from tests.support.checkpoints import llama, random_arrays, write_checkpoint

CONFIG = llama(hidden_size=128, num_heads=8, head_dim=16, ffn_size=512)  # 4 MB
FILL = """
set -e
mount -t tmpfs -o size={size}k none {disk}
if [ -n "{greedy}" ]; then
  (while ! ls {disk}/student.tmp-*/model.safetensors; do sleep 0.02; done; cat /dev/zero > {disk}/greedy) 2>/dev/null &
fi
set +e
{command}
code=$?
ls {disk}
exit $code
"""


def on_a_small_disk(folder, size, *, greedy=False, **variables):
    """Slices in a mount namespace of its own; a greedy neighbour takes what is left once the output was begun."""
    disk = folder / "disk"
    disk.mkdir()
    words = ["inherit", str(folder / "teacher"), str(disk / "student"), "--layers", "all", "--threads", "1"]
    command = " ".join([sys.executable, "-m", "megatron_inherit", *words])
    script = FILL.format(size=size, disk=disk, greedy="yes" if greedy else "", command=command)
    shell = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", script]
    if subprocess.run([*shell[:-1], f"mount -t tmpfs none {disk}"], capture_output=True).returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("this system gives no mount namespace")
    return subprocess.run(shell, capture_output=True, text=True, timeout=120, env=os.environ | variables)


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "teacher", CONFIG, random_arrays(CONFIG), "hf")
    return tmp_path


@pytest.mark.slow
def test_too_small_a_disk_is_refused_before_writing(folder):
    done = on_a_small_disk(folder, 2000)
    assert done.returncode == 7, done.stderr
    assert "Not enough space" in done.stderr
    assert "student" not in done.stdout.splitlines()[-1:]


@pytest.mark.slow
def test_a_disk_that_fills_up_on_the_way(folder):
    before = (folder / "teacher" / "model.safetensors").read_bytes()
    done = on_a_small_disk(folder, 8000, greedy=True, MI_FAULT="transfer:*:4:sleep=2")
    assert done.returncode == 7, done.stderr
    assert "The disk is full while writing" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "greedy"
    assert (folder / "teacher" / "model.safetensors").read_bytes() == before
    assert main(["inherit", str(folder / "teacher"), str(folder / "student"), "--layers", "all"]) == 0
