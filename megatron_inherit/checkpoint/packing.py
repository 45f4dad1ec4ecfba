"""Matrices of a learngene in less than their dense form: integers with scales, or two of every four values.

::

    int8   X.weight  I8 [rows, columns]                    X.scale   F32 [rows]
    int4   X.weight  U8 [rows, ceil(columns / 2)]          X.scale   F32 [rows]
    2:4    X.weight  float [rows, columns / 2]             X.places  U8 [rows, ceil(columns / 8)]

Two int4 codes, each plus 8, share a byte, the first one low. A value is its code times its row's scale, computed in
float64 and then rounded. Of four neighbours 2:4 stores two values, and half a byte says where they lie: two bits each,
the first place low; the other two are zero. ``config.json`` names form and type under ``sws_packing``. Norms, biases
and embeddings are stored as they are.
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
"""Field of ``config.json`` that holds ``form`` and ``dtype``."""
BESIDE = "beside:"
"""Before the name of a sink's tensor: where its scales or places go."""
_BITS = {"int8": 8, "int4": 4}
MADE_BY: Mapping[str, tuple[str, Mapping[str, int]]] = {
    **{form: ("quantise", {"bits": bits}) for form, bits in _BITS.items()},
    "2:4": ("prune", {"keep": 2, "of": 4}),
}
"""Form -> function of a plan, with its arguments, whose result it stores."""
_OFFSET = 8


class Packing(NamedTuple):
    """What matrices are packed as, and the type of the values that it stands for."""

    form: str
    dtype: str


class Packed(NamedTuple):
    """A matrix as it is stored.

    Attributes:
        weight: Codes, or the kept values in the carrier of their type.
        beside: Scales, or places.
        values: Dense, what readers get.
    """

    weight: np.ndarray
    beside: np.ndarray
    values: np.ndarray


def form_of(function: str, arguments: Mapping[str, int]) -> str | None:
    """Names the form that a plan's function is stored in, None where there is none."""
    return next((form for form, made in MADE_BY.items() if made == (function, dict(arguments))), None)


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


def largest_places(groups: np.ndarray, keep: int) -> np.ndarray:
    """Finds the largest magnitudes of each group, of equal ones the first.

    Args:
        groups: [rows, groups, size].
        keep: How many of a group.

    Returns:
        Their places, ascending, int64 [rows, groups, keep].
    """
    order = np.argsort(-np.abs(groups), axis=2, kind="stable")[:, :, :keep]
    return np.sort(order, axis=2)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Lays int8 codes [rows, columns] out as they are stored."""
    return codes if bits == 8 else _join_halves((codes + _OFFSET).astype(np.uint8), _OFFSET)


def unpack(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Gives int8 codes [rows, columns] of a stored array."""
    return packed.view(np.int8) if bits == 8 else _split_halves(packed, columns).astype(np.int8) - _OFFSET


def _join_halves(halves: np.ndarray, filler: int) -> np.ndarray:
    if halves.shape[1] % 2:
        halves = np.pad(halves, ((0, 0), (0, 1)), constant_values=filler)
    return halves[:, ::2] | (halves[:, 1::2] << 4)


def _split_halves(packed: np.ndarray, count: int) -> np.ndarray:
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)[:, :count]


def encode(values: np.ndarray, form: str, dtype: str) -> Packed:
    """Packs a matrix.

    Args:
        values: float64 [rows, columns], not yet rounded or pruned.
        form: A key of ``MADE_BY``; ``2:4`` needs columns in groups of four.
        dtype: Type of the values that it stands for.
    """
    if form in _BITS:
        codes, scales = quantise_rows(values, _BITS[form])
        return Packed(pack(codes, _BITS[form]), scales, cast(values_of(codes, scales), "F64", dtype))
    rows = len(values)
    groups = cast(values, "F64", dtype).reshape(rows, -1, 4)
    places = largest_places(values.reshape(rows, -1, 4), 2)
    kept = np.take_along_axis(groups, places, axis=2)
    dense = np.zeros_like(groups)
    np.put_along_axis(dense, places, kept, axis=2)
    halves = (places[:, :, 0] | places[:, :, 1] << 2).astype(np.uint8)
    return Packed(kept.reshape(rows, -1), _join_halves(halves, 0), dense.reshape(rows, -1))


def _decode(packing: Packing, weight: np.ndarray, beside: np.ndarray, columns: int) -> np.ndarray:
    """Gives rows of values, in their carrier, of the same rows of what is stored."""
    if packing.form in _BITS:
        return cast(values_of(unpack(weight, _BITS[packing.form], columns), beside), "F64", packing.dtype)
    halves = _split_halves(beside, columns // 4)
    places = np.stack((halves & 3, halves >> 2), axis=-1).astype(np.int64)
    dense = np.zeros((len(weight), columns // 4, 4), weight.dtype)
    np.put_along_axis(dense, places, weight.reshape(*places.shape), axis=2)
    return dense.reshape(len(weight), columns)


class Form(NamedTuple):
    """Name, type and shape of what is stored of a matrix."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def stored_forms(name: str, shape: tuple[int, ...], packing: Packing) -> tuple[Form, Form]:
    """Gives what is stored of ``X.weight``: itself, and ``X.scale`` or ``X.places`` beside it."""
    rows, columns = shape
    stem = name.removesuffix("weight")
    if packing.form == "2:4":
        return Form(name, packing.dtype, (rows, columns // 2)), Form(f"{stem}places", "U8", (rows, -(-columns // 8)))
    codes = Form(name, "I8", shape) if packing.form == "int8" else Form(name, "U8", (rows, -(-columns // 2)))
    return codes, Form(f"{stem}scale", "F32", (rows,))


def packing_of(raw: Mapping[str, Any], where: str) -> Packing | None:
    """Reads what is packed from a ``config.json``; None where nothing is.

    Raises:
        CheckpointError: They are none that this version reads.
    """
    found = raw.get(KEY)
    if found is None:
        return None
    form, dtype = (str(found.get(name)) if isinstance(found, Mapping) else "" for name in ("form", "dtype"))
    if form not in MADE_BY or dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{where}: {KEY} cannot be read.", got=found, expected=f"form {', '.join(MADE_BY)}, dtype F32 or BF16"
        )
    return Packing(form, dtype)


def is_packed(spec: TensorSpec) -> bool:
    """Tells whether packing takes a tensor: the matrices of blocks."""
    return spec.layer is not None and len(spec.shape) == 2


def packed_tensor(
    name: str, shape: tuple[int, ...], extents: Mapping[str, Extent], packing: Packing, pool: FilePool
) -> StoredTensor:
    """Describes a matrix that is decoded row by row when it is read.

    Args:
        name: Of the matrix.
        shape: Its shape.
        extents: Of all tensors in the file.
        packing: Form, and the type of the values.
        pool: Where scales and places are read, with their rows.

    Raises:
        CheckpointError: What should be stored is missing, or does not fit the matrix.
    """
    forms = stored_forms(name, shape, packing)
    found = [extents.get(form.name) for form in forms]
    for form, extent in zip(forms, found, strict=True):
        if extent is None:
            raise CheckpointError(f"{name} is packed, and {form.name} is missing.")
        if (extent.dtype, extent.shape) != (form.dtype, form.shape):
            raise CheckpointError(
                f"{extent.file}: {form.name} is no part of a packed matrix of {list(shape)}.",
                got=f"{extent.dtype} {list(extent.shape)}",
                expected=f"{form.dtype} {list(form.shape)}",
            )
    main, side = (extent for extent in found if extent is not None)
    beside = StoredTensor(side.shape, side.dtype, whole(side))

    def apply(rows: np.ndarray, first: int) -> np.ndarray:
        start = (first, *(0,) * (len(side.shape) - 1))
        return _decode(packing, rows, read_box(pool, beside, start, (len(rows), *side.shape[1:])), shape[1])

    decode = Decode(
        "unpack", {"form": packing.form}, main.shape, main.dtype, apply, positional=True, beside_bytes=side.nbytes
    )
    return StoredTensor(shape, packing.dtype, whole(main), decode)
