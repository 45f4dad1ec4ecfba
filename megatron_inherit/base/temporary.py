"""Temporary files and folders beside an output: they name their writer, are locked while it lives, and swept after it.

A lock alone does not tell: file systems without locks exist, NFS has none for folders, and on some no other machine
sees them. So the name says which process on which machine writes, and a folder of another machine, whose processes
cannot be seen, goes only after a day without a change.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_inherit.base.errors import UsageError
from megatron_inherit.base.log import get_logger
from megatron_inherit.base.processes import machine_mark, process_start

TEMPORARY_MARK = ".tmp-"
FOREIGN_SECONDS = 24 * 3600.0
"""What another machine left is removed when nothing in it changed for so long."""
_ASIDE = "-old"
_WRITER = re.compile(rf"(?P<pid>\d+)-(?P<started>\w+)-(?P<machine>[0-9a-f]{{6}})-[0-9a-f]{{8}}(?P<aside>{_ASIDE})?")
_log = get_logger(__name__)


def temporary_beside(path: Path, *, aside: bool = False) -> Path:
    """Names a new temporary sibling of an output.

    Args:
        path: The output.
        aside: It will hold the output's old content, which ``sweep`` puts back where nothing took its place.
    """
    pid = os.getpid()
    writer = f"{pid}-{process_start(pid)}-{machine_mark()}-{uuid.uuid4().hex[:8]}{_ASIDE if aside else ''}"
    return path.with_name(f"{path.name}{TEMPORARY_MARK}{writer}")


def lock(file: IO[Any] | int, *, shared: bool = False) -> bool:
    """Locks an open file or folder until it is closed or its process dies.

    Args:
        file: On NFS it must be open for writing, or for reading where it is shared; else it has no locks there.
        shared: Others may hold it in the same way.

    Returns:
        False if another one holds it; True also where the file system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Locks a file or folder as long as the block or the process lives; yields False if another one holds it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield lock(descriptor)
    finally:
        os.close(descriptor)


def refuse_second_writer(output: Path) -> UsageError:
    """Says that another job writes to a folder or a prefix."""
    return UsageError(f"Another job is writing to {output}.", fix="Wait for it, or choose another output.")


def sweep(path: Path, *, several: bool = False) -> None:
    """Removes the temporary files and folders of an output whose writers are dead, and says so.

    Args:
        path: The output.
        several: Processes write beside each other; those that live are spared.

    Raises:
        UsageError: One of the writers lives, and there may be but one.
    """
    for found in sorted(path.parent.glob(f"{glob.escape(path.name)}{TEMPORARY_MARK}*")):
        writer = _WRITER.fullmatch(found.name.rpartition(TEMPORARY_MARK)[2])
        if writer is None:
            continue
        with contextlib.suppress(FileNotFoundError, PermissionError), locked(found) as free:
            if not free or _runs_here(writer):
                if several:
                    continue
                raise refuse_second_writer(path)
            if writer["machine"] == machine_mark() or not _changed_lately(found):
                _clear_away(found, path, aside=bool(writer["aside"]))


def clock_of(folder: Path) -> float:
    """Gives the time of a folder's file system, which is that of its server, not of this machine."""
    probe = folder / f".clock-{uuid.uuid4().hex[:8]}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _runs_here(writer: re.Match[str]) -> bool:
    """Tells whether another process of this machine is the writer; of this process's own the lock tells."""
    pid = int(writer["pid"])
    return writer["machine"] == machine_mark() and pid != os.getpid() and process_start(pid) == writer["started"]


def _changed_lately(found: Path) -> bool:
    try:
        newest = max(path.lstat().st_mtime for path in (found, *found.rglob("*")))
        return clock_of(found.parent) - newest < FOREIGN_SECONDS
    except OSError:
        return True


def _clear_away(found: Path, path: Path, *, aside: bool) -> None:
    if aside and not path.exists():
        _log.warning("%s holds what a process that was killed had begun to replace; it is put back.", found)
        found.rename(path)
        return
    _log.warning("%s was left by a process that was killed; it is removed.", found)
    if found.is_dir():
        shutil.rmtree(found, ignore_errors=True)
    else:
        found.unlink(missing_ok=True)
