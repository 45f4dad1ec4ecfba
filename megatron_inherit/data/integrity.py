"""Hashes of large files in blocks, so that damage is found with its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import xxhash

from megatron_inherit.base.errors import DataError

BLOCK_BYTES = 64 * 2**20


class BlockHasher:
    """Takes the bytes of a file as they pass; one xxh3 of 64 bits for each 64 MiB."""

    def __init__(self) -> None:
        self.size = 0
        self._digests: list[str] = []
        self._current = xxhash.xxh3_64()

    def update(self, data: bytes | memoryview) -> None:
        """Adds the next bytes."""
        view = memoryview(data).cast("B")
        while len(view):
            room = BLOCK_BYTES - self.size % BLOCK_BYTES
            part, view = view[:room], view[room:]
            self._current.update(part)
            self.size += len(part)
            if self.size % BLOCK_BYTES == 0:
                self._digests.append(self._current.hexdigest())
                self._current.reset()

    def digests(self) -> list[str]:
        """Gives the hashes of all blocks, the last one partial."""
        return [*self._digests, *([self._current.hexdigest()] if self.size % BLOCK_BYTES else [])]


def hash_file(path: Path) -> list[str]:
    """Hashes a file in blocks."""
    return list(_block_digests(path))


def _block_digests(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        hasher, left = xxhash.xxh3_64(), BLOCK_BYTES
        while data := file.read(min(left, 1 << 22)):
            hasher.update(data)
            left -= len(data)
            if left == 0:
                yield hasher.hexdigest()
                hasher.reset()
                left = BLOCK_BYTES
        if left < BLOCK_BYTES:
            yield hasher.hexdigest()


def check_size(path: Path, size: int) -> None:
    """Raises DataError unless the file has the size it was written with."""
    if not path.is_file():
        raise DataError(f"{path} is missing.", fix="Restore the file, or build it again by the command that wrote it.")
    got = path.stat().st_size
    if got != size:
        raise DataError(
            f"{path} ends at offset {got}.",
            got=f"{got} bytes",
            expected=f"{size} bytes",
            fix="The file is truncated or was replaced; copy it again, or build it again by the command that wrote it.",
        )


def check_hashes(path: Path, digests: list[str]) -> None:
    """Raises DataError with the offset of the first block that is not what was written."""
    for number, digest in enumerate(_block_digests(path)):
        if number >= len(digests) or digest != digests[number]:
            offset = number * BLOCK_BYTES
            raise DataError(
                f"{path} was changed since it was written: the 64 MiB at offset {offset} have another hash.",
                got=digest,
                expected=digests[number] if number < len(digests) else "the end of the file",
                fix="Restore the file, or build it again by the command that wrote it.",
            )
