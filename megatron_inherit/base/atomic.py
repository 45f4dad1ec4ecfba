"""Files and folders that appear whole or not at all: write under a temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_inherit.base.errors import DiskError, UsageError
from megatron_inherit.base.quantities import format_bytes
from megatron_inherit.base.temporary import TEMPORARY_MARK, locked, sweep, temporary_beside


def fsync_path(path: Path) -> None:
    """Makes a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Makes every file and folder below ``folder`` durable, the folder itself last."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            fsync_path(Path(root, name))
        fsync_path(Path(root))


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file in one step; a crash leaves the old content or the new one."""
    temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise disk_error(error, path) from error
    fsync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces a UTF-8 text file in one step."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step: two-space indent, keys in the given order, newline at the end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling folder that becomes ``path`` when the block ends without an exception.

    What killed processes left of the same ``path`` is removed first. A link is followed. SIGTERM inside the block
    removes the temporary folder and ends the process with 143.

    Raises:
        UsageError: ``path`` is in the way, see :func:`refuse_existing`, or another process is writing it.
        DiskError: The folder cannot be written.
    """
    path = Path(path).resolve() if Path(path).is_symlink() else Path(path).absolute()
    sweep(path)
    refuse_existing(path, overwrite=overwrite)
    temporary = temporary_beside(path)
    try:
        temporary.mkdir(parents=True)
        with locked(temporary), _sigterm_unwinds():
            yield temporary
            fsync_tree(temporary)
            refuse_existing(path, overwrite=overwrite)  # what came there meanwhile is not ours to replace
            put_in_place(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise disk_error(error, path) from error
        raise


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Lets SIGTERM end the block by an exception, unless the program handles it already or runs this in a thread."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def put_in_place(temporary: Path, path: Path) -> None:
    """Renames a finished folder to its final name; an older folder of that name is removed afterwards."""
    if path.exists() and _exchange(temporary, path):
        fsync_path(path.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        return
    retired = None
    if path.exists():
        retired = temporary_beside(path, aside=True)
        os.rename(path, retired)
    try:
        os.rename(temporary, path)
    except OSError:
        if retired is not None:
            os.rename(retired, path)
        raise
    fsync_path(path.parent)
    if retired is not None:
        shutil.rmtree(retired, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two names in one step (Linux ``renameat2``); tells whether system and file system could."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def refuse_existing(path: Path, *, overwrite: bool = False, source: str | Path | None = None) -> None:
    """Refuses an output path that would cost the user something.

    Args:
        path: The output folder to be.
        overwrite: Allows to replace a folder, but only one that this program wrote as a whole: it has a
            ``manifest.json`` and is no run.
        source: What the output is made of; a path that does not exist, such as a URL, is in nobody's way.

    Raises:
        UsageError: ``path`` exists with content and may not be replaced, or is ``source`` or holds it.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{path} exists already.", fix="Choose another output path or pass --overwrite.")
    read = Path(source).resolve() if source is not None else None
    if read is not None and path.resolve() in (read, *read.parents):
        raise UsageError(f"{path} holds what is read, {source}.", fix="Choose another output path.")
    if not (path / "manifest.json").is_file() or (path / "run.yaml").exists():
        what = "a run" if (path / "run.yaml").exists() else "nothing that --overwrite may replace"
        raise UsageError(f"{path} is {what}.", fix="Choose another output path, or remove it yourself.")


def require_space(path: Path, needed: int) -> None:
    """Raises DiskError unless the file system of ``path`` has ``needed`` bytes free."""
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskError(
            f"Not enough space on the file system of {str(path).partition(TEMPORARY_MARK)[0]}.",
            got=f"{format_bytes(free)} free",
            expected=f"at least {format_bytes(needed)}",
            fix="Free space or choose another output path.",
        )


def disk_error(error: OSError, path: Path) -> Exception:
    """Translates an error of the file system into one of ours, or gives it back where no path or space explains it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskError(f"The disk is full while writing {path}.", fix="Free space or choose another output path.")
    named = str(error.filename or path).partition(TEMPORARY_MARK)[0]
    ours, theirs = os.path.abspath(path), os.path.abspath(named)
    of_output = os.path.commonpath((ours, theirs)) in (ours, theirs)
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        verb = "written" if of_output or error.errno == errno.EROFS else "opened"
        return DiskError(f"{named} cannot be {verb}: {error.strerror}.", fix="Check the folder's permissions.")
    if of_output and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return DiskError(f"{named} cannot be made: {error.strerror}.", fix="Choose another output path.")
    if of_output and error.errno in (errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY):
        return UsageError(f"{named} is in the way: {error.strerror}.", fix="Choose another output path.")
    return error
