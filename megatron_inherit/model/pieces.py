"""Which canonical tensors a parameter of the model holds, and where: the table behind loading, saving and resharding.

A parameter of one rank is a concatenation of boxes of canonical tensors, each contiguous in it: for each key/value
group the rows of its queries, its key, its value; rows of gate, then of up; an embedding's rows, then padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from megatron_inherit.arch.tensors import TensorSpec, tensor_table
from megatron_inherit.model.language_model import LanguageModel

_BLOCK_TABLE: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("attn_norm",),
    "self_attention.linear_qkv": ("attn.q", "attn.k", "attn.v"),
    "self_attention.q_layernorm": ("attn.q_norm",),
    "self_attention.k_layernorm": ("attn.k_norm",),
    "self_attention.linear_proj": ("attn.o",),
    "pre_mlp_layernorm": ("mlp_norm",),
    "mlp.linear_fc1": ("mlp.gate", "mlp.up"),
    "mlp.linear_fc2": ("mlp.down",),
}
_OUTER_TABLE: dict[str, str] = {
    "embedding.word_embeddings": "embed",
    "embedding.position_embeddings": "pos_embed",
    "decoder.final_layernorm": "final_norm",
    "output_layer": "head",
}


Box = tuple[TensorSpec, tuple[int, ...], tuple[int, ...]]
"""A canonical tensor, the start of a box in it and the box's shape."""


@dataclass(frozen=True)
class Piece:
    """A box of a canonical tensor inside a parameter of this rank.

    Attributes:
        parameter: Name of the parameter in its model chunk.
        spec: The canonical tensor, under the name by which it is stored.
        start, shape: The box.
        offset: Its first element in the flattened parameter.
        copies: The box is on every tensor parallel rank.
        tied: The parameter is a further copy of one that another pipeline stage owns.
    """

    parameter: str
    spec: TensorSpec
    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    copies: bool = False
    tied: bool = False

    @property
    def numel(self) -> int:
        """Number of elements of the box."""
        return prod(self.shape)

    @property
    def box(self) -> tuple[slice, ...]:
        """The box as slices of the canonical tensor."""
        return tuple(slice(low, low + size) for low, size in zip(self.start, self.shape, strict=True))


def canonical_names(chunk: LanguageModel, parameter: str) -> tuple[str, ...]:
    """Names the canonical tensors that a parameter of a chunk holds, in their order in it."""
    module, _, leaf = parameter.rpartition(".")
    if module in _OUTER_TABLE:
        name = f"{_OUTER_TABLE[module]}.{leaf}"
        return ("embed.weight",) if name == "head.weight" and chunk.model.tied else (name,)
    local, _, rest = module.removeprefix("decoder.layers.").partition(".")
    layer = chunk.decoder.layers[int(local)].layer_number - 1
    names = tuple(f"layers.{layer}.{part}.{leaf}" for part in _BLOCK_TABLE[rest])
    table = tensor_table(chunk.model)
    return tuple(name for name in names if name in table)


def pieces_of(chunk: LanguageModel) -> dict[str, list[Piece]]:
    """Lists the pieces of every parameter of a chunk, in the order of ``named_parameters``."""
    table = tensor_table(chunk.model)
    size, rank = chunk.tp_size, chunk.pg_collection.tp.rank()
    found: dict[str, list[Piece]] = {}
    for parameter, values in chunk.named_parameters():
        offset, found[parameter] = 0, []
        tied = getattr(values, "shared", False) or (parameter.startswith("output_layer.") and chunk.model.tied)
        specs = list(chunk.own_specs.get(parameter, ()))
        if not specs:
            specs = [replace(table[n], name=chunk.stored_name(n)) for n in canonical_names(chunk, parameter)]
        boxes = [(spec, *_box(spec, size, rank, chunk.vocab_size)) for spec in specs]
        for spec, start, shape in _by_group(boxes, chunk.model.num_kv_heads // size) if _packed(parameter) else boxes:
            found[parameter].append(Piece(parameter, spec, start, shape, offset, spec.split == "none", tied))
            offset += prod(shape)
    return found


def _packed(parameter: str) -> bool:
    return ".linear_qkv." in parameter


def _by_group(boxes: list[Box], groups: int) -> Iterator[Box]:
    for group in range(groups):
        for spec, start, shape in boxes:
            rows = shape[0] // groups
            yield spec, (start[0] + group * rows, *start[1:]), (rows, *shape[1:])


def _box(spec: TensorSpec, size: int, rank: int, padded: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start, shape = [0] * len(spec.shape), list(spec.shape)
    if spec.split == "vocab":
        rows = padded // size
        start[0] = min(rank * rows, spec.shape[0])
        shape[0] = min(rows, spec.shape[0] - start[0])
    elif spec.split in ("column", "row"):
        axis = 0 if spec.split == "column" else 1
        shape[axis] //= size
        start[axis] = rank * shape[axis]
    return tuple(start), tuple(shape)


def cut_flat(pieces: list[Piece], low: int, high: int) -> Iterator[tuple[Piece, int, int]]:
    """Cuts elements ``[low, high)`` of a flattened parameter into pieces.

    Yields:
        A piece and the range of its own elements, in row-major order of its box.
    """
    for piece in pieces:
        first, last = max(low, piece.offset), min(high, piece.offset + piece.numel)
        if first < last:
            yield piece, first - piece.offset, last - piece.offset
