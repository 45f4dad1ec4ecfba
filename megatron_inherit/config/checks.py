"""Rules that tie several keys of a recipe together; each names the key to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_inherit.base.errors import ConfigError

if TYPE_CHECKING:
    from megatron_inherit.config.schema import RunConfig


def check_model_source(config: RunConfig) -> None:
    """A model comes from a folder or from a preset; a preset has no weights."""
    model = config.model
    if (model.path is None) == (model.preset is None):
        raise ConfigError(
            "model: exactly one of model.path and model.preset must be given.",
            got="both" if model.path else "neither",
            fix="On the command line the other one can be set to null.",
        )
    if model.preset is not None and model.init == "weights":
        raise ConfigError(
            "model.init: a preset has no weights.", got="weights", expected="random", fix="Set model.init=random."
        )
    if model.path is not None and model.shape:
        raise ConfigError("model.shape: only a preset's shape can be changed.", fix="Remove it, or use model.preset.")


def check_length(config: RunConfig) -> None:
    """A run is as long as its steps or its token budget say."""
    train = config.train
    if (train.steps is None) == (train.budget is None):
        raise ConfigError(
            "train: exactly one of train.steps and train.budget must be given.",
            got="neither" if train.steps is None else "both",
            fix="On the command line the other one can be set to null.",
        )
    tokens = train.global_batch * train.sequence_length
    if train.budget is not None and train.budget < tokens:
        raise ConfigError("train.budget: less than one step.", got=train.budget, expected=f"at least {tokens}")


def check_batch(config: RunConfig) -> None:
    """All global batches are made of whole micro-batches."""
    train, ramp = config.train, config.train.batch_ramp
    sizes = {"train.global_batch": train.global_batch}
    if ramp is not None:
        sizes |= {"train.batch_ramp.start": ramp.start, "train.batch_ramp.increment": ramp.increment}
    for key, size in sizes.items():
        if size % train.micro_batch:
            raise ConfigError(
                f"{key}: not divisible by train.micro_batch.",
                got=f"{size} and {train.micro_batch}",
                fix=f"Use a multiple of {train.micro_batch}, or another train.micro_batch.",
            )
    if ramp is not None and (ramp.start > train.global_batch or (train.global_batch - ramp.start) % ramp.increment):
        raise ConfigError(
            "train.batch_ramp: the batch does not reach train.global_batch in whole increments.",
            got=f"from {ramp.start} by {ramp.increment} to {train.global_batch}",
        )


def check_schedule(config: RunConfig) -> None:
    """The learning rate rises before it falls, and falls downward."""
    schedule, steps = config.schedule, config.train.steps
    if schedule.floor_lr > config.optimizer.lr:
        raise ConfigError(
            "schedule.floor_lr: above optimizer.lr.", got=schedule.floor_lr, expected=f"at most {config.optimizer.lr}"
        )
    if steps is not None:
        refuse_long_warmup(schedule.warmup_steps, steps)
    if schedule.kind in ("cosine", "linear") and (schedule.decay_steps or LONGEST) <= schedule.warmup_steps:
        raise ConfigError(
            "schedule.decay_steps: the floor would be reached during the warm-up.",
            got=schedule.decay_steps,
            expected=f"more than {schedule.warmup_steps}",
        )
    if schedule.kind == "inverse-sqrt" and not schedule.warmup_steps:
        raise ConfigError("schedule.warmup_steps: inverse-sqrt is lr * sqrt(warmup / step) and needs a warm-up.")


def refuse_long_warmup(warmup_steps: int, steps: int) -> None:
    """Refuses a warm-up that is longer than the run; of a token budget the steps are known only before training."""
    if warmup_steps > steps:
        raise ConfigError("schedule.warmup_steps: longer than the run.", got=warmup_steps, expected=f"at most {steps}")


def refuse_zero_with(stage: int, *, pp: int, dtype: str) -> None:
    """Refuses what DeepSpeed cannot combine with a ZeRO stage, for recipes and for engine options alike."""
    if pp > 1:
        raise ConfigError(
            "parallel.pp: ZeRO-2/3 and pipelines exclude each other, and the deepspeed engine runs no pipeline."
            if stage >= 2
            else "parallel.pp: the deepspeed engine runs no pipeline.",
            got=pp,
            expected=1,
            fix="Set parallel.pp=1, or engine=megatron.",
        )
    if stage == 0 and dtype == "bf16":
        raise ConfigError(
            "deepspeed.zero_stage: stage 0 in bf16 takes a phantom optimizer step in DeepSpeed 0.19.8.",
            got=0,
            expected=1,
            fix="Set deepspeed.zero_stage=1 or train.dtype=fp32.",
        )


def check_zero(config: RunConfig) -> None:
    """DeepSpeed's ZeRO-2 and ZeRO-3 exclude pipelines, and it steps a bf16 model only from stage 1 on."""
    if config.engine == "deepspeed":
        refuse_zero_with(config.deepspeed.zero_stage, pp=config.parallel.pp, dtype=config.train.dtype)


def check_kept(config: RunConfig) -> None:
    """Checkpoints that are kept for ever are among those that are saved."""
    checkpoint = config.checkpoint
    if checkpoint.keep_every_steps is not None and checkpoint.keep_every_steps % checkpoint.every_steps:
        raise ConfigError(
            "checkpoint.keep_every_steps: not a multiple of checkpoint.every_steps.",
            got=f"{checkpoint.keep_every_steps} and {checkpoint.every_steps}",
        )


def check_untie(config: RunConfig) -> None:
    """Each split of stages has one reason, and a loss where it waits for one."""
    if config.sharing.untie and config.sharing.keep_zeros:
        raise ConfigError("sharing.keep_zeros: zeros are not kept over sharing.untie.", fix="Leave one of them out.")
    for rule in config.sharing.untie:
        if (rule.step is None) == (rule.patience is None):
            raise ConfigError(
                "sharing.untie: exactly one of step and patience must be given.", got="both" if rule.step else "neither"
            )
        if rule.patience is not None and config.eval.windows is None:
            raise ConfigError("sharing.untie: patience counts evaluations.", fix="Set eval.windows, or give a step.")


def check_distill(config: RunConfig) -> None:
    """A distillation has a teacher, and compares whole hidden states."""
    distill, parallel = config.distill, config.parallel
    if distill.cache is not None and distill.teacher is None:
        raise ConfigError(
            "distill.cache: without the teacher that made it.", fix="Set distill.teacher too; it is only identified."
        )
    if distill.alpha_end is not None and not distill.alpha_steps:
        raise ConfigError("distill.alpha_end: in how many steps?", fix="Set distill.alpha_steps.")
    if distill.alpha_steps and distill.alpha_end is None:
        raise ConfigError("distill.alpha_steps: towards which share?", fix="Set distill.alpha_end.")
    if distill.cache is not None and (distill.kind != "forward" or distill.hidden_weight):
        raise ConfigError(
            "distill.cache: cached targets serve forward KL and nothing else.",
            fix="Set distill.kind=forward and distill.hidden_weight=0, or leave distill.cache out.",
        )
    if distill.hidden_weight and (parallel.sequence_parallel or parallel.cp > 1):
        raise ConfigError(
            "distill.hidden_weight: hidden states are compared whole, and here each rank holds a part of the sequence.",
            fix="Set parallel.sequence_parallel=false and parallel.cp=1, or distill.hidden_weight=0.",
        )


def check_tasks(config: RunConfig) -> None:
    """Tasks are named once, and scored on a model that is not cut into stages."""
    tasks = config.eval.tasks
    if tasks is None:
        return
    if bool(tasks.names) == bool(tasks.suite):
        raise ConfigError(
            "eval.tasks: exactly one of names and suite must be given.", got="both" if tasks.names else "neither"
        )
    if config.parallel.pp > 1:
        raise ConfigError(
            "eval.tasks: tasks cannot be scored during training with a pipeline.",
            got=f"parallel.pp={config.parallel.pp}",
            fix="Set parallel.pp=1, or leave eval.tasks out and run 'minherit evaluate' on the saved checkpoints.",
        )


LONGEST = 1 << 62
CHECKS: tuple[Callable[[RunConfig], None], ...] = (
    check_model_source,
    check_length,
    check_batch,
    check_schedule,
    check_zero,
    check_kept,
    check_distill,
    check_untie,
    check_tasks,
)
