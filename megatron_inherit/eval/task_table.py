"""Task scores of several models side by side: one table a suite, a row a task and metric, a column a model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_inherit.eval.groups import Group
from megatron_inherit.eval.runs import Run

Cell = tuple[float, float | None]
Result = Mapping[str, Any]
_STDERR = "_stderr"


@dataclass
class TaskRow:
    """One metric of one task.

    Attributes:
        task, metric, shots, items: What was measured; ``items`` 0 where the file does not say.
        values: Value and standard error by model.
        published: Published value and standard error by the name of their row.
    """

    task: str
    metric: str
    shots: int
    items: int
    values: dict[str, Cell] = field(default_factory=dict)
    published: dict[str, Cell] = field(default_factory=dict)


@dataclass
class TaskTable:
    """All results of one suite.

    Attributes:
        suite: Its name; empty for tasks that were named one by one.
        models: Labels of the columns.
        published: Names of the published rows.
        rows: In the order of the first result.
    """

    suite: str
    models: list[str]
    published: list[str]
    rows: list[TaskRow]

    @property
    def is_counted(self) -> bool:
        """Tells whether the results say on how many items they are."""
        return any(row.items for row in self.rows)


@dataclass(frozen=True)
class TaskCurve:
    """One metric of one arm over the training.

    Attributes:
        label: Of the arm.
        tokens: Seen at each scoring.
        values: Mean over the runs.
        errors: Standard error over the runs, of a single run over the items; None where there is none.
    """

    label: str
    tokens: tuple[int, ...]
    values: tuple[float, ...]
    errors: tuple[float | None, ...]


def task_tables(results: Sequence[tuple[str, Result]]) -> list[TaskTable]:
    """Joins results by suite.

    Args:
        results: Label of the model and content of its ``evaluations/*.json``.
    """
    tables: dict[str, TaskTable] = {}
    for label, result in results:
        table = tables.setdefault(result.get("suite") or "", TaskTable(result.get("suite") or "", [], [], []))
        if label not in table.models:
            table.models.append(label)
        table.published += [name for name in result.get("published_names") or [] if name not in table.published]
        for found in result["rows"]:
            row = _row(table, found)
            row.values[label] = (found["value"], found.get("stderr"))
            row.published |= {name: (cell[0], cell[1]) for name, cell in (found.get("published") or {}).items()}
    return list(tables.values())


def evaluations_of(group: Group) -> list[Result]:
    """Gives what ``minherit evaluate`` kept of an arm, its runs taken together."""
    return _together(run.evaluations for run in group.runs)


def training_scores_of(group: Group) -> list[Result]:
    """Gives an arm's last scores on the way (``eval.tasks``), its runs taken together, in the form of evaluations."""
    return _together([result] for run in group.runs if (result := last_scores(run)) is not None)


def last_scores(run: Run) -> Result | None:
    """Gives a run's last scores on the way in the form of an evaluation, which knows no shots and no items; or None."""
    if not run.tasks:
        return None
    rows = []
    for name, value in _scores(run.tasks[-1]).items():
        task, _, metric = name.rpartition("/")
        error = run.tasks[-1].get(name + _STDERR)
        rows.append({"task": task, "metric": metric, "shots": 0, "items": 0, "value": value, "stderr": error})
    return {"rows": rows}


def task_curves(groups: Sequence[Group]) -> dict[str, list[TaskCurve]]:
    """Gives the arms' scores over the training: for each task the first of its metrics, by ``TASK/METRIC``.

    Every task has a curve a group, in their order; one without scores of it has an empty one.
    """
    found = (name for group in groups for run in group.runs for row in run.tasks for name in _scores(row))
    first_of: dict[str, str] = {}
    for name in dict.fromkeys(found):
        first_of.setdefault(name.rpartition("/")[0], name)
    return {name: [_curve(group, name) for group in groups] for name in first_of.values()}


def _curve(group: Group, name: str) -> TaskCurve:
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for run in group.runs:
        for row in run.tasks:
            if name in row:
                by_step.setdefault(row["step"], []).append(row)
    most = max(map(len, by_step.values()), default=0)
    points = [rows for _, rows in sorted(by_step.items()) if len(rows) == most]
    cells = [_mean([(row[name], row.get(name + _STDERR)) for row in rows]) for rows in points]
    tokens = tuple(rows[0]["tokens"] for rows in points)
    return TaskCurve(group.label, tokens, tuple(value for value, _ in cells), tuple(error for _, error in cells))


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if "/" in name and not name.endswith(_STDERR)}


def _together(runs: Iterable[Sequence[Result]]) -> list[Result]:
    """Joins results of an arm's runs, suite by suite: means, with the spread where several runs scored a row.

    Args:
        runs: Of each its results, the earliest first; what a run scored twice counts once, as it was scored last.
    """
    suites: dict[str, dict[tuple[Any, ...], list[Mapping[str, Any]]]] = {}
    names: dict[str, list[str]] = {}
    for results in runs:
        last: dict[tuple[str, tuple[Any, ...]], Mapping[str, Any]] = {}
        for result in results:
            suite = result.get("suite") or ""
            names.setdefault(suite, result.get("published_names") or [])
            last |= {(suite, _key(row)): row for row in result["rows"]}
        for (suite, key), row in last.items():
            suites.setdefault(suite, {}).setdefault(key, []).append(row)
    joined: list[Result] = []
    for suite, rows in suites.items():
        merged = []
        for same in rows.values():
            value, error = _mean([(row["value"], row.get("stderr")) for row in same])
            merged.append({**same[0], "value": value, "stderr": error})
        joined.append({"suite": suite, "published_names": names[suite], "rows": merged})
    return joined


def _mean(cells: Sequence[Cell]) -> Cell:
    """Gives the mean and its standard error over the runs; one run's own error is over the items."""
    if len(cells) == 1:
        return cells[0]
    values = [value for value, _ in cells]
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _key(found: Mapping[str, Any]) -> tuple[Any, ...]:
    return found["task"], found["metric"], found["shots"], found["items"] or 0


def _row(table: TaskTable, found: Mapping[str, Any]) -> TaskRow:
    for row in table.rows:
        if (row.task, row.metric, row.shots, row.items) == _key(found):
            return row
    table.rows.append(TaskRow(*_key(found)))
    return table.rows[-1]
