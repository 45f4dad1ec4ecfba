"""The safetensors container: an 8-byte header length, a JSON header, dense row-major data without holes.

Format: https://github.com/huggingface/safetensors (README, "Format"). Every rule of it is checked before a number of
the header is used, since headers come from strangers.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.extents import ITEM_SIZES, Extent
from megatron_inherit.checkpoint.files import FilePool

MAX_HEADER = 10_000_000
"""Bytes; about 80,000 tensors. The reference implementation allows 100 MB, whose JSON alone takes a gigabyte."""


def read_header(pool: FilePool, file: str) -> tuple[dict[str, Extent], str]:
    """Reads where the tensors of a file lie.

    Args:
        pool: Where the file is opened.
        file: Path or URL.

    Returns:
        The extents by name, in file order, and the hash of the header.

    Raises:
        CheckpointError: The file is truncated or breaks a rule of the format.
    """
    size = pool.size(file)
    if size < 8:
        raise CheckpointError(f"{file} is no safetensors file.", got=f"{size} bytes", fix="Download it again.")
    (length,) = struct.unpack("<Q", pool.read(file, 0, 8))
    if length > MAX_HEADER:
        raise CheckpointError(f"{file}: the header is too large.", got=f"{length} bytes", expected=f"<= {MAX_HEADER}")
    if length > size - 8:
        raise CheckpointError(
            f"{file} is truncated: its header does not fit.",
            got=f"{size} bytes",
            expected=f"at least {length + 8}",
            fix="Copy or download the file again.",
        )
    raw = pool.read(file, 8, length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not valid JSON.", got=str(error)[:200]) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object.")
    header.pop("__metadata__", None)
    extents = {name: _extent(file, 8 + length, name, entry) for name, entry in header.items()}
    ordered = dict(sorted(extents.items(), key=lambda item: (item[1].offset, item[1].end)))
    _check_order(file, ordered, 8 + length, size)
    return ordered, xxhash.xxh3_128_hexdigest(raw)


def build_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    """Lays tensors out in a new file.

    Args:
        tensors: (name, dtype, shape) in file order.

    Returns:
        The bytes before the data, (offset in the file, bytes) by name, and the size of the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, at = {}, 0
    for name, dtype, shape in tensors:
        count = math.prod(shape) * ITEM_SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + count]}
        places[name] = (at, count)
        at += count
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: (len(head) + start, count) for name, (start, count) in places.items()}, len(head) + at


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _extent(file: str, base: int, name: str, entry: Any) -> Extent:
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise CheckpointError(f"{file}: the header's entry of tensor {name} is incomplete.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in ITEM_SIZES:
        raise CheckpointError(f"{file}: tensor {name} has an unknown dtype.", got=dtype)
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if any(type(number) is not int or not 0 <= number < 1 << 60 for number in numbers) or len(offsets) != 2:
        raise CheckpointError(f"{file}: tensor {name} has a bad shape or bad offsets.", got=f"{shape}, {offsets}")
    needed = math.prod(shape) * ITEM_SIZES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{file}: tensor {name} has offsets that do not fit its shape {shape}.",
            got=f"{offsets[1] - offsets[0]} bytes",
            expected=needed,
        )
    return Extent.dense(file, base + offsets[0], dtype, shape)


def _check_order(file: str, extents: Mapping[str, Extent], base: int, size: int) -> None:
    end, before = base, "the header"
    for name, extent in extents.items():
        if extent.offset < end:
            raise CheckpointError(f"{file}: tensor {name} overlaps {before}.")
        if extent.offset > end:
            raise CheckpointError(f"{file}: there is a hole between {before} and tensor {name}.")
        end, before = extent.offset + extent.nbytes, f"tensor {name}"
    if size < end:
        raise CheckpointError(
            f"{file} is truncated.", got=f"{size} bytes", expected=end, fix="Copy or download the file again."
        )
    if size > end:
        raise CheckpointError(f"{file} has bytes behind its last tensor.", got=f"{size} bytes", expected=end)
