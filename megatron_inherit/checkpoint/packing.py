"""Matrices of a learngene as integers: codes of 8 or 4 bits and one fp32 scale a row, dense safetensors tensors.

::

    X.weight   I8 [rows, columns], or U8 [rows, ceil(columns / 2)]: two codes a byte, each plus 8, the first one low
    X.scale    F32 [rows]

A value is its code times its row's scale, computed in float64 and then rounded to the type that ``config.json`` names
under ``sws_packing``, with the number of bits. Norms, biases and embeddings are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from megatron_inherit.arch.tensors import TensorSpec
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.dtypes import WEIGHT_DTYPES, cast
from megatron_inherit.checkpoint.extents import Extent, whole
from megatron_inherit.checkpoint.files import FilePool
from megatron_inherit.checkpoint.stream import Decode, StoredTensor, read_box

KEY = "sws_packing"
"""Field of ``config.json`` that holds ``bits`` and ``dtype``."""
SCALES = "scale:"
"""Before the name of a sink's tensor: where its scales go."""
BITS = (8, 4)
_OFFSET = 8


class Packing(NamedTuple):
    """Bits of a code, and the type of the values that codes stand for."""

    bits: int
    dtype: str


def quantise_rows(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounds each row to ``2**bits - 1`` symmetric levels, the largest magnitude to the last one.

    Args:
        values: float64 [rows, columns].
        bits: 8 or 4.

    Returns:
        int8 codes [rows, columns] and float32 scales [rows], 1 for a row of zeros.
    """
    limit = 2 ** (bits - 1) - 1
    scales = (np.abs(values).max(axis=-1) / limit).astype(np.float32)
    scales[scales == 0] = 1.0
    codes = np.round(values / scales.astype(np.float64)[:, None])
    return np.clip(codes, -limit, limit).astype(np.int8), scales


def values_of(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Gives the float64 values [rows, columns] of codes and scales."""
    return codes.astype(np.float64) * scales.astype(np.float64)[:, None]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Lays int8 codes [rows, columns] out as they are stored."""
    if bits == 8:
        return codes
    shifted = (codes + _OFFSET).astype(np.uint8)
    if shifted.shape[1] % 2:
        shifted = np.pad(shifted, ((0, 0), (0, 1)), constant_values=_OFFSET)
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)


def unpack(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Gives int8 codes [rows, columns] of a stored array."""
    if bits == 8:
        return packed.view(np.int8)
    both = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)[:, :columns]
    return both.astype(np.int8) - _OFFSET


def stored_form(bits: int, shape: tuple[int, ...]) -> tuple[str, tuple[int, int]]:
    """Gives type and shape of the stored codes of a matrix."""
    rows, columns = shape
    return ("I8", (rows, columns)) if bits == 8 else ("U8", (rows, -(-columns // 2)))


def scale_name(name: str) -> str:
    """Names the scales of ``X.weight``: ``X.scale``."""
    return f"{name.removesuffix('weight')}scale"


def packing_of(raw: Mapping[str, Any], where: str) -> Packing | None:
    """Reads what is packed from a ``config.json``; None where nothing is.

    Raises:
        CheckpointError: They are none that this version reads.
    """
    found = raw.get(KEY)
    if found is None:
        return None
    bits, dtype = (found.get("bits"), found.get("dtype")) if isinstance(found, Mapping) else (None, None)
    if bits not in BITS or dtype not in WEIGHT_DTYPES:
        raise CheckpointError(f"{where}: {KEY} cannot be read.", got=found, expected="bits 8 or 4, dtype F32 or BF16")
    return Packing(bits, dtype)


def is_packed(spec: TensorSpec) -> bool:
    """Tells whether packing takes a tensor: the matrices of blocks."""
    return spec.layer is not None and len(spec.shape) == 2


def packed_tensor(
    name: str, shape: tuple[int, ...], extents: Mapping[str, Extent], packing: Packing, pool: FilePool
) -> StoredTensor:
    """Describes a matrix that is decoded row by row when it is read.

    Args:
        name: Of the codes.
        shape: Of the matrix.
        extents: Of all tensors in the file.
        packing: Bits, and the type of the values.
        pool: Where the scales are read, now.

    Raises:
        CheckpointError: Codes or scales are missing, or do not fit the matrix.
    """
    codes, scales = extents.get(name), extents.get(scale_name(name))
    kind, size = stored_form(packing.bits, shape)
    if codes is None or scales is None:
        raise CheckpointError(f"{name} is packed, and its codes or scales are missing.")
    if (codes.dtype, codes.shape, scales.dtype, scales.shape) != (kind, size, "F32", shape[:1]):
        raise CheckpointError(
            f"{codes.file}: {name} and its scales are no packed matrix of {list(shape)}.",
            got=f"{codes.dtype} {list(codes.shape)}, {scales.dtype} {list(scales.shape)}",
            expected=f"{kind} {list(size)}, F32 {[shape[0]]}",
        )
    steps = read_box(pool, StoredTensor(scales.shape, "F32", whole(scales)), (0,), scales.shape)

    def apply(rows: np.ndarray, first: int) -> np.ndarray:
        values = values_of(unpack(rows, packing.bits, shape[1]), steps[first : first + len(rows)])
        return cast(values, "F64", packing.dtype)

    decode = Decode("dequantise", {"bits": packing.bits}, size, kind, apply, positional=True)
    return StoredTensor(shape, packing.dtype, whole(codes), decode)
