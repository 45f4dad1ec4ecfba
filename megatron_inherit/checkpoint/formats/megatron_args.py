"""The ``args`` of a Megatron checkpoint: the command line it was trained with, and what of it fixes the model.

Names and defaults are those of megatron/training/arguments.py; ``config_from_args`` refuses what no family has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_inherit.arch.families import FAMILIES
from megatron_inherit.arch.model_config import ModelConfig, Rope
from megatron_inherit.arch.tensors import family_of
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.formats.llama3_rope import llama3_scaling, refuse_lost_scaling
from megatron_inherit.checkpoint.formats.pickle_machine import Global
from megatron_inherit.checkpoint.formats.pt_writer import dtype_global
from megatron_inherit.checkpoint.stream import SinkOptions

OWN = "inherit_config"
"""Field with our own description of the model, which Megatron ignores."""

_REFUSED = {
    "num_experts": "mixture-of-experts layers",
    "multi_latent_attention": "multi-latent attention",
    "apply_layernorm_1p": "norm weights stored less one (apply_layernorm_1p)",
    "rotary_interleaved": "interleaved rotary positions",
    "squared_relu": "squared ReLU",
    "quick_geglu": "quick GeGLU",
    "heterogeneous_layers_config_path": "layers of different shapes",
    "heterogeneous_layers_config_encoded_json": "layers of different shapes",
    "mtp_num_layers": "multi-token prediction layers",
    "experimental_attention_variant": "experimental attention",
    "attention_output_gate": "gated attention outputs",
    "apply_residual_connection_post_layernorm": "residual connections behind the norms",
    "no_rope_freq": "layers without rotary positions",
    "qk_l2_norm": "queries and keys of unit length",
    "window_attn_skip_freq": "layers with and without a sliding window",
    "glu_linear_offset": "an offset in its gated MLP",
    "activation_func_clamp_value": "clamped activations",
}
_STRUCTURE = (
    "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "tied", "qkv_bias", "qk_norm",
)  # fmt: skip


def config_from_args(args: Mapping[str, Any], *, where: str) -> ModelConfig:
    """Reads a model's shape.

    Args:
        args: Attributes of the checkpoint's ``args``.
        where: Path for messages.

    Returns:
        The shape. Megatron does not keep the true size of the vocabulary: without ``vocab_size`` it is the padded one.

    Raises:
        CheckpointError: A field is missing, or the model has what the families' rows have no place for.
    """
    for name, what in _REFUSED.items():
        if args.get(name):
            raise CheckpointError(f"{where}: a model with {what} is not supported.", got=f"{name} = {args[name]}")
    if args.get("softmax_type", "vanilla") != "vanilla":
        raise CheckpointError(
            f"{where}: attention sinks are not supported.", got=f"softmax_type {args['softmax_type']}"
        )
    if args.get("fp8"):
        raise CheckpointError(f"{where}: fp8 weights are not supported.", fix="Save the checkpoint without --fp8-*.")
    try:
        config = _read(args)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: its args lack or garble a field.", got=error) from error
    own = args.get(OWN)
    if isinstance(own, dict):
        written = ModelConfig.from_json(own)
        if all(getattr(written, name) == getattr(config, name) for name in _STRUCTURE):
            return written
    return config


def _read(args: Mapping[str, Any]) -> ModelConfig:
    heads, hidden = args["num_attention_heads"], args["hidden_size"]
    rms = args.get("normalization", "LayerNorm") == "RMSNorm"
    kind = args.get("position_embedding_type", "learned_absolute")
    rotary = kind == "rope" or bool(args.get("use_rotary_position_embeddings"))
    bias = bool(args.get("add_bias_linear", True))
    qkv_bias = bias or bool(args.get("add_qkv_bias"))
    qk_norm = bool(args.get("qk_layernorm"))
    window = args.get("window_size")
    groups = args.get("num_query_groups") if args.get("group_query_attention", True) else None
    special = "qwen3" if qk_norm else "qwen2" if qkv_bias and not bias else "mistral" if window else ""
    return ModelConfig(
        family=_family(rms=rms, gated=bool(args.get("swiglu")), rotary=rotary, special=special),
        num_layers=args["num_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=groups or heads,
        head_dim=args.get("kv_channels") or hidden // heads,
        ffn_size=args.get("ffn_hidden_size") or 4 * hidden,
        vocab_size=args.get("vocab_size") or args["padded_vocab_size"],
        max_positions=args.get("max_position_embeddings") or args["seq_length"],
        norm_eps=float(args.get("norm_epsilon") or args.get("layernorm_epsilon") or 1e-5),
        tied=not args.get("untie_embeddings_and_output_weights", False),
        rope=_read_rope(args) if rotary else None,
        qkv_bias=qkv_bias,
        out_bias=bias,
        mlp_bias=bias,
        norm_bias=not rms,
        qk_norm=qk_norm,
        sliding_window=window[0] + 1 if window else None,
    )


def _family(*, rms: bool, gated: bool, rotary: bool, special: str) -> str:
    """Finds the family with these norms, MLP and positions: the special one if it is among them, else the first."""
    fitting = [
        name
        for name, family in FAMILIES.items()
        if (family.norm == "rmsnorm", family.gated, family.positions == "rope") == (rms, gated, rotary)
    ]
    if not fitting:
        raise KeyError(f"a family with RMSNorm {rms}, SwiGLU {gated}, rotary positions {rotary}")
    return special if special in fitting else fitting[0]


def _read_rope(args: Mapping[str, Any]) -> Rope:
    scaling: dict[str, Any] = {}
    if args.get("use_rope_scaling"):
        scaling = llama3_scaling(args.get("rope_scaling_factor", 8.0))
    elif (args.get("rotary_seq_len_interpolation_factor") or 1) != 1:
        scaling = {"rope_type": "linear", "factor": float(args["rotary_seq_len_interpolation_factor"])}
    return Rope(
        theta=float(args.get("rotary_base") or 10000.0),
        scaling=scaling,
        fraction=float(args.get("rotary_percent") or 1.0),
    )


def args_from_config(config: ModelConfig, options: SinkOptions, *, dtype: str, padded_vocab: int) -> dict[str, Any]:
    """Writes the fields that Megatron-LM checks or takes over with ``--use-checkpoint-args``, and our own description.

    Args:
        config: The model.
        options: Parallel sizes and iteration.
        dtype: Type of the weights, safetensors name.
        padded_vocab: Rows of the embedding as stored.

    Raises:
        CheckpointError: Megatron-LM has no such scaling of rotary positions, and would run another function.
    """
    family = family_of(config)
    kind = config.rope.scaling.get("rope_type") if config.rope else None
    if kind not in (None, "llama3", "linear"):
        raise CheckpointError(
            "Megatron-LM's args know no rope scaling but linear and LLaMA 3's.",
            got=kind,
            fix="Use --format hf, whose config.json has it.",
        )
    refuse_lost_scaling(config.rope, "Megatron-LM")
    rope, per_stage = config.rope, config.num_layers // (options.pp * options.vpp)
    args: dict[str, Any] = {
        "num_layers": config.num_layers,
        "encoder_num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_size,
        "num_attention_heads": config.num_heads,
        "group_query_attention": config.num_kv_heads != config.num_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "seq_length": config.max_positions,
        "max_position_embeddings": config.max_positions,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": padded_vocab,
        "make_vocab_size_divisible_by": options.vocab_multiple,
        "untie_embeddings_and_output_weights": not config.tied,
        "position_embedding_type": "rope" if rope else "learned_absolute",
        "add_position_embedding": rope is None,
        "use_rotary_position_embeddings": rope is not None,
        "rotary_base": _number(rope.theta) if rope else 10000,
        "rotary_percent": rope.fraction if rope else 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": rope.scaling["factor"] if rope and kind == "linear" else None,
        "use_rope_scaling": bool(rope and rope.scaling.get("rope_type") == "llama3"),
        "rope_scaling_factor": rope.scaling.get("factor", 8.0) if rope else 8.0,
        "normalization": "RMSNorm" if family.norm == "rmsnorm" else "LayerNorm",
        "norm_epsilon": config.norm_eps,
        "layernorm_epsilon": config.norm_eps,
        "apply_layernorm_1p": False,
        "swiglu": family.gated,
        "add_bias_linear": config.out_bias and config.mlp_bias,
        "add_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_norm,
        "window_size": None if config.sliding_window is None else (config.sliding_window - 1, 0),
        "num_experts": None,
    }
    return args | _run_fields(options, dtype, per_stage) | {OWN: config.to_json()}


def _number(value: float) -> int | float:
    """Gives an integer where it is one: Megatron-LM's option is an integer, its checkpoints may hold any number."""
    return int(value) if value == int(value) else value


def _run_fields(options: SinkOptions, dtype: str, per_stage: int) -> dict[str, Any]:
    params: Global = dtype_global(dtype)
    return {
        "params_dtype": params,
        "bf16": dtype == "BF16",
        "fp16": dtype == "F16",
        "tensor_model_parallel_size": options.tp,
        "pipeline_model_parallel_size": options.pp,
        "virtual_pipeline_model_parallel_size": options.vpp if options.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": per_stage if options.vpp > 1 else None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "world_size": options.tp * options.pp,
        "iteration": options.iteration,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "data_parallel_random_init": False,
        "use_distributed_optimizer": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "no_save_optim": True,
        "no_save_rng": True,
    }
