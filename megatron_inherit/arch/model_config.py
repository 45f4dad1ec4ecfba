"""The shape of a decoder language model, in our own words; no tensor library is needed to reason about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_inherit.base.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: Base of the inverse frequencies.
        scaling: Hugging Face's ``rope_parameters`` without ``rope_theta`` (``rope_type``, ``factor``, ...), or empty
            for the plain form.
        fraction: Share of each head's dimensions that is rotated (partial rotary).
    """

    theta: float = 10000.0
    scaling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fraction: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that fixes the tensors and the function of a model.

    Attributes:
        family: Key of ``arch.families.FAMILIES``.
        num_layers: Number of transformer blocks.
        hidden_size: Width of the residual stream.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; equal to ``num_heads`` without grouped queries.
        head_dim: Width of one head.
        ffn_size: Width of the MLP's inner layer.
        vocab_size: True number of tokens, without padding.
        max_positions: Longest sequence the model was made for; rows of the position table for learned positions.
        norm_eps: Epsilon of the norms.
        tied: The head is the embedding.
        rope: Rotary positions, or None where positions are learned.
        qkv_bias, out_bias, mlp_bias, norm_bias: Which biases exist.
        qk_norm: Queries and keys are normalised per head (Qwen3).
        sliding_window: Attention span in tokens, or None for full causal attention.
        attn_scale_by_layer: Attention logits of block i are divided by i + 1 (GPT-2's
            ``scale_attn_by_inverse_layer_idx``); sources fold it into the query projection, so it is False downstream.
        residual: Blocks add what they compute to what they got. Without, an ablation, no other program's format can
            hold the model.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    tied: bool
    rope: Rope | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    attn_scale_by_layer: bool = False
    residual: bool = True

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} of the model must be positive.", got=getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                "The number of query heads is not a multiple of the key/value heads.",
                got=f"{self.num_heads} and {self.num_kv_heads}",
            )

    def with_layers(self, num_layers: int) -> ModelConfig:
        """Gives the same model at another depth."""
        return dataclasses.replace(self, num_layers=num_layers)

    def to_json(self) -> dict[str, Any]:
        """Gives plain values for JSON; ``from_json`` reverses it."""
        fields = dataclasses.asdict(self)
        if self.residual:
            del fields["residual"]
        return fields

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelConfig:
        """Reads what ``to_json`` gave."""
        fields = dict(value)
        if fields.get("rope") is not None:
            fields["rope"] = Rope(**fields["rope"])
        return cls(**fields)
