"""Refuses engine options that cannot work, before anything is built; no torch."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import ConfigError
from megatron_inherit.config.checks import refuse_zero_with
from megatron_inherit.engines.base import EngineKind, EngineOptions
from megatron_inherit.sharing.options import Sharing
from megatron_inherit.sharing.partition import Partition
from megatron_inherit.sharing.stage_plan import require_cover

if TYPE_CHECKING:
    from megatron_inherit.sharing.regularise import SoftTie


def check_options(kind: EngineKind, options: EngineOptions, config: ModelConfig, *, world_size: int) -> None:
    """Raises ConfigError, saying what would do, if the options contradict each other, the model or the process count.

    Args:
        kind: ``deepspeed`` or ``megatron``.
        options: What the recipe asks for.
        config: The model.
        world_size: Number of processes.
    """
    _check_sizes(options, config, world_size)
    if options.sharing is None:
        _check_pipeline(options, config)
    else:
        _check_stages(options, options.sharing, config)
    if options.soft_tie is not None:
        _check_soft_tie(options, options.soft_tie, config)
    if kind == "deepspeed":
        _check_deepspeed(options)
    else:
        _check_megatron(options)


def check_batch(options: EngineOptions, *, global_batch: int, sequence_length: int, world_size: int) -> None:
    """Raises ConfigError if the global batch or the sequence does not split over the processes.

    Args:
        options: What the recipe asks for.
        global_batch: Sequences of one optimizer step.
        sequence_length: Tokens of a sequence.
        world_size: Number of processes.
    """
    replicas = options.data_size(world_size)
    unit = options.micro_batch * replicas
    if global_batch % unit:
        raise ConfigError(
            f"train.global_batch: does not split into {replicas} replicas of micro-batches of {options.micro_batch}.",
            got=global_batch,
            expected=f"a multiple of {unit}, such as {_around(global_batch, unit)}",
        )
    pieces = global_batch // unit
    if options.vpp > 1 and pieces % options.pp:
        raise ConfigError(
            "train.global_batch: parallel.vpp needs a multiple of parallel.pp micro-batches a replica.",
            got=f"{pieces} micro-batches for {options.pp} stages",
            expected=f"a global batch that is a multiple of {unit * options.pp}",
        )
    parts = 2 * options.cp if options.cp > 1 else 1
    parts *= options.tp if options.sequence_parallel else 1
    if sequence_length % parts:
        raise ConfigError(
            "train.sequence_length: does not split over context and sequence parallelism.",
            got=sequence_length,
            expected=f"a multiple of {parts}, such as {_around(sequence_length, parts)}",
        )


def _around(value: int, unit: int) -> str:
    low = value // unit * unit
    return f"{low} or {low + unit}" if low else f"{unit}"


def _divisors(value: int) -> str:
    return ", ".join(str(d) for d in range(1, value + 1) if value % d == 0)


def require_replicas(options: EngineOptions, world_size: int) -> None:
    """Raises ConfigError unless so many processes are whole replicas of the model."""
    ranks = options.tp * options.pp * options.cp
    if world_size % ranks:
        raise ConfigError(
            f"parallel: {world_size} processes do not split into replicas of tp {options.tp}, pp {options.pp}, "
            f"cp {options.cp}.",
            expected=f"a multiple of {ranks} processes",
        )


def _check_sizes(options: EngineOptions, config: ModelConfig, world_size: int) -> None:
    for name in ("tp", "pp", "vpp", "cp", "micro_batch"):
        if getattr(options, name) < 1:
            key = "train.micro_batch" if name == "micro_batch" else f"parallel.{name}"
            raise ConfigError(f"{key}: must be at least 1.", got=getattr(options, name))
    require_replicas(options, world_size)
    for what, count in (
        ("attention heads", config.num_heads),
        ("key/value groups", config.num_kv_heads),
        ("MLP columns", config.ffn_size),
    ):
        if count % options.tp:
            raise ConfigError(
                f"parallel.tp: {options.tp} does not divide the {count} {what} of the model.",
                expected=f"tp among {_divisors(config.num_kv_heads)}",
            )
    if options.sequence_parallel and options.tp == 1:
        raise ConfigError(
            "parallel.sequence_parallel: needs tensor parallelism.", fix="Set parallel.tp to 2 or more, or turn it off."
        )
    if options.vpp > 1 and options.pp == 1:
        raise ConfigError(
            "parallel.vpp: needs a pipeline.", got=f"vpp {options.vpp}, pp 1", fix="Set parallel.vpp to 1."
        )
    if options.clip < 0 or options.eps <= 0 or not all(0 <= beta < 1 for beta in options.betas):
        raise ConfigError("optimizer: clip must be >= 0, eps > 0 and both betas in [0, 1).")


def _check_pipeline(options: EngineOptions, config: ModelConfig) -> None:
    chunks = options.pp * options.vpp
    uneven = [n for n in (options.first_stage_layers, options.last_stage_layers) if n is not None]
    if uneven:
        if options.vpp > 1 or options.pp < 2:
            raise ConfigError("parallel: first_stage_layers and last_stage_layers need pp >= 2 and vpp = 1.")
        rest, stages = config.num_layers - sum(uneven), options.pp - len(uneven)
        if min(uneven) < 1 or rest < stages or (stages and rest % stages) or (not stages and rest):
            raise ConfigError(
                "parallel.first_stage_layers, last_stage_layers: the blocks left do not split over the other stages.",
                got=f"{rest} blocks over {stages} stages",
            )
    elif config.num_layers % chunks:
        total = config.num_layers
        fits = [f"{p}x{v}" for p in range(1, total + 1) for v in range(1, total // p + 1) if total % (p * v) == 0]
        fits = [pair for pair in fits if pair.endswith("x1") or not pair.startswith("1x")]
        raise ConfigError(
            f"parallel.pp: {total} blocks do not split into pp {options.pp} x vpp {options.vpp} equal chunks.",
            expected=f"pp x vpp among {', '.join(fits)}",
            fix="Or set parallel.first_stage_layers and last_stage_layers.",
        )


def _check_stages(options: EngineOptions, sharing: Sharing, config: ModelConfig) -> None:
    require_cover(sharing.plan, config)
    if options.first_stage_layers or options.last_stage_layers:
        raise ConfigError(
            "parallel.first_stage_layers, last_stage_layers: with shared stages the pipeline is cut between them.",
            fix="Leave first_stage_layers and last_stage_layers out.",
        )
    sharing.partition(options.pp, options.vpp)
    if sharing.low_rank and options.tp > 1:
        raise ConfigError("sharing.low_rank: is not cut by tensor parallelism.", fix="Set parallel.tp to 1.")
    most = min(config.hidden_size, config.num_heads * config.head_dim, config.ffn_size)
    if sharing.low_rank > most:
        raise ConfigError(
            "sharing.low_rank: more than the matrices have.", got=sharing.low_rank, expected=f"0 to {most}"
        )


def _check_soft_tie(options: EngineOptions, tie: SoftTie, config: ModelConfig) -> None:
    require_cover(tie.plan, config)
    if tie.kind == "group_lasso" and options.tp > 1:
        raise ConfigError(
            "sharing.soft_tie.kind: group_lasso takes distances of whole matrices, and here each rank holds a part.",
            fix="Set parallel.tp=1, or sharing.soft_tie.kind=l2.",
        )
    apart = Partition(tie.plan, options.pp, options.vpp, _bounds(options, config.num_layers)).ties
    if apart:
        raise ConfigError(
            "sharing.soft_tie.plan: a stage lies on several pipeline ranks.",
            got=f"{apart[0].component} {apart[0].physical} of {tie.plan} on ranks {apart[0].ranks}",
            fix="Put the stages' ends where the pipeline is cut, or set parallel.pp=1.",
        )


def _bounds(options: EngineOptions, num_layers: int) -> tuple[int, ...]:
    """Gives the first layer of each pipeline chunk and the depth, as the engine cuts the model."""
    if options.sharing is not None:
        return options.sharing.partition(options.pp, options.vpp).bounds
    chunks = options.pp * options.vpp
    first, last = options.first_stage_layers, options.last_stage_layers
    stages = chunks - (first is not None) - (last is not None)
    equal = (num_layers - (first or 0) - (last or 0)) // max(1, stages)
    sizes = ([first] if first else []) + [equal] * stages + ([last] if last else [])
    return tuple(itertools.accumulate(sizes, initial=0))


def _check_deepspeed(options: EngineOptions) -> None:
    if options.sharing is not None and options.sharing.relaxed and options.zero_stage == 3:
        raise ConfigError("sharing.gates, sharing.low_rank: not for ZeRO-3.", fix="Set deepspeed.zero_stage to 2.")
    if options.zero_stage not in (0, 1, 2, 3):
        raise ConfigError("deepspeed.zero_stage: must be 0, 1, 2 or 3.", got=options.zero_stage)
    refuse_zero_with(options.zero_stage, pp=options.pp, dtype=options.dtype)
    if options.cp > 1:
        raise ConfigError(
            "parallel.cp: the deepspeed engine has no context parallelism.",
            fix="Set parallel.cp to 1 or take engine=megatron.",
        )
    if options.offload != "none" and options.zero_stage == 0:
        raise ConfigError(
            "deepspeed.offload: needs ZeRO.", fix="Set deepspeed.zero_stage to 1, 2 or 3, or deepspeed.offload to none."
        )
    if options.nvme_path and (options.offload == "none" or options.zero_stage < 3):
        raise ConfigError(
            "deepspeed.nvme_path: the optimizer state is kept on a disk with ZeRO-3 and deepspeed.offload only.",
            got=f"zero_stage {options.zero_stage}, offload {options.offload}",
            fix="Set deepspeed.zero_stage=3 and deepspeed.offload=optimizer or all, or leave deepspeed.nvme_path out.",
        )
    if options.offload == "all" and options.zero_stage < 3:
        raise ConfigError(
            "deepspeed.offload: of the weights too, it needs ZeRO-3.",
            fix="Set deepspeed.zero_stage to 3 or deepspeed.offload to optimizer.",
        )


def _check_megatron(options: EngineOptions) -> None:
    if options.offload != "none":
        raise ConfigError(
            "deepspeed.offload: the megatron engine does not offload.",
            fix="Take engine=deepspeed or set deepspeed.offload to none.",
        )
    if options.overlap_param_gather and not (options.distributed_optimizer and options.overlap_grad_reduce):
        raise ConfigError(
            "megatron.overlap_param_gather: needs megatron.distributed_optimizer and megatron.overlap_grad_reduce."
        )
