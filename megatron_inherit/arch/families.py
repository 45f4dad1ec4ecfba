"""The model families: one list of rows each, from which every tensor's name, shape, role and parallel axis follows.

A family that fits these rows is added by a new entry here and its foreign names in the tables of
``checkpoint/formats``; nothing else knows a family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["embed", "pos_embed", "attn", "mlp", "norm", "final_norm", "head"]
Split = Literal["vocab", "column", "row", "none"]
Init = Literal["normal", "residual", "ones", "zeros"]

ROLES: tuple[Role, ...] = ("embed", "pos_embed", "attn", "mlp", "norm", "final_norm", "head")


@dataclass(frozen=True)
class Row:
    """One kind of tensor.

    Attributes:
        name: Canonical name; ``layers.{i}.`` stands before those of a block.
        role: What ``--reset`` and the reports call it.
        shape: Names of ``arch.tensors.DIMENSIONS``, outermost first. Weights are [out, in].
        split: How tensor parallelism cuts it: ``vocab`` and ``column`` along axis 0, ``row`` along axis 1.
        init: Fresh initialisation: normal (std 0.02), residual (0.02 / sqrt(2 n)), ones or zeros.
        when: Field of ModelConfig that must be true for the tensor to exist; ``!`` negates it.
    """

    name: str
    role: Role
    shape: tuple[str, ...]
    split: Split
    init: Init
    when: str = ""


@dataclass(frozen=True)
class Family:
    """What is the same in all models of a family.

    Attributes:
        norm: Kind of all norms.
        activation: Of the MLP: ``swiglu`` has gate and up, ``gelu_tanh`` only up.
        rows: Its tensors, in the order of a Hugging Face file.
    """

    name: str
    norm: Literal["rmsnorm", "layernorm"]
    activation: Literal["swiglu", "gelu_tanh"]
    positions: Literal["rope", "learned"]
    rows: tuple[Row, ...]

    @property
    def gated(self) -> bool:
        """Tells whether the MLP has a gate."""
        return self.activation == "swiglu"


_BLOCK = "layers.{i}."


def _norm(name: str, role: Role) -> tuple[Row, ...]:
    return (
        Row(f"{name}.weight", role, ("hidden",), "none", "ones"),
        Row(f"{name}.bias", role, ("hidden",), "none", "zeros", "norm_bias"),
    )


def _linear(
    name: str, role: Role, out: str, into: str, split: Split, bias: str, init: Init = "normal"
) -> tuple[Row, ...]:
    bias_split: Split = "column" if split == "column" else "none"
    return (
        Row(f"{_BLOCK}{name}.weight", role, (out, into), split, init),
        Row(f"{_BLOCK}{name}.bias", role, (out,), bias_split, "zeros", bias),
    )


_EMBED = (Row("embed.weight", "embed", ("vocab", "hidden"), "vocab", "normal"),)
_POSITIONS = (Row("pos_embed.weight", "pos_embed", ("positions", "hidden"), "none", "normal"),)
_HEAD = (Row("head.weight", "head", ("vocab", "hidden"), "vocab", "normal", "!tied"),)
_ATTENTION = (
    *_norm(f"{_BLOCK}attn_norm", "norm"),
    *_linear("attn.q", "attn", "q", "hidden", "column", "qkv_bias"),
    *_linear("attn.k", "attn", "kv", "hidden", "column", "qkv_bias"),
    *_linear("attn.v", "attn", "kv", "hidden", "column", "qkv_bias"),
    Row(f"{_BLOCK}attn.q_norm.weight", "norm", ("head_dim",), "none", "ones", "qk_norm"),
    Row(f"{_BLOCK}attn.k_norm.weight", "norm", ("head_dim",), "none", "ones", "qk_norm"),
    *_linear("attn.o", "attn", "hidden", "q", "row", "out_bias", "residual"),
)
_MLP_NORM = _norm(f"{_BLOCK}mlp_norm", "norm")
_GATE = _linear("mlp.gate", "mlp", "ffn", "hidden", "column", "mlp_bias")
_UP = _linear("mlp.up", "mlp", "ffn", "hidden", "column", "mlp_bias")
_DOWN = _linear("mlp.down", "mlp", "hidden", "ffn", "row", "mlp_bias", "residual")
_FINAL_NORM = _norm("final_norm", "final_norm")

_LLAMA_ROWS = (*_EMBED, *_ATTENTION, *_MLP_NORM, *_GATE, *_UP, *_DOWN, *_FINAL_NORM, *_HEAD)
_GPT2_ROWS = (*_EMBED, *_POSITIONS, *_ATTENTION, *_MLP_NORM, *_UP, *_DOWN, *_FINAL_NORM, *_HEAD)

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "rmsnorm", "swiglu", "rope", _LLAMA_ROWS),
    "mistral": Family("mistral", "rmsnorm", "swiglu", "rope", _LLAMA_ROWS),
    "qwen2": Family("qwen2", "rmsnorm", "swiglu", "rope", _LLAMA_ROWS),
    "qwen3": Family("qwen3", "rmsnorm", "swiglu", "rope", _LLAMA_ROWS),
    "gpt2": Family("gpt2", "layernorm", "gelu_tanh", "learned", _GPT2_ROWS),
}
