"""How formats store canonical tensors: tables of rows, and the reversible index maps that the rows name.

A format is a tuple of ``LayoutRow``. ``physical_tensors`` expands it for a model; ``PhysicalTensor.map`` turns the
pieces of a stored tensor into pieces of the canonical tensors it holds. The same map serves reading and writing, as it
only says which element is which.

Reading, in a format's ``open_source``::

    for tensor in physical_tensors(ROWS, config):
        stored = stack([extent_of(tensor.name, rank) for rank in range(tp)], tensor.split_axis)
        pieces.update(tensor.map(stored, tp=tp))

Writing is the same with extents that the sink has laid out, of shape ``tensor.shard_shape(tp)``.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import TensorSpec, tensor_table
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.extents import Extent, Piece, Shape

Fuse = Literal["one", "concat", "concat_per_shard", "qkv", "qkv_v0", "qkv_v1", "rope_interleaved"]
"""How the rows of the parts lie on axis 0 of the stored tensor, the shards of tensor parallelism put one below another.

``one``: a single part, in order. ``concat``: part after part (GPT-2 c_attn, gate and up of torch_dist).
``concat_per_shard``: part after part within each of the tp shards (gate and up of Megatron). ``qkv``: per group its
query heads, its key head, its value head (Megatron checkpoint_version 2 and 3, Megatron-Core). ``qkv_v0`` and
``qkv_v1``: per shard [3, heads, d] and [heads, d, 3] (Megatron checkpoint_version 0 and 1, no grouped queries).
``rope_interleaved``: one part whose heads hold the two rotated halves alternately (Meta).
"""

_MAX_CANDIDATES = 2000
_AXIS = {"vocab": 0, "column": 0, "row": 1, "none": None}


@dataclass(frozen=True)
class LayoutRow:
    """One kind of stored tensor.

    Attributes:
        physical: The format's name; ``{i}`` stands for the layer.
        parts: Canonical names it holds, with ``layers.{i}.`` for those of a block.
        fuse: How the parts' rows are arranged.
        transpose: It is stored [in, out].
        axis: Axis that tensor parallelism cuts, where the format does not follow ``arch.families``; ``"family"`` does.
    """

    physical: str
    parts: tuple[str, ...]
    fuse: Fuse = "one"
    transpose: bool = False
    axis: int | Literal["family"] | None = "family"


@dataclass(frozen=True)
class Run:
    """Canonical rows ``[start, start + length)`` lie at stored rows ``at, at + step, ...``."""

    start: int
    length: int
    at: int
    step: int = 1


@dataclass(frozen=True)
class PhysicalTensor:
    """A stored tensor of one model.

    Attributes:
        name: Its name with the global layer index; a format with stage-local indices formats ``row.physical`` itself.
        row: Its row of the table.
        layer: Global index of its block, or None.
        parts: The canonical tensors it holds, in order.
        config: The model.
    """

    name: str
    row: LayoutRow
    layer: int | None
    parts: tuple[TensorSpec, ...]
    config: ModelConfig

    @property
    def split_axis(self) -> int | None:
        """Axis (before any transposition) that tensor parallelism cuts, None where every rank has all of it."""
        return _AXIS[self.parts[0].split] if self.row.axis == "family" else self.row.axis

    @property
    def is_vocab(self) -> bool:
        """Tells whether axis 0 is the vocabulary and may be padded."""
        return self.parts[0].split == "vocab"

    def shape(self, *, padded_vocab: int | None = None) -> Shape:
        """Gives the shape as stored, all shards together.

        Args:
            padded_vocab: Rows of a vocabulary tensor; default the true size.
        """
        rows = sum(part.shape[0] for part in self.parts)
        if self.is_vocab and padded_vocab is not None:
            rows = padded_vocab
        shape = (rows, *self.parts[0].shape[1:])
        return shape[::-1] if self.row.transpose else shape

    def shard_shape(self, tp: int, *, padded_vocab: int | None = None) -> Shape:
        """Gives the shape of one rank's shard.

        Raises:
            CheckpointError: The axis is not divisible by ``tp``.
        """
        shape = self.shape(padded_vocab=padded_vocab)
        axis = self.split_axis
        if axis is None or tp == 1:
            return shape
        if self.row.transpose:
            axis = len(shape) - 1 - axis
        if shape[axis] % tp or any(part.shape[0] % tp for part in self.parts if self.row.fuse == "concat_per_shard"):
            raise CheckpointError(
                f"{self.name} cannot be cut in {tp} tensor-parallel shards.",
                got=f"{shape} along axis {axis}",
                fix="Choose a tensor-parallel size that divides the model's heads x head size and its MLP width.",
            )
        return (*shape[:axis], shape[axis] // tp, *shape[axis + 1 :])

    def map(self, pieces: Iterable[Piece], *, tp: int = 1) -> dict[str, tuple[Piece, ...]]:
        """Translates pieces of the stored tensor into pieces of its canonical tensors.

        Args:
            pieces: Boxes of the stored tensor, all shards together (``stack`` makes them of shards). Replicas may
                overlap; a source passes one of them, a sink all.
            tp: Number of shards, which the arrangements "per shard" depend on.
        """
        stored = list(pieces)
        if self.row.transpose:
            stored = [Piece(piece.start[::-1], piece.extent.transposed()) for piece in stored]
        found: dict[str, tuple[Piece, ...]] = {}
        for index, part in enumerate(self.parts):
            runs = _runs(self, index, tp if self.split_axis == 0 else 1)
            found[part.name] = tuple(taken for piece in stored for run in runs if (taken := _take(piece, run)))
        return found


def physical_tensors(rows: Sequence[LayoutRow], config: ModelConfig) -> Iterator[PhysicalTensor]:
    """Expands a format's table for a model, in the table's order, block by block.

    Raises:
        CheckpointError: The table has no place for a tensor of the model.
    """
    table = tensor_table(config)
    inside = [row for row in rows if "{i}" in row.parts[0]]
    first = rows.index(inside[0]) if inside else len(rows)
    order: list[tuple[LayoutRow, int | None]] = [(row, None) for row in rows[:first]]
    order += [(row, layer) for layer in range(config.num_layers) for row in inside]
    order += [(row, None) for row in rows[first:] if row not in inside]
    stored: set[str] = set()
    for row, layer in order:
        names = [name if layer is None else name.replace("{i}", str(layer)) for name in row.parts]
        present = [table[name] for name in names if name in table]
        if len(present) != len(names):
            continue
        stored.update(names)
        name = row.physical if layer is None else row.physical.replace("{i}", str(layer))
        yield PhysicalTensor(name, row, layer, tuple(present), config)
    homeless = [name for name in table if name not in stored]
    if homeless:
        raise CheckpointError(f"This format has no place for {homeless[0]} of a {config.family} model.")


def stack(shards: Sequence[Extent], axis: int | None) -> tuple[Piece, ...]:
    """Puts the shards of tensor-parallel ranks together along an axis; replicas (axis None) lie on one another."""
    pieces, at = [], 0
    for shard in shards:
        start = [0] * len(shard.shape)
        if axis is not None:
            start[axis] = at
            at += shard.shape[axis]
        pieces.append(Piece(tuple(start), shard))
    return tuple(pieces)


def take_layer(pieces: Iterable[Piece], layer: int) -> tuple[Piece, ...]:
    """Takes one layer of a stored tensor whose axis 0 counts layers."""
    taken = []
    for piece in pieces:
        if piece.start[0] <= layer < piece.start[0] + piece.shape[0]:
            taken.append(Piece(piece.start[1:], piece.extent.index(layer - piece.start[0])))
    return tuple(taken)


def padded_vocab_size(vocab_size: int, tp: int, multiple: int = 128) -> int:
    """Rounds a vocabulary up to a multiple of ``multiple * tp`` (Megatron's ``make_vocab_size_divisible_by``)."""
    unit = multiple * tp
    return -(-vocab_size // unit) * unit


@dataclass(frozen=True)
class Place:
    """Where a block is: pipeline rank, virtual chunk on it, and its index inside the chunk."""

    rank: int
    chunk: int
    index: int


def place_layers(
    num_layers: int, pp: int, vpp: int = 1, *, first: int | None = None, last: int | None = None
) -> tuple[Place, ...]:
    """Places blocks on pipeline stages: chunk c of rank r holds the blocks of global stage c * pp + r.

    Args:
        num_layers: Blocks of the model.
        pp: Pipeline size.
        vpp: Virtual chunks a rank.
        first: Blocks of the first stage, where it differs (``num_layers_in_first_pipeline_stage``).
        last: Blocks of the last stage, where it differs.

    Returns:
        One place a block.

    Raises:
        CheckpointError: The blocks cannot be shared out evenly.
    """
    rest = num_layers - (first or 0) - (last or 0)
    ranks = pp - (first is not None) - (last is not None)
    if rest < 0 or (ranks * vpp and rest % (ranks * vpp)) or (not ranks and rest):
        fitting = [size for size in range(1, num_layers + 1) if num_layers % (size * vpp) == 0]
        nearest = sorted({num_layers // (pp * vpp) * pp * vpp, -(-num_layers // (pp * vpp)) * pp * vpp} - {0})
        raise CheckpointError(
            f"{num_layers} layers cannot be shared out over {pp} pipeline stages of {vpp} chunks.",
            fix=f"Use a pipeline size of {fitting}, or a depth of {' or '.join(map(str, nearest))}.",
        )
    if (first is not None or last is not None) and vpp > 1:
        raise CheckpointError("Uneven pipeline stages with virtual chunks are not supported.")
    each = rest // (ranks * vpp) if ranks else 0
    counts = [each] * (pp * vpp)
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    return tuple(Place(stage % pp, stage // pp, index) for stage, count in enumerate(counts) for index in range(count))


def check_names(
    found: Iterable[str], expected: Iterable[str], *, where: str, ignored: Sequence[str] = (), config: ModelConfig
) -> None:
    """Compares the stored names with the table both ways.

    Args:
        found: Names in the checkpoint.
        expected: Names of the table for this model.
        where: Path for the message.
        ignored: Regular expressions (full match) of stored names without a canonical counterpart.
        config: The model, for the message.

    Raises:
        CheckpointError: A name is missing or unknown; the message names it and the nearest one.
    """
    have, want = set(found), list(expected)
    missing = [name for name in want if name not in have]
    unknown = sorted(name for name in have - set(want) if not any(re.fullmatch(rule, name) for rule in ignored))
    if missing:
        near = difflib.get_close_matches(missing[0], (unknown or sorted(have))[:_MAX_CANDIDATES], n=1)
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{where}: tensor {missing[0]}{more} of a {config.num_layers}-layer {config.family} model is missing.",
            fix=f"The nearest name found is {near[0]}." if near else "",
        )
    if unknown:
        near = difflib.get_close_matches(unknown[0], want[:_MAX_CANDIDATES], n=1)
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{where}: tensor {unknown[0]}{more} has no place in a {config.num_layers}-layer {config.family} model.",
            fix=f"The nearest known name is {near[0]}." if near else "Nothing is left out silently: remove it first.",
        )


def check_shape(name: str, found: Sequence[int], expected: Sequence[int], *, where: str) -> None:
    """Raises CheckpointError, naming file and tensor, where a stored shape is not the expected one."""
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{where}: tensor {name} has the wrong shape for its configuration.",
            got=list(found),
            expected=list(expected),
        )


def with_axis(rows: Sequence[LayoutRow], axes: Mapping[str, int | None]) -> tuple[LayoutRow, ...]:
    """Gives a table in which the named physical patterns are cut along another axis (dialects of one format)."""
    return tuple(dataclasses.replace(row, axis=axes.get(row.physical, row.axis)) for row in rows)


def _take(piece: Piece, run: Run) -> Piece | None:
    """Gives the rows of a run that a stored piece holds, at their canonical place."""
    low, high = piece.start[0], piece.start[0] + piece.shape[0]
    first = max(0, -(-(low - run.at) // run.step))
    stop = min(run.length, -(-(high - run.at) // run.step))
    if first >= stop:
        return None
    at = run.at + first * run.step - low
    return Piece((run.start + first, *piece.start[1:]), piece.extent.steps(0, at, stop - first, run.step))


def _runs(tensor: PhysicalTensor, index: int, tp: int) -> list[Run]:
    """Says where the rows of one part lie on axis 0 of the stored tensor."""
    sizes = [part.shape[0] for part in tensor.parts]
    fuse, config = tensor.row.fuse, tensor.config
    if fuse == "qkv":
        return _qkv_runs(index, config)
    if fuse == "rope_interleaved":
        half = config.head_dim // 2
        return [
            Run(head * 2 * half + side * half, half, head * 2 * half + side, 2)
            for head in range(sizes[0] // (2 * half))
            for side in range(2)
        ]
    if fuse == "qkv_v0":
        return _per_shard_runs(sizes, index, tp)
    if fuse == "qkv_v1":
        return [Run(0, sizes[0], index, 3)]
    if fuse == "concat_per_shard":
        return _per_shard_runs(sizes, index, tp)
    return [Run(0, sizes[index], sum(sizes[:index]))]


def _per_shard_runs(sizes: Sequence[int], index: int, tp: int) -> list[Run]:
    shard, before, own = sum(sizes) // tp, sum(sizes[:index]) // tp, sizes[index] // tp
    return [Run(rank * own, own, rank * shard + before) for rank in range(tp)]


def _qkv_runs(index: int, config: ModelConfig) -> list[Run]:
    dim, groups = config.head_dim, config.num_kv_heads
    queries = config.num_heads // groups * dim
    rows, before = ((queries, 0), (dim, queries), (dim, queries + dim))[index]
    return [Run(group * rows, rows, group * (queries + 2 * dim) + before) for group in range(groups)]
