"""From named arrays of tensor-parallel ranks to canonical tensors, for every format that has tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.dtypes import WEIGHT_DTYPES
from megatron_inherit.checkpoint.extents import Extent, Piece, check_cover, whole
from megatron_inherit.checkpoint.files import FilePool
from megatron_inherit.checkpoint.layout import (
    LayoutRow,
    PhysicalTensor,
    check_names,
    check_shape,
    physical_tensors,
)
from megatron_inherit.checkpoint.stream import StoredTensor, read_box


def bind_tensors(
    config: ModelConfig,
    rows: Sequence[LayoutRow],
    ranks: Sequence[Mapping[str, Extent]],
    *,
    where: str,
    ignored: Sequence[str] = (),
) -> dict[str, StoredTensor]:
    """Makes the canonical tensors of a model whose shards are given rank by rank.

    Args:
        config: The model.
        rows: The format's table.
        ranks: Stored arrays of each tensor-parallel rank by name with global layer numbers.
        where: Path for messages.
        ignored: Regular expressions of names without a counterpart.

    Raises:
        CheckpointError: A tensor is missing, unknown, of the wrong shape or of a type no weight has.
    """
    wanted = list(physical_tensors(rows, config))
    for number, rank in enumerate(ranks):
        place = where if len(ranks) == 1 else f"{where} (tensor-parallel rank {number})"
        check_names(rank, (tensor.name for tensor in wanted), where=place, ignored=ignored, config=config)
    tensors: dict[str, StoredTensor] = {}
    for tensor in wanted:
        tensors.update(bind_shards(tensor, [rank[tensor.name] for rank in ranks]))
    return in_order(config, tensors)


def in_order(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Sorts the tensors of a model as ``enumerate_tensors`` does."""
    return {spec.name: tensors[spec.name] for spec in enumerate_tensors(config)}


def bind_shards(tensor: PhysicalTensor, shards: Sequence[Extent]) -> dict[str, StoredTensor]:
    """Makes the canonical tensors that the shards of one stored tensor hold.

    Raises:
        CheckpointError: As ``bind_tensors``.
    """
    return bind_pieces(tensor, [StoredTensor(shard.shape, shard.dtype, whole(shard)) for shard in shards])


def bind_pieces(tensor: PhysicalTensor, shards: Sequence[StoredTensor]) -> dict[str, StoredTensor]:
    """Makes the canonical tensors that the shards of one stored tensor hold, each shard given in pieces.

    Raises:
        CheckpointError: As ``bind_tensors``.
    """
    tp, first = len(shards), shards[0]
    padded = first.shape[0] * tp if tensor.is_vocab and tensor.split_axis == 0 and first.shape else None
    if padded is not None and padded < tensor.parts[0].shape[0]:
        padded = None
    expected = tensor.shard_shape(tp, padded_vocab=padded)
    for shard in shards:
        where = ", ".join(shard.files[:1])
        check_shape(tensor.name, shard.shape, expected, where=where)
        if shard.dtype not in WEIGHT_DTYPES or shard.dtype != first.dtype:
            raise CheckpointError(
                f"{where}: tensor {tensor.name} is quantised, no weight, or unlike its other shards.",
                got=shard.dtype,
                expected=f"one of {', '.join(WEIGHT_DTYPES)}",
                fix="Save the checkpoint in bf16, fp16 or fp32.",
            )
    mapped = tensor.map(_stack(shards, tensor.split_axis), tp=tp)
    found = {}
    for part in tensor.parts:
        check_cover(part.name, part.shape, mapped[part.name])
        found[part.name] = StoredTensor(part.shape, first.dtype, mapped[part.name])
    return found


def _stack(shards: Sequence[StoredTensor], axis: int | None) -> list[Piece]:
    """Puts the shards of tensor-parallel ranks together; of replicas one is enough."""
    if axis is None:
        return list(shards[0].pieces)
    pieces, at = [], 0
    for shard in shards:
        for piece in shard.pieces:
            start = tuple(first + at * (number == axis) for number, first in enumerate(piece.start))
            pieces.append(Piece(start, piece.extent))
        at += shard.shape[axis]
    return pieces


def check_tied(pool: FilePool, head: Extent, embedding: StoredTensor) -> None:
    """Compares a stored head with the embedding that it is said to be, by its first, middle and last row.

    Raises:
        CheckpointError: They differ.
    """
    stored, (rows, width) = StoredTensor(head.shape, head.dtype, whole(head)), embedding.shape
    same = (stored.shape, stored.dtype) == (embedding.shape, embedding.dtype)
    for row in (0, rows // 2, rows - 1):
        same = same and _row(pool, stored, row, width) == _row(pool, embedding, row, width)
    if not same:
        raise CheckpointError(
            f"{head.file}: the head is not the embedding, though tie_word_embeddings of config.json says so.",
            fix="Set tie_word_embeddings to false to keep the head, or remove the head's tensor.",
        )


def _row(pool: FilePool, stored: StoredTensor, row: int, width: int) -> bytes:
    return read_box(pool, stored, (row, 0), (1, width)).tobytes()


def common_dtype(tensor: PhysicalTensor, dtypes: Mapping[str, str]) -> str:
    """Gives the type of a stored tensor from those of its canonical parts.

    Raises:
        CheckpointError: They differ.
    """
    found = sorted({dtypes[part.name] for part in tensor.parts})
    if len(found) > 1:
        raise CheckpointError(f"The parts of {tensor.name} have different dtypes.", got=found, fix="Pass --dtype.")
    return found[0]
