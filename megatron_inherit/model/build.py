"""Makes the model of a configuration: this rank's stage, or its chunks of stages, with weights still undefined."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import family_of
from megatron_inherit.model.cpu import cuda_means_cpu
from megatron_inherit.model.groups import make_groups, start_processes
from megatron_inherit.model.language_model import LanguageModel
from megatron_inherit.model.specs import block_spec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CUDA_VOCAB_MULTIPLE = 128
"""Rows of the embedding a tensor parallel rank are a multiple of this on a GPU, whose matrix units want it."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How a model is cut; the sizes must be those of the process groups.

    Attributes:
        tp, pp, vpp, cp: Tensor, pipeline, virtual pipeline and context parallel sizes.
        sequence_parallel: Splits activations between the tensor parallel regions along the sequence too.
        first_stage_layers, last_stage_layers: Blocks of the first and last stage where they are to differ.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None


@dataclass
class DecoderConfig(TransformerConfig):
    """Megatron-Core's configuration and what our blocks need besides.

    Attributes:
        norm_bias, out_bias: Whether norms and the attention's output projection have biases.
        residual: Whether blocks add their input to what they compute.
        recompute: ``none``, ``selective`` or ``full``, see ``engines.base.EngineOptions``.
        reentrant: Whether Megatron-Core's recomputation does it, in a backward pass of its own for each block, or
            torch's non-reentrant one, within the only backward pass.
    """

    norm_bias: bool = False
    out_bias: bool = False
    residual: bool = True
    recompute: str = "none"
    reentrant: bool = False


def decoder_config(
    model: ModelConfig, parallel: Parallel, *, dtype: torch.dtype, recompute: str = "none", **more: Any
) -> DecoderConfig:
    """Translates our description of a model into Megatron-Core's.

    Args:
        model: The model.
        parallel: How it is cut.
        dtype: Of weights and activations.
        recompute: What the backward pass computes anew.
        more: Fields of TransformerConfig that an engine sets.
    """
    family = family_of(model)
    return DecoderConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_size,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm" if family.norm == "rmsnorm" else "LayerNorm",
        gated_linear_unit=family.gated,
        activation_func=F.silu if family.gated else F.gelu,
        add_bias_linear=model.mlp_bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        norm_bias=model.norm_bias,
        out_bias=model.out_bias,
        residual=model.residual,
        recompute=recompute,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        **({"gradient_accumulation_fusion": False} | more),
    )


def padded_vocab(model: ModelConfig, tp: int) -> int:
    """Gives the embedding's rows with padding: a multiple of ``tp``, on a GPU of 128 a rank."""
    unit = tp * (CUDA_VOCAB_MULTIPLE if torch.cuda.is_available() else 1)
    return -(-model.vocab_size // unit) * unit


def build_chunks(
    model: ModelConfig, config: DecoderConfig, groups: ProcessGroupCollection, device: torch.device
) -> Iterator[LanguageModel]:
    """Makes this rank's part of the model, one chunk a virtual stage, uninitialised.

    Args:
        model: The model.
        config: What ``decoder_config`` gave.
        groups: Process groups of the same sizes.
        device: Where the weights live.
    """
    chunks = config.virtual_pipeline_model_parallel_size or 1
    stage, last = groups.pp.rank(), groups.pp.size() - 1
    for chunk in range(chunks):
        vp_stage = chunk if chunks > 1 else None
        with cuda_means_cpu():
            part = LanguageModel(
                model,
                config=config,
                transformer_layer_spec=block_spec(config, pp_rank=stage, vp_stage=vp_stage),
                vocab_size=padded_vocab(model, groups.tp.size()),
                pre_process=stage == 0 and chunk == 0,
                post_process=stage == last and chunk == chunks - 1,
                pg_collection=groups,
                vp_stage=vp_stage,
            )
        _mark_tensor_parallel(part)
        yield part.to(device=device, dtype=config.params_dtype)


def _mark_tensor_parallel(part: LanguageModel) -> None:
    """Marks the weights that tensor ranks share out, which Megatron-Core does only while it initialises them.

    Unmarked, they count as copies of rank 0's and the gradient's norm misses the other ranks'.
    """
    axes = ((ColumnParallelLinear, 0), (VocabParallelEmbedding, 0), (RowParallelLinear, 1))
    for module in part.modules():
        for kind, axis in axes:
            if isinstance(module, kind) and module.weight is not None:
                marks = {"tensor_model_parallel": True, "partition_dim": axis, "partition_stride": 1}
                for name, value in marks.items():
                    setattr(module.weight, name, value)


def build_single(model: ModelConfig, *, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Makes a whole model in this process, without an engine; its values are undefined until they are loaded."""
    device = start_processes()
    groups = make_groups()
    config = decoder_config(model, Parallel(), dtype=dtype)
    return next(build_chunks(model, config, groups, device))
