"""A keyed permutation of [0, n): random access, nothing to build, the same on every machine."""

from __future__ import annotations

import math

import numpy as np
import xxhash

_ROUNDS = 6
_CHUNK = 1 << 15
_KEPT = 8
BLOCK = 1 << 12


def derive_key(*parts: object) -> int:
    """Hashes what identifies a use (seed, purpose, epoch) to 64 bits."""
    return xxhash.xxh3_64_intdigest(":".join(map(str, parts)).encode())


def mix64(values: np.ndarray, key: int) -> np.ndarray:
    """Hashes uint64 values with a key: the finalizer of splitmix64, a bijection for each key (Steele et al., 2014)."""
    out = values ^ np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        out ^= out >> np.uint64(shift)
        out *= np.uint64(factor)
    out ^= out >> np.uint64(31)
    return out


class KeyedPermutation:
    """A pseudo-random bijection of [0, size) that is evaluated point by point.

    A Feistel network on the pairs of Z_a x Z_b with a * b just above ``size`` (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002); the few points that fall beyond ``size`` are mapped again until they fall inside.

    Args:
        size: Number of elements, at most 2**62.
        key: 64 bits; another key is another permutation.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._rows = math.isqrt(max(size - 1, 0)) + 1
        self._columns = max(1, -(-size // self._rows))
        self._blocks: dict[int, np.ndarray] = {}
        self._keys = [derive_key(key, "round", number) for number in range(_ROUNDS)]

    def block(self, number: int) -> np.ndarray:
        """Gives the elements at positions ``[number * BLOCK, (number + 1) * BLOCK)``; the last blocks asked are kept.

        A training step asks for a few positions at a time, and for a few the calls cost more than the arithmetic.
        """
        if number not in self._blocks:
            if len(self._blocks) >= _KEPT:
                self._blocks.pop(next(iter(self._blocks)))
            start = number * BLOCK
            self._blocks[number] = self(np.arange(start, min(self.size, start + BLOCK)))
        return self._blocks[number]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Maps positions, int64 [n] each in [0, size), to elements, int64 [n]."""
        out = np.empty(len(index), np.int64)
        for start in range(0, len(index), _CHUNK):
            out[start : start + _CHUNK] = self._map(index[start : start + _CHUNK].astype(np.uint64))
        return out

    def _map(self, position: np.ndarray) -> np.ndarray:
        index: np.ndarray = self._encrypt(position)
        outside = np.flatnonzero(index >= self.size)
        while len(outside):
            index[outside] = self._encrypt(index[outside])
            outside = outside[index[outside] >= self.size]
        return index

    def _encrypt(self, index: np.ndarray) -> np.ndarray:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row, column = np.divmod(index, columns)
        for number, key in enumerate(self._keys):
            if number % 2:
                column = (column + mix64(row, key) % columns) % columns
            else:
                row = (row + mix64(column, key) % rows) % rows
        return row * columns + column
