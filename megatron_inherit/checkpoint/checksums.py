"""Checksums of parts of files, compared when a tensor that lies in them is about to be moved.

A part is read once more than its tensor asks for, just before it: what follows comes out of the page cache.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from megatron_inherit.base.errors import CheckpointError

if TYPE_CHECKING:
    from megatron_inherit.checkpoint.stream import StoredTensor

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """Bytes of a file with their hash.

    Attributes:
        file: Path.
        offset: First byte.
        nbytes: How many.
        xxh3: XXH3-64 of them, in hexadecimal digits.
        what: What they are, for the message.
    """

    file: str
    offset: int
    nbytes: int
    xxh3: str
    what: str


class Checksums:
    """Knows the hashes of parts of files, and which were found right.

    Args:
        parts: Disjoint parts.
    """

    def __init__(self, parts: Iterable[Part] = ()) -> None:
        self._parts: dict[str, list[Part]] = {}
        for part in sorted(parts, key=lambda one: one.offset):
            self._parts.setdefault(part.file, []).append(part)
        self._sound: set[tuple[str, int]] = set()

    def check(self, stored: StoredTensor) -> None:
        """Reads the parts that a tensor lies in, each once whatever lies in it; may be called from any thread.

        Raises:
            CheckpointError: One of them was changed; the message names file and tensor.
        """
        for part in self._of(stored):
            if (part.file, part.offset) not in self._sound:
                _compare(part)
                self._sound.add((part.file, part.offset))

    def _of(self, stored: StoredTensor) -> Iterator[Part]:
        for extent in (piece.extent for piece in stored.pieces):
            parts = self._parts.get(extent.file, [])
            first = max(0, bisect.bisect_right(parts, extent.offset, key=lambda part: part.offset) - 1)
            for part in parts[first:]:
                if part.offset >= extent.end:
                    break
                yield part


def _compare(part: Part) -> None:
    digest, left = xxhash.xxh3_64(), part.nbytes
    with open(part.file, "rb", buffering=0) as file:
        file.seek(part.offset)
        while left and (block := file.read(min(_CHUNK, left))):
            digest.update(block)
            left -= len(block)
    got = digest.hexdigest()
    if left or got != part.xxh3:
        raise CheckpointError(
            f"{part.file} was changed in {part.what}: its xxh3 differs.",
            got=got,
            expected=part.xxh3,
            fix="Take an older checkpoint, or copy this one again.",
        )
