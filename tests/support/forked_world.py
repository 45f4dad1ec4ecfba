"""Worlds of real processes that talk over gloo, forked from this one so that the imports are paid once.

Each rank runs the command line and ends as a launched one would: killed, stopped, or with an exit code.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HEAVY = (
    "torch",
    "megatron_inherit.engines.create",
    "megatron_inherit.engines.megatron.engine",
    "megatron_inherit.train.loop",
    "megatron_inherit.data.windows",
    "megatron_inherit.cli.train",
)


def preload(*more: str) -> None:
    """Imports what the children need; starts no thread and no process group."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (*HEAVY, *more):
            importlib.import_module(name)


def fork(work: Callable[[], int], log: Path, opened: int) -> int:
    """Starts a process that ends with what ``work`` returns.

    Args:
        work: Runs in the child; an exception makes its exit code 99.
        log: What the child says goes there.
        opened: ``os.O_TRUNC`` or ``os.O_APPEND``.

    Returns:
        Its number.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | opened)
        for number in (1, 2):
            os.dup2(file, number)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
            sys.stdout.flush()
        os._exit(code)


@dataclass(frozen=True)
class Ended:
    """How the ranks ended: exit codes, negative for signals; what they said; how long it took in seconds."""

    codes: list[int]
    texts: list[str]
    seconds: float

    @property
    def text(self) -> str:
        """All ranks' messages."""
        return "\n".join(self.texts)


class World:
    """Ranks that were started and not yet waited for."""

    def __init__(self, folder: Path, size: int, work: Callable[[], int], environ: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        self.logs = [folder / f"rank{rank}.log" for rank in range(size)]
        port = str(free_port())
        self.pids = [self._fork(rank, size, port, work, environ) for rank in range(size)]

    def _fork(self, rank: int, size: int, port: str, work: Callable[[], int], environ: Mapping[str, str]) -> int:
        def child() -> int:
            os.environ.update(environ)
            # a shell that started us in the background has it ignored
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            return work()

        return fork(child, self.logs[rank], os.O_TRUNC)

    def wait(self, timeout: float = 120) -> Ended:
        """Waits for all ranks; kills what is left after the timeout and fails."""
        codes: dict[int, int] = {}
        deadline = self.began + timeout
        while len(codes) < len(self.pids) and time.monotonic() < deadline:
            for pid in self.pids:
                if pid not in codes:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        left = [pid for pid in self.pids if pid not in codes]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        texts = [log.read_text(errors="replace") if log.exists() else "" for log in self.logs]
        assert not left, f"still running after {timeout} s:\n" + "\n".join(texts)
        return Ended([codes[pid] for pid in self.pids], texts, time.monotonic() - self.began)


def minherit(*words: str) -> Callable[[], int]:
    """Gives the work of a rank that runs the command line."""

    def work() -> int:
        from megatron_inherit.cli.main import main

        return main(list(words))

    return work


def run(
    folder: Path,
    words: Sequence[str],
    *,
    size: int = 1,
    timeout: float = 120,
    before: Callable[[], None] | None = None,
    **environ: str,
) -> Ended:
    """Runs ``minherit`` on ``size`` ranks; ``before`` is called in each of them first."""

    def work() -> int:
        if before is not None:
            before()
        return minherit(*words)()

    return World(folder, size, work, environ).wait(timeout)


def free_port() -> int:
    """Finds a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
