"""``config.json`` in both directions: fields to ModelConfig and back, and a student's config out of its teacher's.

Field meanings and defaults are those of transformers 4 and 5 (``configuration_llama.py`` and its siblings).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_inherit.arch.model_config import ModelConfig, Rope
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.dtypes import TORCH_NAMES

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "max_window_layers": 28}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}
"""What a field means that a family's file leaves out; a null is no default."""
_DEPTH = {"gpt2": "n_layer"}
_NOT_PER_LAYER = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "rope_scaling", "pruned_heads")
_GPT2_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def read_config(raw: Mapping[str, Any], *, where: str) -> ModelConfig:
    """Reads a model's shape.

    Args:
        raw: The parsed ``config.json``.
        where: Its path, for messages.

    Returns:
        The shape; ``attn_scale_by_layer`` as the file says (the reader of the weights folds it).

    Raises:
        CheckpointError: The family is unknown, a field is missing, or the model does what the family's rows cannot.
    """
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: unknown model family.",
            got=family,
            expected=f"model_type one of {', '.join(ARCHITECTURES)}",
            fix="Mixture-of-experts, encoder and multimodal models are not supported.",
        )
    if raw.get("quantization_config"):
        raise CheckpointError(f"{where}: quantised weights cannot be inherited.", fix="Use the unquantised checkpoint.")
    try:
        return _read_gpt2(raw, where) if family == "gpt2" else _read_llama(raw, where)
    except KeyError as error:
        raise CheckpointError(f"{where}: the field {error} is missing.") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: a field has a value that cannot be.", got=error) from error
    except CheckpointError as error:
        if where in error.what:
            raise
        raise CheckpointError(f"{where}: {error.what}", got=error.got) from error


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Writes the ``config.json`` of a model that never had one, in fields that transformers 4 and 5 both read.

    Args:
        config: The model.
        dtype: Type of the weights, safetensors name.
    """
    common = {"architectures": [ARCHITECTURES[config.family]], "model_type": config.family}
    fields = _gpt2_fields(config) if config.family == "gpt2" else _llama_fields(config)
    return common | fields | {"tie_word_embeddings": config.tied, "torch_dtype": TORCH_NAMES[dtype], "use_cache": True}


def config_file(config: ModelConfig, raw: Mapping[str, Any] | None, dtype: str) -> dict[str, Any]:
    """Gives the ``config.json`` that stands beside the weights of a model.

    Args:
        config: The model.
        raw: Its fields where they are known; default: made from ``config``.
        dtype: Type of the weights, safetensors name.

    Raises:
        CheckpointError: Read by transformers, the file would be of another model.
    """
    fields = dict(raw) if raw else write_config(config, dtype)
    read = dataclasses.asdict(read_config(fields, where="config.json"))
    for name, value in dataclasses.asdict(config).items():
        if read[name] != value:
            raise CheckpointError(
                f"config.json of a {ARCHITECTURES[config.family]} has no place for {name} of this model.",
                got=value,
                expected=read[name],
                fix="Its weights can be kept as --format megatron or torch_dist.",
            )
    return fields


def student_config(raw: Mapping[str, Any], config: ModelConfig, layers: Sequence[int], dtype: str) -> dict[str, Any]:
    """Rewrites a teacher's ``config.json`` for a student; fields that depth does not touch stay as they are.

    Args:
        raw: The teacher's fields.
        config: The student.
        layers: Teacher's block for each block of the student; lists with one entry a block are taken along it.
        dtype: Type of the student's weights, safetensors name.
    """
    fields = copy.deepcopy(dict(raw))
    key = _DEPTH.get(config.family, "num_hidden_layers")
    depth = fields[key]
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == depth and name not in _NOT_PER_LAYER:
            fields[name] = [value[layer] for layer in layers]
    windowless = (_DEFAULTS.get(config.family, {}) | fields).get("max_window_layers")
    if windowless is not None and (windowless == depth or (fields.get("use_sliding_window") and windowless > depth)):
        fields["max_window_layers"] = config.num_layers  # no block had a window
    fields[key] = config.num_layers
    fields.pop("_name_or_path", None)
    if fields.get("scale_attn_by_inverse_layer_idx"):
        fields["scale_attn_by_inverse_layer_idx"] = config.attn_scale_by_layer
    fields["dtype" if "dtype" in fields else "torch_dtype"] = TORCH_NAMES[dtype]
    fields.setdefault("architectures", [ARCHITECTURES[config.family]])
    return fields


def _read_llama(raw: Mapping[str, Any], where: str) -> ModelConfig:
    family, heads = raw["model_type"], raw["num_attention_heads"]
    raw = _DEFAULTS.get(family, {}) | dict(raw)
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: the activation is not SiLU.", got=raw["hidden_act"])
    dim = raw.get("head_dim") or raw["hidden_size"] // heads
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        family=family,
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=dim,
        ffn_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        max_positions=raw.get("max_position_embeddings", 2048),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        rope=_read_rope(raw),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias and family != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        sliding_window=_read_window(raw, where),
    )


def _read_gpt2(raw: Mapping[str, Any], where: str) -> ModelConfig:
    if raw.get("activation_function", "gelu_new") not in _GPT2_ACTIVATIONS:
        raise CheckpointError(f"{where}: the activation is not tanh GELU.", got=raw["activation_function"])
    if not raw.get("scale_attn_weights", True) or raw.get("add_cross_attention"):
        raise CheckpointError(f"{where}: unscaled or cross attention is not supported.")
    hidden, heads = raw["n_embd"], raw["n_head"]
    return ModelConfig(
        family="gpt2",
        num_layers=raw["n_layer"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn_size=raw.get("n_inner") or 4 * hidden,
        vocab_size=raw["vocab_size"],
        max_positions=raw.get("n_positions", 1024),
        norm_eps=float(raw.get("layer_norm_epsilon", 1e-5)),
        tied=bool(raw.get("tie_word_embeddings", True)),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        norm_bias=True,
        attn_scale_by_layer=bool(raw.get("scale_attn_by_inverse_layer_idx", False)),
    )


def _read_rope(raw: Mapping[str, Any]) -> Rope:
    """Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    fields = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = fields.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    fraction = fields.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    old = fields.pop("type", None)
    kind = fields.pop("rope_type", None) or old or "default"
    scaling = {} if kind == "default" else {"rope_type": kind, **fields}
    return Rope(theta=float(theta), scaling=scaling, fraction=float(fraction))


def _read_window(raw: Mapping[str, Any], where: str) -> int | None:
    window, family = raw.get("sliding_window"), raw["model_type"]
    if window is None or family == "llama" or (family != "mistral" and not raw.get("use_sliding_window", False)):
        return None  # transformers' LLaMA has no window, whatever the file says
    kinds = set(raw.get("layer_types") or ())
    if family != "mistral":
        full = raw["max_window_layers"]
        kinds = kinds or ({"full_attention"} if full else set()) | ({"s"} if full < raw["num_hidden_layers"] else set())
    if len(kinds) > 1:
        raise CheckpointError(f"{where}: blocks with and without a sliding window in one model are not supported.")
    return None if kinds == {"full_attention"} else window


def _llama_fields(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope or Rope()
    fields: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "rope_theta": rope.theta,
        "rope_parameters": {"rope_type": "default", **rope.scaling, "rope_theta": rope.theta},
    }
    if rope.scaling:
        fields["rope_scaling"] = dict(rope.scaling)
    if rope.fraction != 1.0:
        fields["partial_rotary_factor"] = rope.fraction
        fields["rope_parameters"]["partial_rotary_factor"] = rope.fraction
    if config.family in ("llama", "qwen3"):
        fields["attention_bias"] = config.out_bias
    if config.family == "llama":
        fields["mlp_bias"] = config.mlp_bias
    if config.family == "mistral" or config.sliding_window is not None:
        fields["sliding_window"] = config.sliding_window
    if config.family in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = config.sliding_window is not None
        fields["max_window_layers"] = 0 if config.sliding_window is not None else config.num_layers
    return fields


def _gpt2_fields(config: ModelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": None if config.ffn_size == 4 * config.hidden_size else config.ffn_size,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
        "initializer_range": 0.02,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "scale_attn_weights": True,
    }
    if config.attn_scale_by_layer:
        fields["scale_attn_by_inverse_layer_idx"] = True
    return fields
