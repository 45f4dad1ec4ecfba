"""Element types as safetensors names them, their numpy carriers, and casts; bfloat16 travels as uint16."""

from __future__ import annotations

import numpy as np

from megatron_inherit.base.errors import CheckpointError, UsageError

CARRIERS: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}
"""The numpy type whose items have the element's size."""

WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
"""Types a weight may have; others (fp8, integers) are refused by the readers."""

_SHORT = {"fp32": "F32", "float32": "F32", "bf16": "BF16", "bfloat16": "BF16", "fp16": "F16", "float16": "F16"}
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Name of a weight type in torch, as ``config.json`` spells it."""


LARGEST = {"F64": 1.7976931348623157e308, "F32": 3.4028234663852886e38, "BF16": 3.3895313892515355e38, "F16": 65504.0}
"""Largest number of each weight type."""
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00}


def parse_dtype(text: str) -> str:
    """Reads a type as people write it (``bf16``, ``float32``, ``F16``).

    Raises:
        UsageError: It is no type a weight can have.
    """
    name = _SHORT.get(text.lower(), text.upper())
    if name not in ("F32", "BF16", "F16"):
        raise UsageError(f"{text!r} is not a dtype for weights.", expected="fp32, bf16 or fp16")
    return name


def cast(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """Casts carrier values between weight types, rounding to nearest even.

    Args:
        values: Array of ``CARRIERS[source]``.
        source: Type of the values.
        target: Type wanted.

    Returns:
        Array of ``CARRIERS[target]``; ``values`` itself where nothing changes.
    """
    if source == target:
        return values
    if source not in WEIGHT_DTYPES or target not in WEIGHT_DTYPES:
        raise CheckpointError(f"Elements of type {source} cannot be cast to {target}.")
    if target == "F64":
        return _to_float32(values, source).astype(np.float64)
    with np.errstate(over="ignore"):
        floats = values if source == "F64" and target == "F32" else _to_float32(values, source)
        return _to_bfloat16(floats) if target == "BF16" else floats.astype(CARRIERS[target])


def overflow(values: np.ndarray, source: str, result: np.ndarray, target: str) -> np.ndarray:
    """Gives the finite values that a cast made infinite.

    Args:
        values: What was cast, of ``CARRIERS[source]``.
        source: Its type.
        result: What ``cast`` gave.
        target: Its type.

    Returns:
        The values, one-dimensional float64; empty as a rule, for which the result is looked at and nothing else.
    """
    if LARGEST[source] <= LARGEST[target]:
        return np.empty(0)
    infinite = np.isinf(result) if target == "F32" else (result.view(np.uint16) & 0x7FFF) == _INFINITY[target]
    if not infinite.any():
        return np.empty(0)
    found = cast(values[infinite], source, "F64") if source != "F64" else values[infinite]
    return found[np.isfinite(found)]


def _to_float32(values: np.ndarray, source: str) -> np.ndarray:
    if source == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | np.uint32(0x40), rounded).astype(np.uint16)
