"""What is beside an output: whose it is, when it goes, and that no two processes write one output."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import time

import pytest

from megatron_inherit.base import atomic, temporary
from megatron_inherit.base.errors import UsageError
from megatron_inherit.base.processes import machine_mark, process_start
from megatron_inherit.base.temporary import lock, locked, sweep, temporary_beside
from megatron_inherit.plan.journal import resumable_folder

SILENT = """
import sys, time
from pathlib import Path
from megatron_inherit.base.temporary import temporary_beside
folder = temporary_beside(Path(sys.argv[1]))
folder.mkdir()
print(folder, flush=True)
time.sleep(60)
"""


def left(path, old="", new=""):
    """Makes a temporary folder with a file; its name is changed."""
    made = temporary_beside(path)
    made = made.with_name(made.name.replace(old, new))
    made.mkdir()
    (made / "part").write_text("x")
    return made


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_writer_whose_file_system_has_no_locks_is_known_by_its_process(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", SILENT, str(out)], stdout=subprocess.PIPE, text=True) as writer:
        made = tmp_path / os.path.basename(writer.stdout.readline().strip())
        with pytest.raises(UsageError, match=f"Another job is writing to {out}"):
            sweep(out)
        another = made.with_name(made.name.replace(f"-{process_start(writer.pid)}-", "-1-"))
        made.rename(another)
        sweep(out)
        assert names(tmp_path) == [], "an earlier process of the same number"
        another.mkdir()
        another = another.rename(made)
        writer.kill()
    sweep(out)
    assert names(tmp_path) == []


def test_a_locked_folder_is_anothers_on_every_machine(tmp_path):
    out = tmp_path / "out"
    made = left(out, machine_mark(), "0123ab")
    with locked(made) as free, pytest.raises(UsageError, match="Another job is writing"):
        assert free
        sweep(out)
    assert names(made) == ["part"]


@pytest.mark.parametrize("what", ["folder", "its file"])
def test_another_machines_folder_goes_after_a_day_without_a_change(tmp_path, what):
    made = left(tmp_path / "out", machine_mark(), "0123ab")
    long_ago = time.time() - 2 * temporary.FOREIGN_SECONDS
    paths = {"folder": made, "its file": made / "part"}
    os.utime(paths.pop(what), (long_ago, long_ago))
    sweep(tmp_path / "out")
    assert names(tmp_path) == [made.name]
    for path in paths.values():
        os.utime(path, (long_ago, long_ago))
    sweep(tmp_path / "out")
    assert names(tmp_path) == []


def test_what_a_replacement_set_aside_comes_back_if_it_was_killed_between_its_renames(tmp_path):
    out, aside = tmp_path / "out", temporary_beside(tmp_path / "out", aside=True)
    aside.mkdir()
    (aside / "manifest.json").write_text("{}")
    left(out)
    with pytest.raises(UsageError, match="exists already"), atomic.new_folder(out):
        pass
    assert (names(tmp_path), names(out)) == (["out"], ["manifest.json"])
    temporary_beside(out, aside=True).mkdir()
    sweep(out)
    assert (names(tmp_path), names(out)) == (["out"], ["manifest.json"])


@pytest.mark.parametrize("fails", [False, True])
def test_without_an_exchange_of_names_the_old_content_goes_last(tmp_path, monkeypatch, fails):
    out, rename = tmp_path / "out", os.rename
    out.mkdir()
    (out / "manifest.json").write_text("old")

    def move(old, new):
        if fails and new == out and not str(old).endswith("-old"):
            raise OSError(errno.EIO, "no disk", str(new))
        rename(old, new)

    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", move)
    with (
        pytest.raises(OSError, match="no disk") if fails else contextlib.nullcontext(),
        atomic.new_folder(out, overwrite=True) as new,
    ):
        (new / "manifest.json").write_text("new")
    assert (names(tmp_path), (out / "manifest.json").read_text()) == (["out"], "old" if fails else "new")


def test_names_that_are_not_of_a_writer_are_left_alone(tmp_path):
    for name in ("out.tmp-resume", "out.tmp-4711-abcd", "out.tmp-0123abcd", "out2"):
        (tmp_path / name).mkdir()
    of_another = left(tmp_path / "out2")
    sweep(tmp_path / "out")
    assert len(names(tmp_path)) == 5
    assert of_another.is_dir()


def test_a_lock_is_free_where_there_are_none_and_taken_only_by_another(tmp_path, monkeypatch):
    def answer(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    with (tmp_path / "file").open("w") as file:
        assert lock(file)
        with locked(tmp_path / "file") as free:
            assert not free
        for number in (errno.ENOSYS, errno.EBADF, errno.ENOLCK):
            answer(number)
            assert lock(file)
        answer(errno.EWOULDBLOCK)
        assert not lock(file)


def test_two_processes_do_not_write_one_output(tmp_path):
    out = tmp_path / "out"
    for folder in (atomic.new_folder, resumable_folder):
        with pytest.raises(UsageError, match="Another job is writing"), folder(out), folder(out):
            pass
    assert names(tmp_path) == []


def test_an_output_that_came_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="exists already"), atomic.new_folder(out):
        out.mkdir()
        (out / "manifest.json").write_text("another's")
    assert (names(tmp_path), (out / "manifest.json").read_text()) == (["out"], "another's")
