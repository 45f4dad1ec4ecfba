"""Byte ranges of files, wherever they are: local ones through the kernel, remote ones by range requests."""

from __future__ import annotations

import fnmatch
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_inherit.base.errors import CheckpointError


class MissingFileError(CheckpointError):
    """There is no such file, as far as the file system or a server that can be reached knows."""


def is_remote(path: str) -> bool:
    """Tells whether a path is a URL (``https://``, ``s3://``, ``hf://``)."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """Names a file inside a folder or below a URL."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


class FilePool:
    """Opens each file once and reads or writes ranges from any thread; counts the bytes."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.bytes_written = 0
        self._open: dict[tuple[str, bool], int] = {}
        self._remote: Any = None
        self._lock = threading.Lock()

    def size(self, file: str) -> int:
        """Gives a file's size in bytes.

        Raises:
            CheckpointError: There is no such file.
        """
        if is_remote(file):
            return self._remotes().size(file)
        return os.fstat(self.descriptor(file)).st_size

    def exists(self, file: str) -> bool:
        """Tells whether a file or URL is there.

        Raises:
            CheckpointError: Its server cannot be reached.
        """
        return bool(self._remotes().exists(file)) if is_remote(file) else os.path.isfile(file)

    def names(self, folder: str, patterns: Sequence[str]) -> list[str]:
        """Lists the files of a folder or below a URL whose names match a pattern, in order.

        Raises:
            CheckpointError: The server cannot be reached.
        """
        if is_remote(folder):
            return sorted(self._remotes().names(folder, patterns))
        found = [entry.name for entry in os.scandir(folder) if entry.is_file()] if os.path.isdir(folder) else []
        return sorted(name for name in found if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))

    def state(self, file: str) -> str:
        """Tells one content of a file from another without reading it: size and age, or what its server says of it.

        Raises:
            CheckpointError: There is no such file.
        """
        if is_remote(file):
            return str(self._remotes().state(file))
        found = os.fstat(self.descriptor(file))
        return f"{found.st_size} {found.st_mtime_ns}"

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fills a buffer from the bytes at ``offset``.

        Raises:
            CheckpointError: The file ends before the buffer is full.
        """
        if is_remote(file):
            self._remotes().read_into(file, offset, buffer)
            got = len(buffer)
        else:
            descriptor = self.descriptor(file)
            got = 0
            while got < len(buffer):
                count = os.preadv(descriptor, [buffer[got:]], offset + got)
                if not count:
                    break
                got += count
        with self._lock:
            self.bytes_read += got
        if got < len(buffer):
            raise CheckpointError(
                f"{file} is truncated.",
                got=f"{self.size(file)} bytes",
                expected=f"at least {offset + len(buffer)}",
                fix="Copy or download the file again.",
            )

    def spool(self, file: str, start: int, stop: int) -> None:
        """Brings bytes near that will be read in many small pieces: those of a remote file; local ones are."""
        if is_remote(file):
            self._remotes().spool(file, start, stop)

    def read(self, file: str, offset: int, count: int) -> bytes:
        """Reads ``count`` bytes at ``offset``."""
        buffer = bytearray(count)
        self.read_into(file, offset, memoryview(buffer))
        return bytes(buffer)

    def read_all(self, file: str, *, limit: int) -> bytes:
        """Reads a small file whole.

        Raises:
            CheckpointError: It is larger than ``limit`` bytes.
        """
        size = self.size(file)
        if size > limit:
            raise CheckpointError(f"{file} is too large for what it should be.", got=f"{size} bytes", expected=limit)
        return self.read(file, 0, size)

    def write_from(self, file: str, offset: int, buffer: memoryview) -> None:
        """Writes a buffer at ``offset`` of an existing local file."""
        descriptor = self.descriptor(file, writable=True)
        done = 0
        while done < len(buffer):
            done += os.pwrite(descriptor, buffer[done:], offset + done)
        with self._lock:
            self.bytes_written += done

    def descriptor(self, file: str, *, writable: bool = False) -> int:
        """Gives the open descriptor of a local file."""
        key = (file, writable)
        found = self._open.get(key)
        if found is not None:
            return found
        with self._lock:
            if key not in self._open:
                try:
                    self._open[key] = os.open(file, os.O_RDWR if writable else os.O_RDONLY)
                except FileNotFoundError as error:
                    raise MissingFileError(f"{file} is missing.", fix="Copy or download the file again.") from error
                except (IsADirectoryError, PermissionError) as error:
                    raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
            return self._open[key]

    def close(self) -> None:
        """Closes every file; the pool can be used again."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()
            if self._remote is not None:
                self._remote.close()
                self._remote = None

    def _remotes(self) -> Any:
        with self._lock:
            if self._remote is None:
                from megatron_inherit.checkpoint.remote import RemoteFiles

                self._remote = RemoteFiles()
            return self._remote


@contextmanager
def file_pool() -> Iterator[FilePool]:
    """Yields a pool and closes it at the end of the block."""
    pool = FilePool()
    try:
        yield pool
    finally:
        pool.close()


def create_file(path: Path, size: int, head: bytes = b"") -> None:
    """Creates a local file of an exact size that begins with ``head``; the rest reads as zeros until it is filled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(head)
        file.truncate(size)
