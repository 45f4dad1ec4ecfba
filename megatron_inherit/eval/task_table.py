"""Results of ``minherit evaluate`` side by side: one table a suite, a row a task and metric, a column a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Cell = tuple[float, float | None]


@dataclass
class TaskRow:
    """One metric of one task.

    Attributes:
        task, metric, shots, items: What was measured; ``items`` 0 where the file does not say.
        values: Value and standard error by model.
        published: Published values by the name of their row.
    """

    task: str
    metric: str
    shots: int
    items: int
    values: dict[str, Cell] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)


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


def task_tables(results: Sequence[tuple[str, Mapping[str, Any]]]) -> list[TaskTable]:
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
            row.published |= found.get("published") or {}
    return list(tables.values())


def _row(table: TaskTable, found: Mapping[str, Any]) -> TaskRow:
    key = (found["task"], found["metric"], found["shots"], found["items"] or 0)
    for row in table.rows:
        if (row.task, row.metric, row.shots, row.items) == key:
            return row
    table.rows.append(TaskRow(*key))
    return table.rows[-1]
