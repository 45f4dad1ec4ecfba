"""A study's findings as a picture and as Markdown tables for a page."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_inherit.eval import plots
from megatron_inherit.study.compare import Findings, table_of


def picture(found: Findings) -> bytes:
    """Draws the arms' mean curves, the teacher's loss as a line, as PNG."""
    curves = [
        plots.Curve(group.label, group.tokens, group.losses, group.seed_errors) for group in found.groups.values()
    ]
    final = found.teacher.final if found.teacher is not None else None
    reference = None if final is None else ("teacher", float(final["loss"]))
    return plots.to_png(plots.loss_curves(curves, reference=reference))


def markdown(found: Findings) -> str:
    """Writes the table of arms and, where there are claims, the table of claims."""
    parts = [_table(*table_of(found))]
    if found.verdicts:
        rows = [
            [
                verdict.claim.id,
                verdict.claim.says,
                ", ".join(f"{gain:+.3f}" for gain in verdict.gains),
                verdict.bound,
                "yes" if verdict.holds else "**no**",
            ]
            for verdict in found.verdicts
        ]
        parts.append(_table(["claim", "", "gain, nats", "bound", "holds"], rows))
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
