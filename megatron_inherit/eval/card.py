"""What a run adds to the model card of the student it trained: figures, tasks, curves, all from the run's files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_inherit.base.atomic import write_bytes, write_text
from megatron_inherit.base.errors import MissingExtraError
from megatron_inherit.base.quantities import format_count, format_seconds
from megatron_inherit.eval.layer_map import map_of
from megatron_inherit.eval.run_facts import Arm, arms_of
from megatron_inherit.eval.runs import METRICS, Run, load_run
from megatron_inherit.eval.task_table import last_scores

UNTRAINED = "The weights were not trained after this step.\n"


def run_of(checkpoint: Path) -> Run | None:
    """Finds the run that a run folder, or a step folder inside one, belongs to."""
    inside = checkpoint.absolute().parent.name == "checkpoints"
    folder = checkpoint.absolute().parents[1] if inside else checkpoint
    return load_run(folder) if (folder / METRICS).is_file() else None


def complete_card(folder: Path, run: Run) -> None:
    """Puts a run's section into an exported folder's README.md, with the loss curve and the evaluations beside it.

    Args:
        folder: A model folder with the card of ``inherit.card``.
        run: The run whose weights it holds.
    """
    card = folder / "README.md"
    text = card.read_text() if card.is_file() else ""
    curve = _draw(folder, run)
    section = training_section(run, curve=curve)
    write_text(card, text.replace(UNTRAINED, section) if UNTRAINED in text else f"{text}\n{section}")
    for result in sorted(run.path.glob("evaluations/*.json")):
        (folder / "evaluations").mkdir(exist_ok=True)
        shutil.copyfile(result, folder / "evaluations" / result.name)


def training_section(run: Run, *, curve: bool = False) -> str:
    """Writes the section in Markdown.

    Args:
        run: The run.
        curve: ``loss_curve.png`` lies beside the card.
    """
    arm = arms_of([run])[0]
    lines = [
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(run, arm)),
        "",
    ]
    lines += ["![loss](loss_curve.png)", ""] if curve else []
    for result in run.evaluations:
        lines += ["## Tasks", "", *_task_lines(result, ("task", "metric", "shots", "items")), ""]
    if (scores := last_scores(run)) is not None:
        lines += ["## Tasks, in training", "", *_task_lines(scores, ("task", "metric")), ""]
    return "\n".join(lines)


def _task_lines(result: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    lines = ["| " + " | ".join((*columns, "value")) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in result.get("rows", ()):
        error = f" ± {row['stderr']:.3f}" if row.get("stderr") is not None else ""
        cells = [*(str(row[column]) for column in columns), f"{row['value']:.3f}{error}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _facts(run: Run, arm: Arm) -> list[tuple[str, str]]:
    facts = []
    if (found := map_of(run.inheritance)) is not None:
        facts.append(("started from", f"{found[0]}, {found[1].summary}"))
    facts += [("tokens seen", format_count(arm.tokens)), ("steps", str(arm.steps))]
    if arm.loss is not None:
        error = f" ± {arm.stderr:.3f}" if arm.stderr is not None else ""
        facts.append(("validation loss", f"{arm.loss:.3f}{error} nats a token"))
    if arm.bits_per_byte is not None:
        facts.append(("bits per byte", f"{arm.bits_per_byte:.3f}"))
    if arm.tokens_per_second:
        facts.append(("speed", f"{format_count(arm.tokens_per_second)} tokens/s on {arm.devices} device(s)"))
    if arm.mfu is not None:
        facts.append((f"model FLOPs utilisation ({arm.mfu_formula})", f"{100 * arm.mfu:.1f}%"))
    if arm.seconds is not None:
        facts.append(("wall time", format_seconds(arm.seconds)))
    if device := run.environment.get("device"):
        facts.append(("device", str(device)))
    return facts


def _draw(folder: Path, run: Run) -> bool:
    if not run.evals:
        return False
    from megatron_inherit.eval import plots

    curve = plots.Curve(
        run.label,
        [row["tokens"] for row in run.evals],
        [row["loss"] for row in run.evals],
        [row.get("stderr") for row in run.evals],
    )
    try:
        write_bytes(folder / "loss_curve.png", plots.to_png(plots.loss_curves([curve])))
    except MissingExtraError:
        return False
    return True
