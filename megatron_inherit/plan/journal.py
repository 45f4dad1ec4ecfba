"""The journal of a transfer that can be continued: which tensors of which plan are in place, with their hashes.

What the journal claims is not believed: on resuming, each tensor it lists is read back and must have its hash, so that
nothing depends on the order in which a dying machine wrote its pages.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from megatron_inherit.base.atomic import disk_error, fsync_tree, put_in_place
from megatron_inherit.base.temporary import TEMPORARY_MARK, locked, refuse_second_writer
from megatron_inherit.checkpoint.manifest import TensorHash

NAME = "journal.jsonl"


class Journal:
    """A file of one JSON line a finished tensor, after a line that names the plan."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.found = _read(folder / NAME, fingerprint)
        self._fingerprint = fingerprint
        self._lock = threading.Lock()

    @property
    def is_new(self) -> bool:
        """Tells whether there is nothing of this plan to continue."""
        return self.found is None

    def begin(self) -> None:
        """Starts afresh in an empty folder."""
        (self.folder / NAME).write_text(json.dumps({"plan": self._fingerprint}) + "\n")

    def add(self, target: str, entry: TensorHash) -> None:
        """Notes a finished tensor; may be called from any thread."""
        line = json.dumps({"target": target, **entry.to_json()}) + "\n"
        with self._lock, (self.folder / NAME).open("a") as file:
            file.write(line)

    def remove(self) -> None:
        """Deletes the file, when all is done."""
        (self.folder / NAME).unlink(missing_ok=True)


@contextlib.contextmanager
def resumable_folder(path: Path) -> Iterator[Path]:
    """Yields a folder beside ``path`` that becomes ``path`` when the block ends well; what it holds stays otherwise.

    Raises:
        UsageError: Another process is writing it.
        DiskError: The folder cannot be written.
    """
    folder = path.with_name(f"{path.name}{TEMPORARY_MARK}resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) as free:
            if not free:
                raise refuse_second_writer(path)
            try:
                yield folder
                fsync_tree(folder)
                put_in_place(folder, path)
            finally:
                with contextlib.suppress(OSError):
                    folder.rmdir()
    except OSError as error:
        raise disk_error(error, path) from error


def clear(folder: Path) -> None:
    """Empties a folder."""
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _read(path: Path, fingerprint: str) -> dict[str, TensorHash] | None:
    if not path.is_file():
        return None
    found: dict[str, TensorHash] = {}
    lines = path.read_text().splitlines()
    try:
        if not lines or json.loads(lines[0]).get("plan") != fingerprint:
            return None
        for line in lines[1:]:
            entry = json.loads(line)
            found[entry["target"]] = TensorHash(entry["dtype"], tuple(entry["shape"]), entry["xxh3"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return found
    return found
