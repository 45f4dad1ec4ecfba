"""Hashes of canonical tensors: the same for every format and layout of one model.

A tensor's hash is XXH3-128 over its canonical elements in row-major order, little-endian, without padding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.extents import Shape
from megatron_inherit.checkpoint.files import is_remote
from megatron_inherit.checkpoint.gather import is_transposed, row_major
from megatron_inherit.checkpoint.stream import Source, StoredTensor, read_box

NAME = "manifest.json"
TILE_BYTES = 1 << 20
LARGE_TILE_BYTES = 1 << 23
"""Of tensors that are stored transposed or far away: its runs are (tile / columns) long, and each costs a call."""
_TURNED_BYTES = 1 << 22


@dataclass(frozen=True)
class TensorHash:
    """What the manifest says of one tensor."""

    dtype: str
    shape: Shape
    xxh3: str

    def to_json(self) -> dict[str, Any]:
        """Gives plain values."""
        return {"dtype": self.dtype, "shape": list(self.shape), "xxh3": self.xxh3}


def row_tiles(stored: StoredTensor, *others: StoredTensor, transposed_bytes: int = 0) -> Iterator[tuple[Shape, Shape]]:
    """Cuts a tensor into boxes of whole canonical rows that are cheap to move.

    Args:
        stored: The tensor.
        others: Where it goes or what it is compared with; their layouts count too.
        transposed_bytes: Size of a box where one of them is stored transposed; default ``LARGE_TILE_BYTES``.

    Yields:
        (start, shape), in row-major order.
    """
    rows, rest = stored.shape[0], stored.shape[1:]
    row_bytes = max(1, stored.nbytes // rows)
    limit = LARGE_TILE_BYTES if any(map(is_remote, stored.files)) else TILE_BYTES
    if any(is_transposed(one.pieces) for one in (stored, *others)):
        limit = transposed_bytes or LARGE_TILE_BYTES
    tiles = -(-rows // max(1, limit // row_bytes))
    step = -(-rows // tiles)  # equal tiles: the last one of a transposed tensor has no shorter runs than the others
    for first in range(0, rows, step):
        yield (first, *(0,) * len(rest)), (min(step, rows - first), *rest)


def turned_rows(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the rows of a box in row-major order: all at once, or a few at a time where they have to be turned.

    Yields:
        (number of the first row, rows).
    """
    step = len(values)
    if not values.flags.c_contiguous:
        step = max(1, _TURNED_BYTES * len(values) // max(1, values.nbytes))
    for first in range(0, len(values), step):
        yield first, row_major(values[first : first + step])


def hash_tensor(source: Source, key: str) -> TensorHash:
    """Reads a tensor in tiles and hashes it."""
    stored = source.find(key)
    digest = xxhash.xxh3_128()
    for start, shape in row_tiles(stored):
        for _, rows in turned_rows(read_box(source.pool, stored, start, shape)):
            digest.update(rows.data)
    return TensorHash(stored.dtype, stored.shape, digest.hexdigest())


def hash_source(source: Source, keys: Iterable[str] | None = None, *, threads: int = 4) -> dict[str, TensorHash]:
    """Hashes tensors of a checkpoint.

    Args:
        source: The checkpoint.
        keys: Which; default all weights.
        threads: How many tensors at once.
    """
    names = list(source.tensors if keys is None else keys)
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(names, pool.map(lambda key: hash_tensor(source, key), names), strict=True))


def hash_files(source: Source) -> dict[str, str]:
    """Hashes every whole file that holds a tensor of a checkpoint, by path."""
    files = sorted({file for stored in source.tensors.values() for file in stored.files})
    return {file: _hash_file(source, file) for file in files}


def _hash_file(source: Source, file: str) -> str:
    digest, size = xxhash.xxh3_128(), source.pool.size(file)
    for start in range(0, size, 1 << 22):
        digest.update(source.pool.read(file, start, min(1 << 22, size - start)))
    return digest.hexdigest()


def to_json(hashes: Mapping[str, TensorHash]) -> dict[str, Any]:
    """Gives the content of ``manifest.json``."""
    return {"hash": "xxh3_128", "tensors": {name: entry.to_json() for name, entry in hashes.items()}}


def load_file(path: Path | str) -> dict[str, TensorHash]:
    """Reads a manifest of tensors.

    Raises:
        CheckpointError: It is missing, damaged, or lists files instead of tensors.
    """
    try:
        entries = json.loads(Path(path).read_text())["tensors"]
        return {name: TensorHash(one["dtype"], tuple(one["shape"]), one["xxh3"]) for name, one in entries.items()}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no manifest of tensors: {type(error).__name__} {error}"[:300]) from error
