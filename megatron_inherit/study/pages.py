"""A study's findings as a picture, as Markdown tables and as tables of a page."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_inherit.eval import plots
from megatron_inherit.eval.page_table import PageTable
from megatron_inherit.study.compare import Findings, table_of

CLAIMS = ("claim", "", "gain, nats", "bound", "holds")


def picture(found: Findings) -> bytes:
    """Draws the arms' mean curves, the teacher's loss as a line, as PNG."""
    curves = [
        plots.Curve(name, group.tokens, group.losses, group.seed_errors)
        if (group := found.groups.get(name))
        else plots.Curve(name, (), ())
        for name in (arm.name for arm in found.study.section.arms)
    ]
    final = found.teacher.final if found.teacher is not None else None
    reference = None if final is None else ("teacher", float(final["loss"]))
    return plots.to_png(plots.loss_curves(curves, reference=reference))


def markdown(found: Findings) -> str:
    """Writes the table of arms and, where there are claims, the table of claims."""
    parts = [_table(*table_of(found))]
    if found.verdicts:
        parts.append(_table(CLAIMS, [[*cells, "yes" if holds else "**no**"] for cells, holds in _claims(found)]))
    return "\n".join(parts)


def page_tables(found: Findings) -> list[PageTable]:
    """Gives the same tables for ``minherit report``."""
    section = found.study.section
    head, rows = table_of(found)
    note = (
        f"Losses in nats a token, means over the seeds; gaps to {section.control}, their errors paired by window / by "
        "seed; sooner: how many times fewer steps than the control to a loss that both reach."
    )
    if found.missing:
        note += f" Not finished: {', '.join(found.missing)}."
    tables = [PageTable(f"Study {section.name}", section.question, head, rows, note)]
    if found.verdicts:
        rows = [[*cells, "yes" if holds else "no"] for cells, holds in _claims(found)]
        tables.append(PageTable(f"Claims of {section.name}", "", CLAIMS, rows))
    return tables


def _claims(found: Findings) -> list[tuple[list[str], bool]]:
    return [
        (
            [
                verdict.claim.id,
                verdict.claim.says,
                ", ".join(f"{gain:+.3f}" for gain in verdict.gains),
                verdict.bound,
            ],
            verdict.holds,
        )
        for verdict in found.verdicts
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
