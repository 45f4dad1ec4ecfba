"""Rotary position embedding (Su et al. 2021) with every scaling rule of Hugging Face's ``rope_parameters``.

The arithmetic follows transformers step by step, in float32, so that logits agree with the published models'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import CheckpointError

Frequencies = tuple[torch.Tensor, float]
"""Inverse frequencies [rotated dimensions / 2] and the factor on cosine and sine."""


def _plain(theta: float, dim: int) -> torch.Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _default(theta: float, dim: int, scaling: Mapping[str, Any], limit: int, length: int) -> Frequencies:
    return _plain(theta, dim), 1.0


def _linear(theta: float, dim: int, scaling: Mapping[str, Any], limit: int, length: int) -> Frequencies:
    return _plain(theta, dim) / scaling["factor"], 1.0


def _dynamic(theta: float, dim: int, scaling: Mapping[str, Any], limit: int, length: int) -> Frequencies:
    """NTK-aware growth of the base with the sequence, beyond the trained length only."""
    factor = scaling["factor"]
    stretch = (factor * max(length, limit) / limit) - (factor - 1)
    return _plain(theta * stretch ** (dim / (dim - 2)), dim), 1.0


def _llama3(theta: float, dim: int, scaling: Mapping[str, Any], limit: int, length: int) -> Frequencies:
    """Llama 3.1: long waves are slowed by the factor, short ones kept, those between interpolated."""
    plain = _plain(theta, dim)
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    trained = scaling["original_max_position_embeddings"]
    wave = 2 * math.pi / plain
    slowed = torch.where(wave > trained / low, plain / factor, plain)
    smooth = (trained / wave - low) / (high - low)
    between = (1 - smooth) * slowed / factor + smooth * slowed
    medium = ~(wave < trained / high) * ~(wave > trained / low)
    return torch.where(medium, between, slowed), 1.0


def _mscale(scale: float, weight: float = 1.0) -> float:
    return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0


def _yarn(theta: float, dim: int, scaling: Mapping[str, Any], limit: int, length: int) -> Frequencies:
    """YaRN (Peng et al. 2023): interpolation of slow dimensions, extrapolation of fast ones, a ramp between."""
    trained = scaling.get("original_max_position_embeddings") or limit
    factor = scaling.get("factor") or limit / trained
    attention = scaling.get("attention_factor")
    if attention is None:
        above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = _mscale(factor, above) / _mscale(factor, below) if above and below else _mscale(factor)

    def dimension(rotations: float) -> float:
        return (dim * math.log(trained / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    keep = 1 - torch.clamp(ramp, 0, 1)
    powers = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep, attention


def _longrope(theta: float, dim: int, scaling: Mapping[str, Any], limit: int, length: int) -> Frequencies:
    """LongRoPE (Ding et al. 2024): one factor a dimension, another set beyond the trained length."""
    trained = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or limit / trained
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    chosen = scaling["long_factor"] if length > trained else scaling["short_factor"]
    divisors = torch.tensor(chosen, dtype=torch.float32)
    return 1.0 / (divisors * theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)), attention


SCALINGS: dict[str, Callable[[float, int, Mapping[str, Any], int, int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def frequencies(config: ModelConfig, length: int) -> Frequencies:
    """Computes the inverse frequencies for sequences of up to ``length`` tokens.

    Args:
        config: The model; ``config.rope`` must be set.
        length: Tokens of the longest sequence; matters to dynamic and longrope scaling only.

    Raises:
        CheckpointError: The scaling type is unknown or misses a parameter.
    """
    rope = config.rope
    if rope is None:
        raise CheckpointError(f"Models of family {config.family!r} without rotary positions have no frequencies.")
    kind = rope.scaling.get("rope_type", rope.scaling.get("type", "default"))
    if kind not in SCALINGS:
        raise CheckpointError(f"Unknown RoPE scaling {kind!r}.", expected=f"one of {', '.join(SCALINGS)}")
    dim = int(config.head_dim * rope.fraction)
    try:
        return SCALINGS[kind](rope.theta, dim, rope.scaling, config.max_positions, length)
    except KeyError as error:
        raise CheckpointError(f"RoPE scaling {kind!r} of the model misses the parameter {error}.") from error


class Rotary:
    """Cosine and sine tables of a model, made once a length and device."""

    _KEPT = 8

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._cache: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def tables(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives cosine and sine, float32 [length, rotated dimensions / 2], of positions 0 to length - 1."""
        key = length, device
        if key not in self._cache:
            if len(self._cache) == self._KEPT:
                self._cache.clear()
            inverse, factor = frequencies(self.config, length)
            angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse[None, :]
            self._cache[key] = ((angles.cos() * factor).to(device), (angles.sin() * factor).to(device))
        return self._cache[key]
