"""Parameters and floating-point operations in closed form, each under the name of its convention."""

from __future__ import annotations

from typing import Literal

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import enumerate_tensors

FlopsFormula = Literal["palm", "causal"]

PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
}
"""Dense bf16 peak of a device in FLOP/s, from the vendor's data sheets; the first key that its name holds counts."""


def count_parameters(config: ModelConfig, *, embeddings: bool = True) -> int:
    """Counts the parameters; tied heads count once.

    Args:
        config: The model.
        embeddings: Counts the embedding and position tables and an untied head too.
    """
    outside = ("embed", "pos_embed", "head")
    return sum(spec.numel for spec in enumerate_tensors(config) if embeddings or spec.role not in outside)


def flops_per_token(config: ModelConfig, sequence_length: int, formula: FlopsFormula = "palm") -> float:
    """Counts the operations of one training step per token, forward and backward, recomputation left out.

    ``palm`` is 6 N + 12 L h s (Chowdhery et al. 2022, appendix B) with N the parameters of all matrix products, the
    head's included, L blocks, h = heads x head size and s the sequence length. ``causal`` counts the half of the
    attention products that a causal kernel computes.

    Args:
        config: The model.
        sequence_length: Tokens of a sequence.
        formula: Which convention.
    """
    matrices = sum(
        spec.numel for spec in enumerate_tensors(config) if len(spec.shape) == 2 and spec.role in ("attn", "mlp")
    )
    matrices += config.vocab_size * config.hidden_size
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * sequence_length
    return 6.0 * matrices + (attention if formula == "palm" else attention / 2)


def peak_flops(device_name: str) -> float | None:
    """Gives the dense bf16 peak of a device in FLOP/s, or None for a device without a data-sheet value here."""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in device_name), None)
