"""Tasks over processes: what becomes of a job whose worker is killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_inherit.base.errors import MinheritError
from megatron_inherit.data.jobs import Progress, report, run_tasks


def report_for_ever(pid_file: Path) -> None:
    pid_file.write_text(str(os.getpid()))
    while True:
        report(Progress(documents=1))


@pytest.mark.timeout(60)
def test_workers_killed_with_a_report_in_their_hands_end_the_job(tmp_path: Path) -> None:
    """Their pipe is full, so that each is killed while it writes."""
    files = [tmp_path / "first", tmp_path / "second"]

    def kill_workers(progress: Progress) -> None:
        if all(file.is_file() and file.read_text() for file in files):
            time.sleep(0.5)
            for file in files:
                os.kill(int(file.read_text()), signal.SIGKILL)
                file.unlink()

    with pytest.raises(MinheritError, match="A worker process died"):
        list(run_tasks(report_for_ever, files, workers=2, on_progress=kill_workers))
