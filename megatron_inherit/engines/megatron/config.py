"""Engine options in the words of Megatron-Core: gradient buffers, optimizer, fields of the model's configuration."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from megatron_inherit.base.log import get_logger
from megatron_inherit.engines.base import EngineOptions
from megatron_inherit.model.build import DTYPES, Parallel

_log = get_logger(__name__)


def parallel_of(options: EngineOptions) -> Parallel:
    """Picks what the model needs to know of the layout."""
    return Parallel(
        tp=options.tp,
        pp=options.pp,
        vpp=options.vpp,
        cp=options.cp,
        sequence_parallel=options.sequence_parallel,
        first_stage_layers=options.first_stage_layers,
        last_stage_layers=options.last_stage_layers,
    )


def model_fields(options: EngineOptions) -> dict[str, Any]:
    """Gives the fields of TransformerConfig that depend on the engine.

    The interleaved schedule sends one message a peer and direction at a time: batched ones mix up the two that a
    pair of ranks exchanges when there are two stages.
    """
    fused = torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    if fused:
        _log.info("Weight gradients accumulate inside apex's fused matrix product.")
    return {
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": fused,
        "overlap_p2p_comm": options.vpp > 1,
        "batch_p2p_comm": options.pp > 1 and options.vpp == 1,
        "variable_seq_lengths": False,
        "deterministic_mode": False,
        "reentrant": True,
    }


def pipeline_layout(options: EngineOptions) -> str | None:
    """Gives the blocks of each pipeline chunk in Megatron-Core's form where stages decide them."""
    if options.sharing is None or options.pp == 1:
        return None
    return options.sharing.partition(options.pp, options.vpp).layout()


def buffer_config(options: EngineOptions) -> DistributedDataParallelConfig:
    """Configures the gradient buffers: fp32 sums, reduced once a step."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=options.distributed_optimizer,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
    )


def optimizer_config(options: EngineOptions) -> OptimizerConfig:
    """Configures AdamW; the learning rate comes with each step, clipping is the engine's."""
    dtype = DTYPES[options.dtype]
    return OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        min_lr=0.0,
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        adam_eps=options.eps,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        clip_grad=0.0,
        use_distributed_optimizer=options.distributed_optimizer,
        overlap_param_gather=options.overlap_param_gather,
    )
