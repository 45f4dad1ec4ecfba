"""Finds the rank that hangs or died: every rank's thread shows signs of life in a file, and reads those of others.

A thread goes on while its main thread waits in a collective, but not while the process is stopped or gone. So of the
ranks of a run that stands still, the one without signs of life is at fault; if all live, the one furthest behind. The
file is mapped into memory: the loop notes its step there at no cost, and the note outlives the process.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_inherit.base.log import get_logger
from megatron_inherit.base.processes import process_start

logger = get_logger(__name__)

_FILE_BYTES = 512


@dataclass(frozen=True)
class Heartbeat:
    """A rank's last sign of life.

    Attributes:
        age: Seconds since it was given, less those of the reader's own, by the file system's clock.
        step, phase: What it was doing.
        dead: It ran on this host and is gone.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    age: float
    dead: bool


class Watchdog:
    """Watches over this rank's progress from a thread.

    Args:
        folder: ``heartbeats`` of the run, on a file system that all ranks see.
        rank: This process's.
        world_size: Number of ranks.
        timeout: Seconds without progress after which the run is ended.
        on_silence: Called with a sentence that names the silent rank; default ends the process with code 1.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        timeout: float,
        on_silence: Callable[[str], None] | None = None,
    ) -> None:
        self.folder, self.rank, self.world_size, self.timeout = Path(folder), rank, world_size, timeout
        self.interval = min(30.0, max(0.2, timeout / 8))
        self._on_silence = on_silence or _end_process
        self._since = time.monotonic()
        self._note: mmap.mmap | None = None
        self._facts = {"host": socket.gethostname()[:64], "pid": os.getpid(), "started": process_start(os.getpid())}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(self.rank)
        path.write_bytes(b" " * _FILE_BYTES)
        with path.open("r+b") as file:
            self._note = mmap.mmap(file.fileno(), _FILE_BYTES)
        self.progress(0, "start")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        with contextlib.suppress(OSError):
            self._path(self.rank).unlink()

    def progress(self, step: int, phase: str) -> None:
        """Notes that the loop came to a phase of a step."""
        self._since = time.monotonic()
        if self._note is not None:
            self._note[:] = json.dumps({**self._facts, "step": step, "phase": phase}).encode().ljust(_FILE_BYTES)

    def heartbeats(self) -> list[Heartbeat]:
        """Reads all ranks' signs of life.

        Raises:
            OSError: This rank's own cannot be given or read.
        """
        self._show()
        now = self._path(self.rank).stat().st_mtime
        found = (self._read(rank, now) for rank in range(self.world_size))
        return [heartbeat for heartbeat in found if heartbeat is not None]

    def lost(self) -> list[Heartbeat]:
        """Gives the ranks that died or show no sign of life; waits a little for a death to become visible."""
        deadline = time.monotonic() + 3.0
        while True:
            gone = [h for h in self.heartbeats() if h.rank != self.rank and (h.dead or h.age > 3 * self.interval + 2)]
            if gone or time.monotonic() > deadline:
                return gone
            time.sleep(0.1)

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            with self._tolerant():
                self._show()
            if time.monotonic() - self._since > self.timeout and not self._stop.is_set():
                heartbeats: list[Heartbeat] = []
                with self._tolerant():
                    heartbeats = self.heartbeats()
                self._on_silence(self._sentence(heartbeats))
                return

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Bears that the folder is gone or full: a run that stands still is ended all the same."""
        try:
            yield
        except OSError as error:
            logger.debug("No sign of life could be written or read: %s", error)

    def _sentence(self, heartbeats: list[Heartbeat]) -> str:
        if not heartbeats:
            return f"No progress for {self.timeout:g} s, and {self.folder} cannot be read to tell which rank is silent."
        silent = [h for h in heartbeats if h.rank != self.rank and (h.dead or h.age > 2 * self.interval + 1)]
        if not silent and heartbeats:
            behind = min(h.step for h in heartbeats)
            silent = [h for h in heartbeats if h.step == behind]
        if len(silent) == len(heartbeats):
            silent = [h for h in heartbeats if h.rank == self.rank]
        for heartbeat in silent:
            _kill(heartbeat, self.rank)
        names = "; ".join(
            f"rank {h.rank} (process {h.pid} on {h.host}) {'is gone' if h.dead else 'is silent'} since step {h.step}, "
            f"phase {h.phase}"
            for h in silent
        )
        return f"No progress for {self.timeout:g} s: {names}."

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"

    def _show(self) -> None:
        if self._note is not None:
            self._note.flush()
        os.utime(self._path(self.rank))

    def _read(self, rank: int, now: float) -> Heartbeat | None:
        try:
            path = self._path(rank)
            value = json.loads(path.read_text())
            age = max(0.0, now - path.stat().st_mtime)
        except (OSError, ValueError):
            return None
        here = value["host"] == socket.gethostname()
        dead = here and _is_gone(value["pid"], value["started"])
        return Heartbeat(rank, value["host"], value["pid"], value["step"], value["phase"], age, dead)


def _is_gone(pid: int, started: str | None) -> bool:
    """Tells whether a process of this host ended; one that nobody has waited for yet counts as ended."""
    with contextlib.suppress(OSError, IndexError):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X"):
            return True
    return process_start(pid) != started


def _kill(heartbeat: Heartbeat, own_rank: int) -> None:
    """Ends a silent process of this host, which may be stopped and would hear nothing else."""
    if heartbeat.rank != own_rank and heartbeat.host == socket.gethostname() and not heartbeat.dead:
        with contextlib.suppress(OSError):
            os.kill(heartbeat.pid, signal.SIGKILL)


def _end_process(sentence: str) -> None:
    logger.error(sentence)
    os._exit(1)
