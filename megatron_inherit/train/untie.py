"""Splits shared stages while a run goes on: [8] -> [4,4] -> [2,2,2,2], at a step or when validation stands still.

The run saves, builds its engine anew under the finer plan and restores from what it saved: every layer gets the weights
and moments of the stage it came from, so that the function, and the next step's loss, do not change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_inherit.base.log import get_logger
from megatron_inherit.eval.runs import read_metrics
from megatron_inherit.sharing.stage_plan import StagePlan, parse_plan
from megatron_inherit.train import resume, upkeep
from megatron_inherit.train.checkpointing import step_folder
from megatron_inherit.train.session import Session
from megatron_inherit.train.stages import change_stages
from megatron_inherit.train.state import RunState

if TYPE_CHECKING:
    from megatron_inherit.config.sharing import UntieStep

logger = get_logger(__name__)


def untie_if_due(run: Session, state: RunState) -> None:
    """Splits the stages where the recipe says so; all ranks call this together."""
    found = next_split(run)
    if found is None:
        return
    losses = [] if found[0].patience is None else losses_since_split(run)
    if is_split_due(found[0], state.step, losses):
        split(run, state, found[1])


def losses_since_split(run: Session) -> list[float]:
    """Gives the validation losses of the run since its stages were last split, oldest first, on every rank.

    A split that a crash undid, for no checkpoint was saved after it, left its row but not its plan.
    """
    losses: list[float] = []
    sharing = run.plan.options.sharing
    if run.is_first and sharing is not None:
        for row in read_metrics(run.plan.output / "metrics.jsonl"):
            if row["kind"] == "untie" and row["plan"] == str(sharing.plan):
                losses = []
            elif row["kind"] == "eval":
                losses.append(math.inf if row["loss"] is None else row["loss"])
    return json.loads(run.engine.gather_text(json.dumps(losses))[0])


def next_split(run: Session) -> tuple[UntieStep, StagePlan] | None:
    """Finds the first split of the recipe that is finer than what the run shares now."""
    sharing = run.plan.options.sharing
    if sharing is None:
        return None
    for rule in run.plan.config.sharing.untie:
        plan = parse_plan(rule.plan)
        if plan != sharing.plan and plan.refines(sharing.plan):
            return rule, plan
    return None


def is_split_due(rule: UntieStep, step: int, losses: Sequence[float]) -> bool:
    """Tells whether a split's step has come, or its number of evaluations without a better loss."""
    if rule.step is not None:
        return step >= rule.step
    patience = rule.patience or 1
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience]) - rule.improvement


def split(run: Session, state: RunState, plan: StagePlan) -> None:
    """Saves, rebuilds the engine under a finer plan and restores."""
    upkeep.save_if_due(run, state, stopping=True)
    change_stages(run, plan)
    resume.restore(step_folder(run.checkpoints, state.step), run.engine, run.identity)
    parameters = run.plan.parameters
    run.metrics.write({"kind": "untie", "step": state.step, "plan": str(plan), "parameters": parameters})
    if run.is_first:
        logger.info("Step %d: stages split into %s, %d parameters.", state.step, plan, parameters)
