"""What a recipe's ``sharing`` and ``distill`` sections mean for a run: stages of weights, and a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import ConfigError
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.checkpoint.formats.hf_config import write_config
from megatron_inherit.checkpoint.stages import KEY
from megatron_inherit.checkpoint.stream import Source
from megatron_inherit.sharing.learngene import plan_of
from megatron_inherit.sharing.options import Sharing
from megatron_inherit.sharing.regularise import SoftTie
from megatron_inherit.sharing.stage_plan import StagePlan, parse_plan, require_cover

if TYPE_CHECKING:
    from megatron_inherit.config.schema import RunConfig
    from megatron_inherit.config.sharing import SharingSection
    from megatron_inherit.data.loader import Loader
    from megatron_inherit.distill.options import Distill

DTYPES = {"fp32": "F32", "bf16": "BF16"}


def sharing_of(config: RunConfig, model: ModelConfig, source: Source | None) -> Sharing | None:
    """Finds a run's stages: the recipe's, else those of the learngene or checkpoint it starts from.

    Raises:
        ConfigError: The plan does not cover the model, or options of shared stages come without any.
    """
    section = config.sharing
    own = None if source is None else plan_of(source)
    plan = parse_plan(section.plan) if section.plan else own
    if own is not None and plan is not None and config.model.init == "weights":
        _refuse_merged(plan, own)
    if plan is None:
        _refuse_without_stages(section)
        return None
    require_cover(plan, model)
    before = plan
    for rule in section.untie:
        finer = parse_plan(rule.plan)
        _require_split(finer, before)
        before = finer
    plan = _plan_of_newest(Path(config.run.output) / "checkpoints", config) or plan
    return Sharing(
        plan=plan,
        allow_cross_rank=section.allow_cross_rank,
        gradient=section.gradient,
        guard_every_steps=section.guard_every_steps,
        gates=section.gates,
        low_rank=section.low_rank,
    )


def soft_tie_of(config: RunConfig) -> SoftTie | None:
    """Gives the pull between layers that a recipe asks for."""
    section = config.sharing.soft_tie
    if section is None:
        return None
    plan = parse_plan(section.plan)
    return SoftTie(plan=plan, weight=section.weight, kind=section.kind, fade_steps=section.fade_steps)


def _refuse_merged(plan: StagePlan, own: StagePlan) -> None:
    if plan.num_layers == own.num_layers and not plan.refines(own):
        raise ConfigError(
            "sharing.plan: merges stages of model.path, whose weights differ.",
            got=str(plan),
            expected=f"{own}, or a split of it",
            fix="Leave sharing.plan out; or expand it (minherit share expand), and share that.",
        )


def _refuse_without_stages(section: SharingSection) -> None:
    for name in ("allow_cross_rank", "untie", "gates", "low_rank"):
        if getattr(section, name):
            raise ConfigError(
                f"sharing.{name}: the model shares no stages.",
                fix=f"Set sharing.plan, start from a learngene, or leave sharing.{name} out.",
            )


def _require_split(fine: StagePlan, coarse: StagePlan) -> None:
    if not fine.refines(coarse) or fine == coarse:
        raise ConfigError(
            "sharing.untie: not a split of the stages before.",
            got=f"{fine} after {coarse}",
            fix="Let every new stage lie within an old one.",
        )


def _plan_of_newest(folder: Path, config: RunConfig) -> StagePlan | None:
    """Gives the plan of a run's newest checkpoint where a split of the recipe made it."""
    if not config.sharing.untie or not folder.is_dir():
        return None
    from megatron_inherit.checkpoint.formats.native import STATE, read_json
    from megatron_inherit.train.checkpointing import list_steps, step_folder

    for step in reversed(list_steps(folder)):
        state = step_folder(folder, step) / STATE
        if state.is_file():
            stages = read_json(state).get("identity", {}).get("stages")
            found = None if stages is None else StagePlan.from_json(stages)
            return found if found in [parse_plan(rule.plan) for rule in config.sharing.untie] else None
    return None


def stored_config(
    config: RunConfig, model: ModelConfig, source: Source | None, sharing: Sharing | None
) -> Mapping[str, Any] | None:
    """Gives the ``config.json`` that a run's checkpoints carry, with the stages they share."""
    raw = None if source is None else source.hf_config
    if sharing is None:
        return raw if raw is None else {name: value for name, value in raw.items() if name != KEY}
    return {**(raw or write_config(model, DTYPES[config.train.dtype])), KEY: sharing.plan.to_json()}


def teacher_of(config: RunConfig, model: ModelConfig) -> Source | None:
    """Opens the teacher a recipe names, online or as the maker of its cache.

    Raises:
        ConfigError: It does not fit the student.
        CheckpointError: It is missing or damaged.
    """
    section = config.distill
    if section.teacher is None:
        return None
    from megatron_inherit.distill.teacher import check_teacher

    teacher = open_source(section.teacher)
    check_teacher(
        teacher.config,
        model,
        sequence_length=config.train.sequence_length,
        hidden=section.hidden_weight > 0,
        tp=1 if section.cache else config.parallel.tp,
    )
    return teacher


def distill_of(config: RunConfig, model: ModelConfig, loader: Loader, samples: int) -> Distill | None:
    """Prepares a distillation, or gives None where the recipe has none.

    Args:
        config: The recipe.
        model: The student.
        loader: The run's samples.
        samples: How many of them the run takes.

    Raises:
        ConfigError: The teacher does not fit the student.
        DataError: The cache was made by another teacher, for other data, another order or temperature, or is too short.
    """
    section = config.distill
    teacher = teacher_of(config, model)
    if teacher is None:
        return None
    from megatron_inherit.distill.losses import Mix
    from megatron_inherit.distill.options import Distill

    mix = Mix(**section.model_dump(exclude={"teacher", "cache"}))
    if section.cache is None:
        return Distill(mix=mix, teacher=teacher)
    from megatron_inherit.distill.cache import CachedTargets, cache_key

    key = cache_key(teacher, loader, temperature=section.temperature)
    cache = CachedTargets(Path(section.cache), key)
    cache.require(samples)
    return Distill(mix=mix, cache=cache)
