"""Megatron's names for canonical tensors, in all the dialects that checkpoints speak.

``te``: Megatron-Core with fused norms (Transformer Engine), and ``torch_dist`` always. ``local``: Megatron-Core's local
layer spec. ``legacy``: Megatron-LM's own model from core 0.4 on; ``legacy_layernorm``: before, to 23.06;
``legacy_attention``: before v2.5. Sources: megatron/core/models/gpt/gpt_layer_specs.py,
megatron/legacy/model/{language_model,transformer}.py at the releases named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import family_of
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.layout import Fuse, LayoutRow, physical_tensors

Dialect = Literal["te", "local", "legacy", "legacy_layernorm", "legacy_attention"]


@dataclass(frozen=True)
class Names:
    """The parts of a dialect's names; norms are prefixes that ``weight`` or ``bias`` completes."""

    embedding: str
    layers: str
    head: str
    final_norm: str
    attn_norm: str
    mlp_norm: str
    attention: str = "self_attention"
    qkv: str = "linear_qkv"
    out: str = "linear_proj"
    fc1: str = "linear_fc1"
    fc2: str = "linear_fc2"
    qk_norm: str = "{}_layernorm"
    tied_head: str = "output_layer.weight"


_CORE = {
    "embedding": "embedding",
    "layers": "decoder.layers.{i}.",
    "head": "output_layer.weight",
    "final_norm": "decoder.final_layernorm.",
}
_MODEL = "language_model."
_LEGACY = {
    "embedding": f"{_MODEL}embedding",
    "layers": f"{_MODEL}encoder.layers.{{i}}.",
    "head": f"{_MODEL}output_layer.weight",
    "qkv": "query_key_value",
    "out": "dense",
    "fc1": "dense_h_to_4h",
    "fc2": "dense_4h_to_h",
    "qk_norm": "{}_norm",
    "tied_head": "word_embeddings_for_head.weight",
}
_LAYERNORMS = {
    "final_norm": f"{_MODEL}encoder.final_layernorm.",
    "attn_norm": "input_layernorm.",
    "mlp_norm": "post_attention_layernorm.",
}
DIALECTS: dict[str, Names] = {
    "te": Names(attn_norm="self_attention.linear_qkv.layer_norm_", mlp_norm="mlp.linear_fc1.layer_norm_", **_CORE),
    "local": Names(attn_norm="input_layernorm.", mlp_norm="pre_mlp_layernorm.", **_CORE),
    "legacy": Names(
        attn_norm="input_norm.",
        mlp_norm="post_attention_norm.",
        final_norm=f"{_MODEL}encoder.final_norm.",
        **_LEGACY,
    ),
    "legacy_layernorm": Names(**_LAYERNORMS, **_LEGACY),
    "legacy_attention": Names(attention="attention", **_LAYERNORMS, **_LEGACY),
}
IGNORED = (r".*_extra_state(/.*)?", r".*rotary_(pos_)?emb.*inv_freq")
"""Names that stand for no weight: Transformer Engine's states, and the frequencies of old rotary buffers."""


def megatron_rows(
    config: ModelConfig, dialect: str, *, qkv: Fuse = "qkv", gate_up: Fuse = "concat_per_shard"
) -> tuple[LayoutRow, ...]:
    """Gives the table of a dialect.

    Args:
        config: The model: only whether its MLP has a gate matters.
        dialect: Key of ``DIALECTS``.
        qkv: Order of the fused query, key and value rows.
        gate_up: Order of the fused gate and up rows.
    """
    names = DIALECTS[dialect]
    layer, attention = names.layers, f"{names.layers}{names.attention}."
    fc1 = ("gate", "up") if family_of(config).gated else ("up",)
    rows = [
        LayoutRow(f"{names.embedding}.word_embeddings.weight", ("embed.weight",)),
        LayoutRow(f"{names.embedding}.position_embeddings.weight", ("pos_embed.weight",)),
        *_both(f"{layer}{names.attn_norm}", ("layers.{i}.attn_norm",)),
        *_both(f"{attention}{names.qkv}.", tuple(f"layers.{{i}}.attn.{part}" for part in "qkv"), qkv),
    ]
    for part in "qk":
        physical = f"{attention}{names.qk_norm.format(part)}.weight"
        rows.append(LayoutRow(physical, (f"layers.{{i}}.attn.{part}_norm.weight",)))
    rows += [
        *_both(f"{attention}{names.out}.", ("layers.{i}.attn.o",)),
        *_both(f"{layer}{names.mlp_norm}", ("layers.{i}.mlp_norm",)),
        *_both(
            f"{layer}mlp.{names.fc1}.",
            tuple(f"layers.{{i}}.mlp.{part}" for part in fc1),
            gate_up if len(fc1) > 1 else "one",
        ),
        *_both(f"{layer}mlp.{names.fc2}.", ("layers.{i}.mlp.down",)),
        *_both(names.final_norm, ("final_norm",)),
        LayoutRow(names.head, ("head.weight",)),
    ]
    return tuple(rows)


def find_dialect(names: Iterable[str], config: ModelConfig, *, where: str) -> str:
    """Tells which dialect a checkpoint speaks: the one that knows most of its names.

    Args:
        names: Stored names with global layer numbers.
        config: The model.
        where: Path for the message.

    Raises:
        CheckpointError: No dialect knows any of the names.
    """
    found = set(names)
    known = {
        dialect: sum(tensor.name in found for tensor in physical_tensors(megatron_rows(config, dialect), config))
        for dialect in DIALECTS
    }
    best = max(known, key=lambda dialect: known[dialect])
    if not known[best]:
        raise CheckpointError(
            f"{where} holds no names of a Megatron model.", got=", ".join(sorted(found)[:3]) or "no tensor"
        )
    return best


def local_layer(name: str) -> int | None:
    """Gives the layer number in a stored name, or None outside the blocks."""
    match = re.search(r"\blayers\.(\d+)\.", name)
    return int(match[1]) if match else None


def shift_layer(name: str, by: int) -> str:
    """Adds to the layer number in a stored name."""
    return re.sub(r"\blayers\.(\d+)\.", lambda match: f"layers.{int(match[1]) + by}.", name, count=1)


def _both(physical: str, canonical: tuple[str, ...], fuse: Fuse = "one") -> tuple[LayoutRow, LayoutRow]:
    """Gives the rows of a weight and of its bias."""
    weight, bias = (
        LayoutRow(f"{physical}{kind}", tuple(f"{name}.{kind}" for name in canonical), fuse)
        for kind in ("weight", "bias")
    )
    return weight, bias
