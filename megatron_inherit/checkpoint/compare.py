"""Compares two checkpoints canonical tensor by canonical tensor, byte for byte, whatever their formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.dtypes import CARRIERS, cast
from megatron_inherit.checkpoint.extents import ITEM_SIZES, Shape
from megatron_inherit.checkpoint.gather import row_major
from megatron_inherit.checkpoint.manifest import TensorHash, hash_source, row_tiles
from megatron_inherit.checkpoint.stream import Source, StoredTensor, read_box

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


def pairs_of(
    left: Source, right: Source, *, sources: Mapping[str, str] | None = None, optimizer: bool = False
) -> list[tuple[str, str]]:
    """Says what is compared with what: keys of the left checkpoint and of the right one.

    Args:
        left: One checkpoint.
        right: The other.
        sources: As ``compare`` takes them.
        optimizer: The optimizer state of these tensors too.

    Raises:
        CheckpointError: Optimizer state is to be compared and one of the two has none that can be read.
    """
    names = dict.fromkeys([*left.tensors, *right.tensors])
    origins = {name: name for name in names} if sources is None else sources
    pairs = [(origin, name) for name, origin in origins.items()]
    if optimizer:
        kinds = dict.fromkeys([*_kinds(left), *_kinds(right)])
        with_state = {name: origin for name, origin in origins.items() if _actual(right, name) == name}
        pairs += [(f"{kind}:{origin}", f"{kind}:{name}") for kind in kinds for name, origin in with_state.items()]
    return pairs


def compare(
    left: Source,
    right: Source,
    *,
    sources: Mapping[str, str] | None = None,
    optimizer: bool = False,
    threads: int = 4,
) -> list[Difference]:
    """Compares all weights; the first difference of each tensor is given, in the order of the model.

    A tied head is compared with a stored one: a model is the same whether the copy is in the file or not.

    Args:
        left: One checkpoint, the teacher where the other is its student.
        right: The other.
        sources: The teacher's tensor for each of the student's that shall be compared, after a cast where the types
            differ; default: all tensors of both, each with that of its own name and type.
        optimizer: Compares fp32 weights and moments too. Weights that a checkpoint has as fp32 weights alone are then
            rounded to the type of the others.
        threads: Tensors compared at once.

    Raises:
        CheckpointError: Optimizer state is to be compared and one of the two has none that can be read.
    """
    pairs = pairs_of(left, right, sources=sources, optimizer=optimizer)

    def one(pair: tuple[str, str]) -> Difference | None:
        return _compare_tensor(left, right, *pair, casts=sources is not None, rounds=optimizer)

    with ThreadPoolExecutor(threads) as pool:
        return [found for found in pool.map(one, pairs) if found is not None]


def compare_configs(left: ModelConfig, right: ModelConfig) -> list[Difference]:
    """Compares what tensors do not show and the function depends on: heads, norms, rotary positions, window."""
    mine, other = dataclasses.asdict(left), dataclasses.asdict(right)
    return [
        Difference(f"config {name}", "values", str(mine[name]), str(other[name]))
        for name in _FUNCTION
        if mine[name] != other[name]
    ]


def compare_optimizers(left: Source, right: Source) -> list[Difference]:
    """Compares what stands beside the moments: the number of updates and Adam's settings, where both tell them."""
    facts = {"updates": ("optimizer_step", "iteration"), "betas and epsilon": ("adam",)}
    differences = []
    for what, keys in facts.items():
        mine, other = (next((one.details[key] for key in keys if one.details.get(key)), None) for one in (left, right))
        if mine and other and (tuple(mine) != tuple(other) if what != "updates" else int(mine) != int(other)):
            differences.append(Difference(f"optimizer {what}", "values", str(mine), str(other)))
    return differences


def compare_manifest(source: Source, hashes: Mapping[str, TensorHash], *, optimizer: bool = False) -> list[Difference]:
    """Compares the hashes of all weights with those of a manifest.

    Args:
        source: The checkpoint.
        hashes: The manifest's.
        optimizer: Compares those of fp32 weights and moments too.

    Raises:
        CheckpointError: Optimizer state is to be compared and one of the two has none.
    """
    if optimizer:
        _kinds(source)
        if not any(":" in key for key in hashes):
            raise CheckpointError("The manifest has no hashes of optimizer state.", fix="Leave --optimizer out.")
    found = hash_source(source, [*source.tensors, *(source.optimizer if optimizer else ())])
    differences = []
    for name in dict.fromkeys([*found, *(key for key in hashes if optimizer or ":" not in key)]):
        mine, other = found.get(name), hashes.get(name)
        if mine is None or other is None:
            differences.append(Difference(name, "missing", _state(mine), _state(other)))
        elif mine != other:
            differences.append(Difference(name, "hash", f"{mine.dtype} {mine.xxh3}", f"{other.dtype} {other.xxh3}"))
    return differences


def _compare_tensor(
    left: Source, right: Source, origin: str, name: str, *, casts: bool, rounds: bool
) -> Difference | None:
    ours, theirs = _find(left, origin), _find(right, name)
    if ours is None or theirs is None:
        return Difference(name, "missing", _state(ours), _state(theirs))
    if ours.shape != theirs.shape:
        return Difference(name, "shape", str(list(ours.shape)), str(list(theirs.shape)))
    common = theirs.dtype
    if rounds and (_is_master(left, origin) or _is_master(right, name)):
        common = min(ours.dtype, theirs.dtype, key=ITEM_SIZES.__getitem__)
    elif ours.dtype != theirs.dtype and not (casts and ":" not in name):
        return Difference(name, "dtype", ours.dtype, theirs.dtype)
    first: tuple[Shape, str, str] | None = None
    count, largest = 0, 0.0
    for start, shape in row_tiles(ours, theirs):
        mine = row_major(cast(read_box(left.pool, ours, start, shape), ours.dtype, common))
        other = row_major(cast(read_box(right.pool, theirs, start, shape), theirs.dtype, common))
        bits = np.dtype(f"u{CARRIERS[common].itemsize}")
        differing = mine.view(bits) != other.view(bits)
        if not differing.any():
            continue
        a, b = (cast(values[differing], common, "F64") for values in (mine, other))
        if first is None:
            where = np.unravel_index(int(differing.argmax()), differing.shape)
            index = tuple(int(at) + low for at, low in zip(where, start, strict=True))
            first = (index, f"{a[0]:.9g}", f"{b[0]:.9g}")
        count += int(differing.sum())
        with np.errstate(invalid="ignore"):
            largest = float(np.maximum(largest, np.abs(a - b).max()))
    if first is None:
        return None
    return Difference(name, "values", first[1], first[2], first[0], count, largest)


def _find(source: Source, key: str) -> StoredTensor | None:
    """Gives a tensor; of a model that is trained in fp32 the weights are the fp32 weights."""
    kind, _, name = key.rpartition(":")
    found = source.optimizer.get(key) if kind else source.tensors.get(_actual(source, name))
    weight = source.tensors.get(name)
    return weight if found is None and kind == "fp32" and weight is not None and weight.dtype == "F32" else found


def _is_master(source: Source, name: str) -> bool:
    """Tells whether a checkpoint holds a weight as the optimizer's fp32 weight alone."""
    weight = source.tensors.get(name)
    return weight is not None and weight is source.optimizer.get(f"fp32:{name}")


def _kinds(source: Source) -> list[str]:
    """Lists the kinds of optimizer state of a checkpoint.

    Raises:
        CheckpointError: It has none that can be read.
    """
    found = sorted({key.partition(":")[0] for key in source.optimizer})
    if not found:
        raise CheckpointError(
            f"{source.path} ({source.format}) has no optimizer state that can be compared.",
            fix=str(source.details.get("optimizer_note") or "Leave --optimizer out."),
        )
    return found


def _actual(source: Source, name: str) -> str:
    return "embed.weight" if name == "head.weight" and source.config.tied else name


def _state(one: object) -> str:
    return "absent" if one is None else "present"
