import os
import time

import pytest

from megatron_inherit.base.errors import UsageError
from megatron_inherit.base.processes import process_start
from megatron_inherit.train import run_folder
from megatron_inherit.train.profiling import Profiler


def test_a_killed_process_that_nobody_has_waited_for_holds_no_lock():
    pid = os.fork()
    if not pid:
        os._exit(0)
    try:
        deadline = time.monotonic() + 10
        while process_start(pid) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert os.path.exists(f"/proc/{pid}/stat")
        assert process_start(pid) is None
    finally:
        os.waitpid(pid, 0)
    assert process_start(os.getpid()) is not None


def test_a_lock_shows_life_while_its_holder_is_busy(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "TOUCH_SECONDS", 0.01)
    with run_folder.locked(tmp_path) as lock:
        os.utime(lock.path, (0, 0))
        deadline = time.monotonic() + 20
        while lock.path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock.path.stat().st_mtime > 0
    assert not run_folder.is_held(tmp_path)


def test_a_short_session_is_traced_whatever_the_run_s_length(tmp_path):
    profiler = Profiler(tmp_path, 0, steps=3, session_steps=2)
    with profiler:
        for _ in range(2):
            profiler.step()
    assert (tmp_path / "rank_00000.json").is_file()


@pytest.mark.parametrize("manifest", ['{"kind": "subset"}', '{"tensors": {}}'])
def test_data_and_models_are_not_written_over_by_a_run(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UsageError, match="holds data or a model"):
        run_folder.make_writable(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == [manifest]


def test_a_run_and_what_a_launcher_put_there_are_in_nobody_s_way(tmp_path):
    (tmp_path / "slurm-1.log").touch()
    (tmp_path / "inherit.json").touch()  # of what it started from
    run_folder.make_writable(tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "run"}')
    run_folder.make_writable(tmp_path)
