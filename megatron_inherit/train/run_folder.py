"""A run's folder: who holds it, and how the run ended."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_inherit.base.atomic import disk_error, write_json
from megatron_inherit.base.errors import UsageError
from megatron_inherit.base.log import get_logger
from megatron_inherit.base.processes import process_start
from megatron_inherit.base.temporary import clock_of

logger = get_logger(__name__)

LOCK, STATUS = "run.lock", "exit_status.json"
FOREIGN_LOCK_SECONDS = 300.0
"""Without a sign of life for so long another machine's lock is taken over."""
TOUCH_SECONDS = 30.0
LOOK_SECONDS = 5.0
"""Between two looks at another machine's lock."""


def make_writable(folder: Path) -> None:
    """Creates a run's folder and tries to write in it.

    Raises:
        UsageError: It is a file, or holds data or a model, whose manifest a run would replace.
        DiskError: It cannot be created or written.
    """
    _refuse_foreign(folder)
    probe = folder / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("probe")
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{folder} is a file, not a folder.", fix="Set run.output to another path.") from error
    except OSError as error:
        raise disk_error(error, folder) from error


def _refuse_foreign(folder: Path) -> None:
    told = folder / "manifest.json"
    try:
        kind = json.loads(told.read_text()).get("kind") if told.is_file() else "run"
    except OSError:
        kind = "run"  # what keeps it from being read keeps it from being written, and that is told
    except (ValueError, AttributeError):
        kind = "run" if (folder / "run.yaml").exists() else "unknown"
    if kind != "run":
        raise UsageError(f"{folder} holds data or a model.", fix="Set run.output to a folder of its own.")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[RunLock]:
    """Holds a run's folder against a second job, and shows it from a thread; only rank 0 asks.

    Raises:
        UsageError: Another job that seems to live holds it.
    """
    lock, done = RunLock(folder), threading.Event()
    lock.acquire()
    beat = threading.Thread(target=_show_life, args=(lock, done), name="run lock", daemon=True)
    beat.start()
    try:
        yield lock
    finally:
        done.set()
        beat.join()
        lock.release()


def is_held(folder: Path) -> bool:
    """Tells whether a job that seems to live writes into a run's folder."""
    return RunLock(folder).is_held()


class RunLock:
    """A file that names the host and the process that write into a folder.

    The file stays; an empty one is free. A lock of this host is stale when its process is gone, or is another one that
    got the same number; one of another host when it was not touched for ``FOREIGN_LOCK_SECONDS`` of the file system's
    own clock.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
            "token": uuid.uuid4().hex,
        }

    def acquire(self) -> None:
        """Takes the lock, from a dead holder too; of one on another machine it waits for a sign of life.

        A job that was killed and is requeued comes back elsewhere before its own lock looks old.

        Raises:
            UsageError: Its holder seems to live.
        """
        holder = self._take()
        if holder and holder.get("host") != self._mine["host"]:
            holder = self._outwait(holder)
        if holder:
            raise UsageError(
                f"Another job writes into {self.path.parent}.",
                got=f"process {holder.get('pid')} on {holder.get('host')}",
                fix=f"Wait for it, set run.output to another folder, or delete {self.path} if that job is dead.",
            )

    def _outwait(self, holder: dict[str, Any]) -> dict[str, Any]:
        """Waits until another machine's lock is old, and takes it; gives its holder back as soon as that one moves."""
        logger.warning(
            "Process %s on %s holds %s; waiting for a sign of its life, %g s at most.",
            holder.get("pid"),
            holder.get("host"),
            self.path.parent,
            FOREIGN_LOCK_SECONDS,
        )
        seen = self.path.stat().st_mtime
        while holder and self.path.stat().st_mtime == seen:
            time.sleep(LOOK_SECONDS)
            holder = self._take()
        return holder

    def _take(self) -> dict[str, Any]:
        """Takes the lock unless its holder seems to live; gives that holder, or nothing."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "r+") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            holder = _parse(file.read())
            if holder and self._lives(holder):
                return holder
            if holder:
                logger.warning("Taking over the lock of process %s on %s.", holder.get("pid"), holder.get("host"))
            file.seek(0)
            file.truncate()
            json.dump(self._mine, file)
            file.flush()
            os.fsync(file.fileno())
        return {}

    def is_held(self) -> bool:
        """Tells whether a holder seems to live; nothing is changed."""
        holder = _parse(self.path.read_text()) if self.path.exists() else {}
        return bool(holder) and self._lives(holder)

    def touch(self) -> None:
        """Shows a sign of life to other hosts."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Frees the folder, unless somebody took the lock over."""
        with contextlib.suppress(OSError):
            if _parse(self.path.read_text()).get("token") == self._mine["token"]:
                self.path.write_text("")

    def _lives(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == self._mine["host"]:
            started = process_start(int(holder.get("pid", 0)))
            return started is not None and started == holder.get("started")
        return clock_of(self.path.parent) - self.path.stat().st_mtime < FOREIGN_LOCK_SECONDS


def _show_life(lock: RunLock, done: threading.Event) -> None:
    while not done.wait(TOUCH_SECONDS):
        lock.touch()


def write_exit_status(folder: Path, *, code: int, reason: str) -> None:
    """Says how the run ended, where a launcher that hides exit codes cannot.

    The first word of a session stands, unless it was only that some other rank was lost.

    Args:
        folder: The run's folder.
        code: Exit code as in ``base.errors``.
        reason: One line.
    """
    path = folder / STATUS
    if code == 1 and path.exists():
        return
    rank = int(os.environ.get("RANK", "0"))
    with contextlib.suppress(Exception):
        write_json(
            path,
            {
                "exit_code": code,
                "reason": reason,
                "rank": rank,
                "host": socket.gethostname(),
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )


def clear_exit_status(folder: Path) -> None:
    """Forgets how the session before ended."""
    (folder / STATUS).unlink(missing_ok=True)


def _parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
