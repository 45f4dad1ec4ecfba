"""What a dry run does: everything that can refuse a run before its engine is built, and nothing that is left behind."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from megatron_inherit.base.optional import require
from megatron_inherit.checkpoint.formats import native
from megatron_inherit.train.checkpointing import list_steps, step_folder
from megatron_inherit.train.inputs import identity_of, open_data, read_side_files
from megatron_inherit.train.objectives import distill_of
from megatron_inherit.train.preflight import RunPlan
from megatron_inherit.train.resume import refuse_checkpoints
from megatron_inherit.train.session import Resume, read_skipped, require_room
from megatron_inherit.train.start import refuse_other_length, refuse_other_start
from megatron_inherit.train.state import RunState
from megatron_inherit.train.tasks import open_tasks

if TYPE_CHECKING:
    from megatron_inherit.data.loader import Loader


def rehearse(plan: RunPlan, *, resume: Resume = "auto") -> None:
    """Opens what a run reads, looks for the packages it needs, and compares it with what its folder holds.

    Args:
        plan: The resolved recipe.
        resume: As of the run.

    Raises:
        MinheritError: The run would end before its first step.
    """
    _require_packages(plan)
    loader, _ = open_data(plan, rank=0)
    distill_of(plan.config, plan.model, loader, plan.total_samples)
    if plan.config.eval.tasks is not None:
        open_tasks(plan, read_side_files(plan, loader))
    require_room(plan)
    if resume == "never":
        refuse_checkpoints(plan.output / "checkpoints")
    _refuse_other_run(plan, loader)


def _require_packages(plan: RunPlan) -> None:
    """Looks for packages without importing them, which some machines without a GPU cannot."""
    wanted = {"megatron.core": "the model"}
    wanted |= {str(name): f"logging.loggers={name}" for name in plan.config.logging.loggers}
    if plan.config.engine == "deepspeed":
        wanted["deepspeed"] = "engine=deepspeed"
    for module, why in wanted.items():
        if find_spec(module.partition(".")[0]) is None:
            require(module, why)


def _refuse_other_run(plan: RunPlan, loader: Loader) -> None:
    """Compares with the newest checkpoint; one that is damaged is the run's own affair, which looks at all of them."""
    folder = plan.output / "checkpoints"
    steps = list_steps(folder)
    if not steps:
        return
    refuse_other_start(plan)
    newest = step_folder(folder, steps[-1])
    stored = native.read_json(newest / native.STATE)
    identity_of(plan, loader).refuse_other(stored["identity"], newest)
    refuse_other_length(plan, RunState.from_json(stored["run"]), read_skipped(plan.output))
