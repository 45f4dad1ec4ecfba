"""A study's trainer whose runs are forked from this process, so that the imports are paid once."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_inherit.study.arms import CONSOLE, RECIPE, Trainer
from tests.support.forked_world import fork

PR_SET_PDEATHSIG = 1
OF_A_WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of ``forked_world``: each run makes a world of its own."""


class ForkedProcess:
    """What the trainer uses of ``subprocess.Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid, self.code = pid, None

    def poll(self) -> int | None:
        """Gives the exit code, or None while it runs."""
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code

    def wait(self) -> int:
        """Waits for the end."""
        while self.poll() is None:
            time.sleep(0.02)
        return self.code

    def terminate(self) -> None:
        """Asks it to save and end."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


class ForkedTrainer(Trainer):
    """A Trainer in all but how a process is made; its runs too are asked to save when this process dies."""

    def _launch(self, folder: Path, environment: Mapping[str, str]) -> ForkedProcess:
        def child() -> int:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            os.environ.clear()
            os.environ.update({name: value for name, value in environment.items() if name not in OF_A_WORLD})
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            from megatron_inherit.cli.main import main

            return main(["train", str(folder / RECIPE)])

        return ForkedProcess(fork(child, folder / CONSOLE, os.O_APPEND))
