"""Shapes of published models and of the small ones that examples and tests train."""

from __future__ import annotations

from typing import Any

from megatron_inherit.arch.model_config import ModelConfig, Rope
from megatron_inherit.base.errors import ConfigError


def _llama(layers: int, hidden: int, heads: int, ffn: int, vocab: int, **more: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "family": "llama",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "ffn_size": ffn,
        "vocab_size": vocab,
        "max_positions": 2048,
        "norm_eps": 1e-6,
        "tied": False,
        "rope": Rope(),
    }
    return ModelConfig(**(base | more))


def _gpt2(layers: int, hidden: int, heads: int, **more: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "family": "gpt2",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "ffn_size": 4 * hidden,
        "vocab_size": 50257,
        "max_positions": 1024,
        "norm_eps": 1e-5,
        "tied": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "norm_bias": True,
    }
    return ModelConfig(**(base | more))


PRESETS: dict[str, ModelConfig] = {
    "llama-tiny": _llama(4, 64, 4, 172, 512, num_kv_heads=2, max_positions=256),
    "gpt2-tiny": _gpt2(4, 64, 4, vocab_size=512, max_positions=256),
    "llama-2-7b": _llama(32, 4096, 32, 11008, 32000, max_positions=4096, norm_eps=1e-5),
    "llama-2-70b": _llama(80, 8192, 64, 28672, 32000, num_kv_heads=8, max_positions=4096, norm_eps=1e-5),
    "openllama-3b": _llama(26, 3200, 32, 8640, 32000),
    "openllama-7b": _llama(32, 4096, 32, 11008, 32000),
    "smollm2-135m": _llama(
        30, 576, 9, 1536, 49152, num_kv_heads=3, max_positions=8192, norm_eps=1e-5, tied=True, rope=Rope(theta=100000.0)
    ),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
}


def preset(name: str) -> ModelConfig:
    """Gives a shape by name.

    Raises:
        ConfigError: There is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"There is no model preset {name!r}.", expected=f"one of {', '.join(PRESETS)}")
    return PRESETS[name]
