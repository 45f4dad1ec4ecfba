"""Compares two checkpoints canonical tensor by canonical tensor, byte for byte, whatever their formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.checkpoint.dtypes import CARRIERS, cast
from megatron_inherit.checkpoint.extents import Shape
from megatron_inherit.checkpoint.gather import row_major
from megatron_inherit.checkpoint.manifest import TensorHash, hash_source, row_tiles
from megatron_inherit.checkpoint.stream import Source, read_box

_FUNCTION = ("num_heads", "num_kv_heads", "norm_eps", "rope", "sliding_window", "attn_scale_by_layer", "residual")


@dataclass(frozen=True)
class Difference:
    """Where two checkpoints differ.

    Attributes:
        tensor: Canonical name.
        what: ``missing``, ``shape``, ``dtype``, ``hash`` or ``values``.
        left, right: The two shapes, types or values.
        element: Index of the first differing element, for values.
        count: How many elements differ, for values.
        largest: Largest absolute difference, for values.
    """

    tensor: str
    what: str
    left: str
    right: str
    element: Shape | None = None
    count: int = 0
    largest: float = 0.0

    def describe(self) -> str:
        """Says it in one line."""
        if self.what == "values" and self.element is not None:
            at = ", ".join(map(str, self.element))
            return (
                f"{self.tensor}[{at}]: {self.left} and {self.right}; {self.count} elements differ, "
                f"by {self.largest:.4g} at most"
            )
        return f"{self.tensor}: {self.what} {self.left} and {self.right}"


def compare(
    left: Source, right: Source, *, sources: Mapping[str, str] | None = None, threads: int = 4
) -> list[Difference]:
    """Compares all weights; the first difference of each tensor is given, in the order of the model.

    A tied head is compared with a stored one: a model is the same whether the copy is in the file or not.

    Args:
        left: One checkpoint, the teacher where the other is its student.
        right: The other.
        sources: The teacher's tensor for each of the student's that shall be compared, after a cast where the types
            differ; default: all tensors of both, each with that of its own name and type.
        threads: Tensors compared at once.
    """
    if sources is None:
        pairs = [(name, name) for name in dict.fromkeys([*left.tensors, *right.tensors])]
    else:
        pairs = [(origin, name) for name, origin in sources.items()]
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(lambda pair: _compare_tensor(left, right, *pair, casts=sources is not None), pairs)
        return [found for found in results if found is not None]


def compare_configs(left: ModelConfig, right: ModelConfig) -> list[Difference]:
    """Compares what tensors do not show and the function depends on: heads, norms, rotary positions, window."""
    mine, other = dataclasses.asdict(left), dataclasses.asdict(right)
    return [
        Difference(f"config {name}", "values", str(mine[name]), str(other[name]))
        for name in _FUNCTION
        if mine[name] != other[name]
    ]


def compare_manifest(source: Source, hashes: Mapping[str, TensorHash]) -> list[Difference]:
    """Compares the hashes of all weights with those of a manifest."""
    found = hash_source(source)
    differences = []
    for name in dict.fromkeys([*found, *(key for key in hashes if ":" not in key)]):
        mine, other = found.get(name), hashes.get(name)
        if mine is None or other is None:
            differences.append(Difference(name, "missing", _state(mine), _state(other)))
        elif mine != other:
            differences.append(Difference(name, "hash", f"{mine.dtype} {mine.xxh3}", f"{other.dtype} {other.xxh3}"))
    return differences


def _compare_tensor(left: Source, right: Source, origin: str, name: str, *, casts: bool) -> Difference | None:
    ours, theirs = left.tensors.get(_actual(left, origin)), right.tensors.get(_actual(right, name))
    if ours is None or theirs is None:
        return Difference(name, "missing", _state(ours), _state(theirs))
    if ours.shape != theirs.shape:
        return Difference(name, "shape", str(list(ours.shape)), str(list(theirs.shape)))
    if ours.dtype != theirs.dtype and not casts:
        return Difference(name, "dtype", ours.dtype, theirs.dtype)
    first: tuple[Shape, str, str] | None = None
    count, largest = 0, 0.0
    for start, shape in row_tiles(ours, theirs):
        mine = row_major(cast(read_box(left.pool, ours, start, shape), ours.dtype, theirs.dtype))
        other = row_major(read_box(right.pool, theirs, start, shape))
        bits = np.dtype(f"u{CARRIERS[theirs.dtype].itemsize}")
        differing = mine.view(bits) != other.view(bits)
        if not differing.any():
            continue
        a, b = (cast(values[differing], theirs.dtype, "F64") for values in (mine, other))
        if first is None:
            where = np.unravel_index(int(differing.argmax()), differing.shape)
            index = tuple(int(at) + low for at, low in zip(where, start, strict=True))
            first = (index, f"{a[0]:.9g}", f"{b[0]:.9g}")
        count += int(differing.sum())
        with np.errstate(invalid="ignore"):
            largest = max(largest, float(np.abs(a - b).max()))
    if first is None:
        return None
    return Difference(name, "values", first[1], first[2], first[0], count, largest)


def _actual(source: Source, name: str) -> str:
    return "embed.weight" if name == "head.weight" and source.config.tied else name


def _state(one: object) -> str:
    return "absent" if one is None else "present"
