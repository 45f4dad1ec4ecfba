"""``minherit grow``: students of a teacher, ever deeper, until one matches it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_inherit.study.growth_recipes import GrowthPlan

app = typer.Typer(help="Grow a student until it matches its teacher.", rich_markup_mode=None, no_args_is_help=True)


@app.command()
def grow(
    recipe: Annotated[str, typer.Argument(help="Recipe name or path of a YAML file; its model is the teacher.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value words, such as grow.tolerance=0.01.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of each training, started by torchrun.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, show the rounds there can be, and stop.")] = False,
) -> None:
    """Train or take the teacher, then students of n = k/2, +2, ... blocks until one has its validation loss.

    Run again to go on after an interruption. The folder's grow.json keeps every decision with its figures, and
    'student' in it leads to the student that matched.
    """
    from megatron_inherit.config.load import load_recipe
    from megatron_inherit.study.arms import Trainer
    from megatron_inherit.study.grow import grow as carry_out
    from megatron_inherit.study.growth_recipes import plan_growth

    plan = plan_growth(load_recipe(recipe, overrides or []), processes=processes)
    if dry_run:
        for line in _forecast(plan):
            typer.echo(line)
        return
    with Trainer(processes) as runs:
        carry_out(plan, runs)
    for line in _summary(plan.folder):
        typer.echo(line)


def _forecast(plan: GrowthPlan) -> list[str]:
    from megatron_inherit.arch.counts import count_parameters
    from megatron_inherit.base.quantities import format_count
    from megatron_inherit.study.growth_recipes import START
    from megatron_inherit.train.schedule import total_steps

    steps = total_steps(plan.student_recipe(plan.folder / START, "round"))
    section, rule = plan.config.grow, plan.rule
    teacher = "taken from" if plan.takes_teacher else f"trained for {plan.teacher.total_steps} steps in"
    lines = [f"teacher   {rule.depth} blocks, {teacher} {plan.teacher_path}"]
    if section.control:
        lines.append(f"control   {rule.start} blocks, random, {steps} steps; vacuous below {rule.margin:g} nats")
    for number, depth in enumerate(rule.depths, start=1):
        size = format_count(count_parameters(plan.model.with_layers(depth)))
        scored = section.mode == "patch" and number > 1
        lines.append(
            f"round {number:2}  {depth} blocks, {size} parameters, {'patched, scored' if scored else f'{steps} steps'}"
        )
    lines.append(f"ends      at the first round within {rule.tolerance:g} nats of the teacher ({section.mode})")
    return lines


def _summary(folder: Path) -> list[str]:
    from megatron_inherit.cli.evaluate import aligned
    from megatron_inherit.eval.growth_table import RECORD, read_growth
    from megatron_inherit.study.grow import STUDENT

    found = read_growth(folder / RECORD)
    if found is None:
        return []
    table = [["", "blocks", "steps", "loss", "above the teacher", "decision"]]
    for row in (found.teacher, *found.rows):
        gap = "" if row.gap is None else _pair(row.gap, row.gap_stderr)
        table.append([row.name, str(row.layers), str(row.steps), _pair(row.loss, row.stderr), gap, row.decision])
    where = f": {folder / STUDENT}" if found.has_student else ""
    return [*aligned(table), " ".join(filter(None, [f"{found.verdict}{where}.", found.caution]))]


def _pair(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
