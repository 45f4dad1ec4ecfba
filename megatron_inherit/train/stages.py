"""Which stages a run shares now: those of the recipe, then those of its splits, and back with an older checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_inherit.base.log import get_logger
from megatron_inherit.checkpoint.formats import native
from megatron_inherit.sharing.learngene import plan_of
from megatron_inherit.sharing.stage_plan import StagePlan, parse_plan

if TYPE_CHECKING:
    from megatron_inherit.train.session import Session

logger = get_logger(__name__)


def change_stages(run: Session, plan: StagePlan) -> None:
    """Builds the engine anew under another stage plan; its weights are to be restored."""
    from megatron_inherit.model.load import random_reader
    from megatron_inherit.train.objectives import distill_of

    sharing = run.plan.options.sharing
    if sharing is None:
        return
    changed = dataclasses.replace(sharing, plan=plan)
    options, parameters = dataclasses.replace(run.plan.options, sharing=changed), changed.parameters(run.plan.model)
    run.plan = dataclasses.replace(run.plan, options=options, parameters=parameters)
    run.identity = dataclasses.replace(run.identity, stages=plan.to_json())
    distill = distill_of(run.plan.config, run.plan.model, run.loader, run.plan.total_samples)
    run.engine.rebuild(options, random_reader(run.plan.model, 0), distill)


def follow_checkpoint(run: Session, folder: Path) -> None:
    """Takes the stages of a checkpoint of this run that lies on the other side of a split.

    The newest one, after whose stages the engine was built, may be damaged, or is rolled back from.
    """
    sharing = run.plan.options.sharing
    stored = native.read_json(folder / native.STATE)["identity"].get("stages")
    if sharing is None or stored is None:
        return
    plan = StagePlan.from_json(stored)
    if plan != sharing.plan and plan in _plans_of_recipe(run):
        if run.is_first:
            logger.info("The stages are %s again, those of %s.", plan, folder.name)
        change_stages(run, plan)


def _plans_of_recipe(run: Session) -> list[StagePlan]:
    """Gives the plan that the recipe begins with and those of its splits; none where it splits nothing."""
    section, source = run.plan.config.sharing, run.plan.source
    if not section.untie:
        return []
    first = parse_plan(section.plan) if section.plan else None if source is None else plan_of(source)
    return [*([] if first is None else [first]), *(parse_plan(rule.plan) for rule in section.untie)]
