"""Between the flat storage of an engine and canonical tensors: parts that leave it, stored values that enter it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_inherit.arch.tensors import TensorSpec
from megatron_inherit.base.errors import AbsentError
from megatron_inherit.engines.base import Part, ReadPart
from megatron_inherit.model.load import Reader, read_flat
from megatron_inherit.model.pieces import Piece, cut_flat

MOMENTS = ("exp_avg", "exp_avg_sq")


def decays(spec: TensorSpec) -> bool:
    """Tells whether weight decay applies: to the matrices of blocks and to an untied head."""
    return spec.role in ("attn", "mlp", "head") and len(spec.shape) == 2


@dataclass(frozen=True)
class Shard:
    """What this rank stores of one parameter: elements ``[low, high)`` of it, flattened.

    Attributes:
        pieces: The parameter's canonical tensors.
        low, high: The range that ``values`` cover.
        values: Kind -> one-dimensional tensor of ``high - low`` elements, a view of the engine's own storage.
        written: This rank writes the range; a rank that holds a copy of it does not.
    """

    pieces: list[Piece]
    low: int
    high: int
    values: dict[str, torch.Tensor]
    written: bool


def shard_parts(shards: Iterator[Shard], *, model_rank: int) -> Iterator[Part]:
    """Yields the parts that this rank writes.

    Args:
        shards: All that it stores.
        model_rank: Tensor parallel rank; boxes that all of them hold are written by rank 0.
    """
    for shard in shards:
        if not shard.written:
            continue
        for piece, low, high in cut_flat(shard.pieces, shard.low, shard.high):
            if piece.tied or (piece.copies and model_rank):
                continue
            begin = piece.offset + low - shard.low
            for kind, tensor in shard.values.items():
                values = tensor.detach()[begin : begin + high - low]
                whole = high - low == piece.numel
                yield Part(
                    name=piece.spec.name,
                    kind=kind,
                    global_shape=piece.spec.shape,
                    start=piece.start,
                    shape=piece.shape,
                    tensor=values.view(piece.shape) if whole else values,
                    flat=None if whole else (low, high),
                )


@torch.no_grad()
def restore_shards(shards: Iterator[Shard], read: ReadPart) -> None:
    """Fills shards from a stored state; master weights come from ``fp32`` where it is stored, else from ``weight``."""
    for shard in shards:
        for kind, tensor in shard.values.items():
            fill_flat(tensor, shard, kind_reader(read, kind))


def fill_flat(tensor: torch.Tensor, shard: Shard, read: Reader) -> None:
    """Sets a shard's elements piece by piece; those of vocabulary padding become zero."""
    tensor.zero_()
    for piece, low, high in cut_flat(shard.pieces, shard.low, shard.high):
        begin = piece.offset + low - shard.low
        tensor[begin : begin + high - low].copy_(read_flat(piece, low, high, read))


def kind_reader(read: ReadPart, kind: str) -> Reader:
    """Reads boxes of one kind; both kinds of weight take the most precise one that is stored."""
    if kind in MOMENTS:
        return lambda spec, box: read(spec.name, kind, box)

    def weight(spec: TensorSpec, box: tuple[slice, ...]) -> torch.Tensor:
        try:
            return read(spec.name, "fp32", box)
        except AbsentError:
            return read(spec.name, "weight", box)

    return weight
