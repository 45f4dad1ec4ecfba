import os
import subprocess
import sys

import pytest

from megatron_inherit.base import atomic
from megatron_inherit.base.environment import collect_environment
from megatron_inherit.base.errors import DiskError, MissingExtraError, UsageError
from megatron_inherit.base.optional import require
from megatron_inherit.base.quantities import format_bytes, format_count, parse_bytes, parse_count
from megatron_inherit.base.ranks import adopt_launcher


@pytest.mark.parametrize(
    ("text", "value"), [("1B", 10**9), ("2.5M", 2_500_000), ("50_000", 50_000), ("1e3", 1000), ("8", 8), (7, 7)]
)
def test_counts(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "B", "-1", "1.5", "1X", "nan", "1 2", None, True])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(UsageError):
        parse_count(text)


@pytest.mark.parametrize(("text", "value"), [("2GiB", 2**31), ("5GB", 5 * 10**9), ("512", 512), ("1 KiB", 1024)])
def test_sizes(text, value):
    assert parse_bytes(text) == value


def test_readable_forms():
    assert [format_count(n) for n in (512, 134_515_008, 1.82e9)] == ["512", "135M", "1.82B"]
    assert format_bytes(3 * 2**29) == "1.50 GiB"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic.new_folder(target) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic.new_folder(target) as folder:
        (folder / "a").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_kept_unless_told(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="--overwrite"), atomic.new_folder(target):
        pass
    with atomic.new_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("y")
    assert [p.name for p in target.iterdir()] == ["new"]


@pytest.mark.parametrize("content", ["file", "holiday.jpg", "run.yaml"])
def test_overwrite_replaces_only_whole_outputs_of_this_program(tmp_path, content):
    target = tmp_path / "out"
    if content == "file":
        target.write_text("x")
    else:
        target.mkdir()
        (target / content).write_text("x")
    if content == "run.yaml":
        (target / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="remove it yourself"), atomic.new_folder(target, overwrite=True):
        pass
    assert (target if content == "file" else target / content).read_text() == "x"
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_read_is_never_replaced(tmp_path):
    teacher = tmp_path / "models" / "teacher"
    teacher.mkdir(parents=True)
    for folder in (teacher, teacher.parent):
        (folder / "manifest.json").write_text("{}")
    (tmp_path / "link").symlink_to(teacher)
    for output in (teacher, teacher.parent, tmp_path / "link"):
        with pytest.raises(UsageError, match="holds what is read"):
            atomic.refuse_existing(output, overwrite=True, source=teacher)
    atomic.refuse_existing(teacher, overwrite=True, source=tmp_path / "another")
    atomic.refuse_existing(teacher, overwrite=True, source="https://models.example/teacher")
    atomic.refuse_existing(teacher / "student", source=teacher)


def test_a_linked_output_is_written_where_the_link_points(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "manifest.json").write_text("{}")
    (tmp_path / "out").symlink_to("big")
    (tmp_path / "dangling").symlink_to("new")
    for link in ("out", "dangling"):
        with atomic.new_folder(tmp_path / link, overwrite=True) as folder:
            (folder / "a").write_text("x")
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / link / "a").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "dangling", "new", "out"]


def test_sigterm_leaves_nothing_unfinished(tmp_path):
    code = """
import sys, time
from pathlib import Path
from megatron_inherit.base.atomic import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.terminate()
        assert process.wait() == 143
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_output_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(DiskError, match=r"file/out cannot be made: Not a directory"),
        atomic.new_folder(tmp_path / "file" / "out"),
    ):
        pass
    with pytest.raises(FileNotFoundError), atomic.new_folder(tmp_path / "out"):
        (tmp_path / "what was read").read_text()


def test_a_folder_where_a_file_is_to_be_stays_and_is_a_slip(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"folder is in the way: Is a directory"):
        atomic.write_text(tmp_path / "folder", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_no_space_is_said_before_writing(tmp_path):
    with pytest.raises(DiskError, match="at least"):
        atomic.require_space(tmp_path / "not" / "there", 2**62)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_a_disk_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DiskError), atomic.new_folder(tmp_path / "out"):
        pass


def test_a_missing_extra_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'megatron-inherit\[deepspeed\]'"):
        require("deepspeed")


def test_srun_tasks_get_their_ranks():
    env = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "MASTER_ADDR": "a"}
    adopt_launcher(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("3", "8", "1")
    del env["MASTER_ADDR"], env["RANK"]
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        adopt_launcher(env)


def test_other_launchers_are_left_alone():
    env = {"RANK": "5", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}
    adopt_launcher(env)
    assert env["RANK"] == "5"


def test_an_environment_tells_versions_and_the_command_without_its_folder(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/somebody/bin/minherit", "train", "a b"])
    found = collect_environment(device="cpu", parameters=3)
    assert next(iter(found)) == "device"
    assert (found["parameters"], found["command"]) == (3, "minherit train 'a b'")
    assert {"python", "megatron-inherit", "torch", "numpy"} <= found["versions"].keys()
    assert "somebody" not in str(found)


def test_what_a_dead_process_left_is_removed_before_anyone_waited_for_it(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from megatron_inherit.base.atomic import new_folder\n"
        "with new_folder(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    dead = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "out")])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    assert [path.name.partition(".")[0] for path in tmp_path.iterdir()] == ["out"]
    with atomic.new_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    dead.wait()
