"""What ``minherit share family`` does: a folder a depth, and the family's counts beside them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megatron_inherit.base.atomic import refuse_existing, require_space, write_json
from megatron_inherit.base.errors import UsageError
from megatron_inherit.cli.share_place import Stages, choose, measure
from megatron_inherit.cli.transfer import run_transfer
from megatron_inherit.sharing.learngene import require_plan

if TYPE_CHECKING:
    import numpy

    from megatron_inherit.checkpoint.stream import Source
    from megatron_inherit.plan.plan import TransferPlan
    from megatron_inherit.sharing.tensors import FamilyReport

RECORD = "family.json"
MADE_BY = "inherit.json"


def require_steps(auxiliary: int, tuning: int, scratch: int) -> None:
    """Raises UsageError where a ratio of steps would lack a term; none at all, and no tuning, are fine."""
    if (auxiliary or tuning or scratch) and not (auxiliary and scratch):
        raise UsageError(
            "The ratio of steps needs those of the auxiliary and those from scratch.",
            got=f"--auxiliary-steps {auxiliary}, --tuning-steps {tuning}, --scratch-steps {scratch}",
            fix="Give all three, or none for parameters alone.",
        )


def make_family(
    source: Source,
    out: Path,
    report: FamilyReport,
    plan: Callable[[Stages], TransferPlan],
    *,
    place: str,
    windows: numpy.ndarray | None,
    overwrite: bool,
) -> None:
    """Writes a descendant of each depth, and ``family.json`` with stages, zero-shot losses and counts.

    All placements are chosen before the first folder is written. What an interrupted command left of the same family is
    made again.

    Args:
        source: A learngene, or the training checkpoint of an auxiliary.
        out: Folder that gets one folder a depth.
        report: What the family stores and trains.
        plan: Plans the descendant of a placement.
        place: A rule, ``auto``, or a list where there is one depth.
        windows: Descendants are measured on them before any training; None leaves that out.
        overwrite: Replaces existing folders.

    Raises:
        UsageError: A depth does not fit the rule, or a folder exists.
        DiskError: There is no room for all depths.
    """
    folders = {depth: out / f"depth-{depth:02d}" for depth in report.depths}
    for folder in folders.values():
        if (out / RECORD).exists() or not (folder / MADE_BY).exists():
            refuse_existing(folder, overwrite=overwrite, source=source.path)
    chosen = {depth: choose(source, depth, place, windows) for depth in report.depths}
    plans = {depth: plan(choice.stages) for depth, choice in chosen.items()}
    again = {depth for depth, folder in folders.items() if _left_unfinished(folder, plans[depth])}
    for depth in sorted(folders.keys() - again):
        refuse_existing(folders[depth], overwrite=overwrite, source=source.path)
    require_space(out, sum(made.weight_bytes for made in plans.values()))
    (out / RECORD).unlink(missing_ok=True)  # it tells of all members or of none
    rows = []
    for depth, folder in folders.items():
        stages, loss = chosen[depth].stages, chosen[depth].loss
        run_transfer(plans[depth], source, folder, overwrite=overwrite or depth in again, quiet=True)
        if loss is None and windows is not None:
            loss = measure(source, [stages], windows)[stages]
        rows.append({"depth": depth, "stages": stages, "loss": loss})
        told = "" if loss is None else f", {loss:.4f} nats before any training"
        typer.echo(f"{folder}: stages {','.join(map(str, stages))}{told}")
    counts = dataclasses.asdict(report) | {"stored_ratio": report.stored_ratio}
    counts |= {"step_ratio": report.step_ratio} if report.scratch_steps else {}
    facts = {"plan": str(require_plan(source)), "members": rows, "saving": str(report), "counts": counts}
    write_json(out / RECORD, facts)
    typer.echo(str(report))


def _left_unfinished(folder: Path, plan: TransferPlan) -> bool:
    """Tells whether a member is the one that would be made, of a family that never came to its record."""
    if (folder.parent / RECORD).exists() or not (folder / MADE_BY).exists():
        return False
    try:
        told = json.loads((folder / MADE_BY).read_text())
    except ValueError:
        return False
    return isinstance(told, dict) and told.get("plan") == json.loads(json.dumps(plan.to_json()))
