"""What a person sees of a run: a bar on a terminal, a line every so many steps elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from megatron_inherit.base.log import get_logger
from megatron_inherit.base.quantities import format_count, format_seconds

logger = get_logger(__name__)


class Progress:
    """Shows loss, speed, utilisation and time left.

    Args:
        total: Steps of the run.
        done: Steps before this session.
        every_steps: Steps between two lines where there is no terminal.
        formula: Name of the formula of the utilisation.
        visible: Only rank 0 shows anything.
    """

    def __init__(self, total: int, done: int, *, every_steps: int, formula: str, visible: bool = True) -> None:
        self.total, self.done, self.every_steps, self.formula = total, done, every_steps, formula
        self.visible = visible
        self._step_seconds: float | None = None
        self._bar = _bar(total, done) if visible and sys.stderr.isatty() else None

    def step(self, row: Mapping[str, Any], seconds: float) -> None:
        """Shows a step.

        Args:
            row: Its ``train`` row.
            seconds: What it took.
        """
        before = self._step_seconds
        self._step_seconds = seconds if before is None else 0.9 * before + 0.1 * seconds
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=row["step"], figures=self._figures(row))
        elif self.visible and (row["step"] % self.every_steps == 0 or row["step"] == self.total):
            left = format_seconds((self.total - row["step"]) * self._step_seconds)
            logger.info("step %d/%d  %s  %s left", row["step"], self.total, self._figures(row), left)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _figures(self, row: Mapping[str, Any]) -> str:
        figures = f"loss {row['loss']:.4f}  {format_count(row['tokens_per_s'])} tokens/s"
        if row["mfu"] is not None:
            figures += f"  MFU {row['mfu']:.1%} ({self.formula})"
        return figures


def _bar(total: int, done: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    bar = RichProgress(*columns, console=Console(stderr=True))
    bar.add_task("train", total=total, completed=done, figures="")
    bar.start()
    return bar
