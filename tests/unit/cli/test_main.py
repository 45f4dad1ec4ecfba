"""How the command line ends: codes and messages for pipes, signals, full disks, slips of the hand."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_inherit.cli import inherit
from megatron_inherit.cli.main import main
from tests.support.checkpoints import llama, random_arrays, write_checkpoint


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("t") / "teacher", llama(), random_arrays(llama()), "hf")


def _failing_with(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(inherit, "_plan", fail)


def test_a_misspelt_command_is_guessed(capsys):
    assert main(["inhert"]) == 2
    assert "Did you mean 'inherit'?" in capsys.readouterr().err
    assert main(["xyzzy"]) == 2
    assert "--help" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_failure(teacher):
    words = [sys.executable, "-m", "megatron_inherit", "inspect", str(teacher), "--tensors"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait() == 0
    assert process.stderr.read() == b""


def test_an_interrupt_is_said(tmp_path):
    code = """
import sys, time
from megatron_inherit.cli import inherit, main
inherit._plan = lambda *_: (print("planning", flush=True), time.sleep(60))
sys.exit(main.main(sys.argv[1:]))
"""
    words = ["inherit", "llama-tiny", str(tmp_path / "s"), "--layers", "all", "--reset", "all"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "planning\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "Interrupted.\n"
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "The disk is full"), (errno.EROFS, "Read-only"), (errno.EACCES, "denied")]
)
def test_a_full_or_closed_disk_is_never_a_bug(monkeypatch, teacher, tmp_path, capsys, number, said):
    _failing_with(monkeypatch, OSError(number, os.strerror(number), "/data/x"))
    assert main(["inherit", str(teacher), str(tmp_path / "s"), "--layers", "0"]) == 7
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EISDIR])
def test_what_is_in_the_way_is_never_a_bug(monkeypatch, teacher, tmp_path, capsys, number):
    _failing_with(monkeypatch, OSError(number, os.strerror(number), "notes"))
    assert main(["inherit", str(teacher), str(tmp_path / "s"), "--layers", "0"]) == 2
    assert "minherit: notes is in the way" in capsys.readouterr().err


def test_a_missing_file_that_nobody_foresaw_stays_a_bug(monkeypatch, teacher, tmp_path, capsys):
    _failing_with(monkeypatch, FileNotFoundError(errno.ENOENT, "No such file", "/data/x"))
    assert main(["inherit", str(teacher), str(tmp_path / "s"), "--layers", "0"]) == 1
    assert "bug" in capsys.readouterr().err


def test_a_task_of_srun_shows_debug_messages_when_asked_to(monkeypatch):
    for name, value in {"PROCID": "0", "NTASKS": "1", "LOCALID": "0", "STEP_ID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")  # put back at the end, whatever the command sets
        monkeypatch.delenv(name)
    assert main(["train", "no-such-recipe", "--debug"]) == 3
    assert logging.getLogger("megatron_inherit").level == logging.DEBUG
