"""The named pure functions a plan may ask for: arrays in, one array out, the same result for the same input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_inherit.base.errors import PlanError

if TYPE_CHECKING:
    import numpy

Function = Callable[..., "numpy.ndarray"]


def scale(tensors: Sequence[numpy.ndarray], *, factor: float) -> numpy.ndarray:
    """Multiplies a tensor by a number."""
    return tensors[0] * factor


def mean(tensors: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """Averages tensors of one shape."""
    total = tensors[0].copy()
    for tensor in tensors[1:]:
        total += tensor
    return total / len(tensors)


def weighted_sum(tensors: Sequence[numpy.ndarray], *, weights: Sequence[float]) -> numpy.ndarray:
    """Adds tensors of one shape, each times its weight (interpolation of blocks, DeLIGHT-style initialisation)."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight
    return total


def index(tensors: Sequence[numpy.ndarray], *, axis: int, indices: Sequence[int]) -> numpy.ndarray:
    """Takes indices along an axis (chosen heads, channels or tokens)."""
    return tensors[0].take(indices, axis=axis)


def take(
    tensors: Sequence[numpy.ndarray], *, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None
) -> numpy.ndarray:
    """Takes chosen rows, and of these chosen columns (a narrower matrix); None takes all."""
    taken = tensors[0] if rows is None else tensors[0].take(rows, axis=0)
    return taken if columns is None else taken.take(columns, axis=1)


def low_rank(tensors: Sequence[numpy.ndarray], *, rank: int) -> numpy.ndarray:
    """Gives the best approximation of a rank in the Frobenius norm (truncated SVD)."""
    import numpy as np

    left, values, right = np.linalg.svd(tensors[0], full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def quantise(tensors: Sequence[numpy.ndarray], *, bits: int) -> numpy.ndarray:
    """Rounds each row to ``2**bits - 1`` symmetric levels and gives the values back (round to nearest, scale a row)."""
    from megatron_inherit.checkpoint.packing import quantise_rows, values_of

    return values_of(*quantise_rows(tensors[0], bits))


def prune(tensors: Sequence[numpy.ndarray], *, keep: int, of: int) -> numpy.ndarray:
    """Zeroes all but the ``keep`` largest magnitudes of every ``of`` neighbours in a row (2:4 is what GPUs speed up).

    Of equal magnitudes the first is kept.
    """
    import numpy as np

    from megatron_inherit.checkpoint.packing import largest_places

    rows, columns = tensors[0].shape
    if columns % of:
        raise PlanError(f"{keep}:{of} pruning needs columns in groups of {of}.", got=columns)
    groups = tensors[0].reshape(rows, columns // of, of)
    mask = np.zeros(groups.shape, dtype=bool)
    np.put_along_axis(mask, largest_places(groups, keep), True, axis=2)
    return np.where(mask, groups, 0.0).reshape(rows, columns)


FUNCTIONS: dict[str, Function] = {
    "scale": scale,
    "mean": mean,
    "weighted_sum": weighted_sum,
    "index": index,
    "take": take,
    "low_rank": low_rank,
    "quantise": quantise,
    "prune": prune,
}
"""Name in a plan -> function of float64 arrays."""


def function(name: str) -> Function:
    """Looks a function up.

    Raises:
        PlanError: There is none of that name.
    """
    if name not in FUNCTIONS:
        raise PlanError(f"Unknown function {name!r} in a plan.", expected=f"one of {', '.join(FUNCTIONS)}")
    return FUNCTIONS[name]


def apply(name: str, tensors: Sequence[numpy.ndarray], arguments: dict[str, Any]) -> numpy.ndarray:
    """Runs a function on float64 arrays."""
    return function(name)(tensors, **arguments)
