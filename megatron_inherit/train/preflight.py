"""Resolves a recipe against its files and processes and refuses what cannot work; needs no torch."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_inherit.arch.counts import count_parameters
from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.presets import preset
from megatron_inherit.base.errors import ConfigError
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.checkpoint.stream import Source
from megatron_inherit.config.checks import refuse_long_warmup
from megatron_inherit.config.schema import RunConfig
from megatron_inherit.engines.base import EngineOptions
from megatron_inherit.engines.check import check_batch, check_options, require_replicas
from megatron_inherit.sharing.options import Sharing
from megatron_inherit.train.objectives import sharing_of, soft_tie_of, stored_config, teacher_of
from megatron_inherit.train.schedule import BatchPlan, Schedule, batch_plan, schedule_of, total_steps


@dataclass(frozen=True)
class RunPlan:
    """A recipe with everything that follows from it.

    Attributes:
        config: The recipe.
        model: Shape of the model.
        source: Checkpoint whose weights it starts from; None for a preset.
        options: The engine's.
        world_size: Number of processes.
        total_steps: Optimizer steps of the run.
        batches, schedule: Batch size and learning rate.
        parameters: Of the model, shared ones once.
        checkpoint_bytes: Of one checkpoint.
    """

    config: RunConfig
    model: ModelConfig
    source: Source | None
    options: EngineOptions
    world_size: int
    total_steps: int
    batches: BatchPlan
    schedule: Schedule
    parameters: int
    checkpoint_bytes: int

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.output)

    @property
    def total_samples(self) -> int:
        """Sequences of the whole run."""
        return self.batches.samples_after(self.total_steps)

    @property
    def hf_config(self) -> Mapping[str, Any] | None:
        """The ``config.json`` that checkpoints carry, if there is one."""
        return stored_config(self.config, self.model, self.source, self.options.sharing)

    def summary(self) -> dict[str, Any]:
        """Gives what a person wants to know before starting."""
        return {
            "model": f"{self.model.family}, {self.model.num_layers} layers, {self.parameters} parameters",
            **({"sharing": str(self.options.sharing.plan)} if self.options.sharing else {}),
            "engine": self.config.engine,
            "processes": self.world_size,
            "replicas": self.options.data_size(self.world_size),
            "steps": self.total_steps,
            "tokens": self.total_samples * self.config.train.sequence_length,
            "checkpoint_bytes": self.checkpoint_bytes,
        }


def plan_run(config: RunConfig, *, world_size: int | None = None) -> RunPlan:
    """Opens the model's headers and checks what can be checked before anything is built.

    Args:
        config: The recipe.
        world_size: Number of processes; default ``WORLD_SIZE`` of the environment.

    Raises:
        ConfigError: The recipe does not fit the model or the number of processes.
        CheckpointError: The model's folder is missing or damaged.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    source = None if config.model.path is None else open_source(config.model.path)
    model = _preset_of(config) if source is None else source.config
    if not config.model.residual:
        model = dataclasses.replace(model, residual=False)
    options = engine_options(config, sharing_of(config, model, source))
    teacher_of(config, model)
    check_options(config.engine, options, model, world_size=world_size)
    batches = batch_plan(config)
    _check_sizes(options, config, world_size)
    if config.train.sequence_length > model.max_positions:
        raise ConfigError(
            "train.sequence_length: longer than the model's positions.",
            got=config.train.sequence_length,
            expected=f"at most {model.max_positions}",
        )
    schedule = schedule_of(config)
    refuse_long_warmup(schedule.warmup_steps, schedule.total_steps)
    shared = options.sharing
    parameters = count_parameters(model) if shared is None else shared.parameters(model)
    return RunPlan(
        config=config,
        model=model,
        source=source,
        options=options,
        world_size=world_size,
        total_steps=total_steps(config),
        batches=batches,
        schedule=schedule,
        parameters=parameters,
        checkpoint_bytes=parameters * CHECKPOINT_BYTES[config.train.dtype],
    )


CHECKPOINT_BYTES: Mapping[str, int] = {"fp32": 12, "bf16": 14}
"""Bytes a parameter: weight, two fp32 moments, and in bf16 training an fp32 master."""


def engine_options(config: RunConfig, sharing: Sharing | None = None) -> EngineOptions:
    """Translates a recipe for the engines."""
    train, optimizer, parallel = config.train, config.optimizer, config.parallel
    return EngineOptions(
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
        zero_stage=config.deepspeed.zero_stage,
        offload=config.deepspeed.offload if config.engine == "deepspeed" else "none",
        nvme_path=(config.deepspeed.nvme_path or "") if config.engine == "deepspeed" else "",
        aio=config.deepspeed.aio.model_dump(),
        distributed_optimizer=config.megatron.distributed_optimizer,
        overlap_grad_reduce=config.megatron.overlap_grad_reduce,
        overlap_param_gather=config.megatron.overlap_param_gather,
        micro_batch=train.micro_batch,
        dtype=train.dtype,
        recompute=train.recompute,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip=optimizer.clip,
        deterministic=train.deterministic,
        timeout_s=parallel.timeout_seconds,
        sharing=sharing,
        soft_tie=soft_tie_of(config),
        keep_zeros=config.sharing.keep_zeros,
    )


def check_batches(config: RunConfig, world_size: int) -> None:
    """Raises ConfigError unless so many processes can share the recipe's batches; opens no file."""
    options = engine_options(config)
    require_replicas(options, world_size)
    _check_sizes(options, config, world_size)


def _check_sizes(options: EngineOptions, config: RunConfig, world_size: int) -> None:
    for size in _batch_sizes(batch_plan(config)):
        check_batch(options, global_batch=size, sequence_length=config.train.sequence_length, world_size=world_size)


def passes_wait(plan: RunPlan) -> bool:
    """Tells whether a rank's passes through its part of the model wait for those of others."""
    options = plan.options
    gathers = options.zero_stage == 3 if plan.config.engine == "deepspeed" else options.overlap_param_gather
    return options.tp > 1 or options.cp > 1 or gathers


def _preset_of(config: RunConfig) -> ModelConfig:
    section = config.model
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    for name in section.shape:
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.3)
            hint = f" Nearest: model.shape.{nearest[0]}." if nearest else ""
            raise ConfigError(f"model.shape.{name}: unknown key.{hint}")
    shape: dict[str, Any] = dict(section.shape)
    return dataclasses.replace(preset(section.preset or ""), **shape)


def _batch_sizes(batches: BatchPlan) -> list[int]:
    if batches.ramp is None:
        return [batches.full]
    return list(range(batches.ramp.start, batches.full + 1, batches.ramp.increment))
