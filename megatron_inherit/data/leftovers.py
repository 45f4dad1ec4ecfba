"""What a killed job leaves: unfinished files and folders are locked while their writer lives, and swept up after it."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_inherit.base.atomic import TEMPORARY_MARK, new_folder
from megatron_inherit.base.errors import UsageError
from megatron_inherit.base.log import get_logger
from megatron_inherit.data.manifests import kind_of

LOCK = ".lock"
_log = get_logger(__name__)


def lock(file: IO[Any]) -> bool:
    """Locks an open file until it is closed or its process dies; False if another one holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def refuse_second_writer(out: Path) -> UsageError:
    """Says that another job writes to a folder or a prefix."""
    return UsageError(f"Another job is writing to {out}.", fix="Wait for it, or choose another output.")


@contextlib.contextmanager
def swept_folder(out: Path, kind: str, *, overwrite: bool = False) -> Iterator[Path]:
    """As :func:`megatron_inherit.base.atomic.new_folder`, once what killed jobs left of ``out`` is removed.

    Args:
        out: The folder.
        kind: Of its manifest; only a folder of this kind is overwritten.
        overwrite: Replaces it.

    Raises:
        UsageError: Another job is writing to ``out``, it exists, or holds another thing.
        DiskError: The folder cannot be written.
    """
    sweep(out.absolute())
    if overwrite and out.exists() and (out.is_file() or any(out.iterdir())) and kind_of(out) != kind:
        raise UsageError(
            f"{out} holds something else than a {kind}.", fix="Choose another output, or remove it yourself."
        )
    with contextlib.ExitStack() as until_renamed, new_folder(out, overwrite=overwrite) as folder:
        lock(until_renamed.enter_context((folder / LOCK).open("a")))
        yield folder


def sweep(out: Path) -> None:
    """Removes the temporary files and folders of ``out`` whose writers are dead, and says so.

    Raises:
        UsageError: One of the writers lives.
    """
    for path in sorted(out.parent.glob(f"{glob.escape(out.name)}{TEMPORARY_MARK}*")):
        key = path / LOCK if path.is_dir() else path
        if not key.is_file():
            continue
        with key.open("a") as file:
            if not lock(file):
                raise refuse_second_writer(out)
            _log.warning("%s is left by a job that was killed; it is removed", path)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
