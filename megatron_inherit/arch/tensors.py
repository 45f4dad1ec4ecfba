"""Enumerates a model's tensors from its configuration: canonical name, role, shape, parallel axis, initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_inherit.arch.families import FAMILIES, Family, Init, Role, Row, Split
from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import CheckpointError

DIMENSIONS: Mapping[str, Callable[[ModelConfig], int]] = {
    "vocab": lambda c: c.vocab_size,
    "positions": lambda c: c.max_positions,
    "hidden": lambda c: c.hidden_size,
    "head_dim": lambda c: c.head_dim,
    "q": lambda c: c.num_heads * c.head_dim,
    "kv": lambda c: c.num_kv_heads * c.head_dim,
    "ffn": lambda c: c.ffn_size,
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model.

    Attributes:
        name: Canonical name, for instance ``layers.3.attn.q.weight``.
        role: ``embed``, ``pos_embed``, ``attn``, ``mlp``, ``norm``, ``final_norm`` or ``head``.
        layer: Index of its block, or None outside the blocks.
        shape: Global shape, [out, in] for weights, without vocabulary padding.
        split: How tensor parallelism cuts it.
        init: Its fresh initialisation.
    """

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    split: Split
    init: Init

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def family_of(config: ModelConfig) -> Family:
    """Looks the configuration's family up.

    Raises:
        CheckpointError: The family is unknown.
    """
    if config.family not in FAMILIES:
        raise CheckpointError(f"Unknown model family {config.family!r}.", expected=f"one of {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


def enumerate_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Lists all tensors of a model: those before the blocks, the blocks in order, those after them."""
    rows = [row for row in family_of(config).rows if _exists(row, config)]
    blocks = [row for row in rows if "{i}" in row.name]
    first = rows.index(blocks[0])
    specs = [_spec(row, None, config) for row in rows[:first]]
    specs += [_spec(row, layer, config) for layer in range(config.num_layers) for row in blocks]
    specs += [_spec(row, None, config) for row in rows[first:] if "{i}" not in row.name]
    return tuple(specs)


def tensor_table(config: ModelConfig) -> dict[str, TensorSpec]:
    """Gives the tensors by canonical name, in the order of ``enumerate_tensors``."""
    return {spec.name: spec for spec in enumerate_tensors(config)}


def _exists(row: Row, config: ModelConfig) -> bool:
    if row.when.startswith("!"):
        return not getattr(config, row.when[1:])
    return not row.when or bool(getattr(config, row.when))


def _spec(row: Row, layer: int | None, config: ModelConfig) -> TensorSpec:
    name = row.name if layer is None else row.name.format(i=layer)
    shape = tuple(DIMENSIONS[dimension](config) for dimension in row.shape)
    return TensorSpec(name, row.role, layer, shape, row.split, row.init)
