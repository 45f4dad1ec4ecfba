"""What a finished or running run left in its folder, read back for reports and comparisons."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megatron_inherit.base.errors import ConfigError, DataError, UsageError
from megatron_inherit.config.load import build_config

METRICS, WINDOW_LOSSES = "metrics.jsonl", "window_losses.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        path: The folder.
        label: What curves and tables call it.
        recipe: run.yaml, resolved.
        environment: environment.json.
        train: Rows of kind ``train``, one a step, ascending.
        evals: Rows of kind ``eval``, ascending.
        tasks: Rows of kind ``tasks``, ascending: scores on the way, by ``TASK/METRIC``.
        exit_status: exit_status.json, empty while the run goes on.
    """

    path: Path
    label: str
    recipe: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    train: Sequence[Row] = ()
    evals: Sequence[Row] = ()
    tasks: Sequence[Row] = ()
    exit_status: Row = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Last step that was logged."""
        return max((rows[-1]["step"] for rows in (self.train, self.evals) if rows), default=0)

    @property
    def tokens(self) -> int:
        """Tokens seen, counted by the run itself."""
        return max((rows[-1]["tokens"] for rows in (self.train, self.evals) if rows), default=0)

    @property
    def seconds(self) -> float | None:
        """Wall time in seconds, resumed sessions added up."""
        return self.train[-1].get("seconds") if self.train else None

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the steps after the first tenth, which holds the warm-up of caches and compilers."""
        return self._settled("tokens_per_s")

    @property
    def mfu(self) -> float | None:
        """Median model FLOPs utilisation over the same steps, as a share of one, or None without a known peak."""
        return self._settled("mfu")

    @property
    def final(self) -> Row | None:
        """The last evaluation."""
        return self.evals[-1] if self.evals else None

    @cached_property
    def student_folder(self) -> Path | None:
        """The model folder that the run started from, where it can still be found."""
        name = (self.recipe.get("model") or {}).get("path")
        if not name:
            return None
        places = [place / name for place in (Path(), self.path, *self.path.absolute().parents)]
        moved = self.as_moved(name)
        return next((place for place in (*places, *([moved] if moved else [])) if place.is_dir()), None)

    @cached_property
    def inheritance(self) -> Row:
        """inherit.json of the run or of the folder it started from, or nothing."""
        for folder in (self.path, self.student_folder):
            if folder is not None and (folder / "inherit.json").is_file():
                return read_json(folder / "inherit.json")
        return {}

    @property
    def plan(self) -> Row:
        """The transfer plan of its inheritance, or nothing."""
        return self.inheritance.get("plan") or {}

    def is_teacher_of(self, other: Run) -> bool:
        """Tells whether the other run's student was cut from this run's checkpoints, or from what this run scores.

        A run that was itself cut from another, such as a growth's round from which the next one grows, is no teacher.
        """
        taken = (other.plan.get("origin") or {}).get("path")
        if not taken or other is self:
            return False
        scored = (self.recipe.get("model") or {}).get("path") if not self.train else None
        if not scored and self.inheritance:
            return False
        own, parts = Path(scored or self.path).absolute().parts, Path(taken).parts
        if any(own == parts[:end] or own[-end:] == parts[:end] for end in range(len(parts), 0, -1) if end > 1):
            return True
        moved = other.as_moved(taken)
        return (
            not scored
            and moved is not None
            and (moved == self.path.absolute() or self.path.absolute() in moved.parents)
        )

    def as_moved(self, path: str) -> Path | None:
        """Gives where a path lies now that the run's folder, and what was beside it, may have been moved or copied."""
        output = (self.recipe.get("run") or {}).get("output")
        if not output or Path(output).is_absolute() != Path(path).is_absolute():
            return None
        return Path(os.path.normpath(self.path.absolute() / os.path.relpath(path, output)))

    @cached_property
    def window_losses(self) -> Row:
        """Summed loss and predicted tokens of each window at the end (``losses``, ``counts``), or nothing."""
        return read_json(self.path / WINDOW_LOSSES)

    @property
    def evaluations(self) -> list[Row]:
        """Results of ``minherit evaluate`` kept in the run's folder, the earliest first."""
        found = [read_json(path) for path in sorted(self.path.glob("evaluations/*.json"))]
        return sorted(found, key=lambda result: str(result.get("date", "")))

    def _settled(self, key: str) -> float | None:
        rows = self.train[len(self.train) // 10 :] or self.train
        values = [row[key] for row in rows if row.get(key) is not None]
        return statistics.median(values) if values else None


def load_run(path: Path, label: str = "") -> Run:
    """Reads a run folder.

    Raises:
        UsageError: The folder holds no metrics.jsonl.
        DataError: A line of it, or a file beside it, is damaged; an unfinished last line is left out.
    """
    path = Path(path)
    if not (path / METRICS).is_file():
        raise UsageError(f"{path} is not a run folder: it holds no {METRICS}.", fix="Give the folder of a run.")
    rows = read_metrics(path / METRICS)
    return Run(
        path=path,
        label=label or path.resolve().name,
        recipe=_read_yaml(path / "run.yaml"),
        environment=read_json(path / "environment.json"),
        train=_of_kind(rows, "train"),
        evals=_of_kind(rows, "eval"),
        tasks=_of_kind(rows, "tasks"),
        exit_status=read_json(path / "exit_status.json"),
    )


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """Reads runs and studies; a study is a folder with run folders below it, which take their labels from there.

    With several paths a study's name is a part of its runs' labels; runs of one label get as much of their folders'
    paths as tells them apart. A folder that is given twice counts once.

    Raises:
        UsageError: A path holds neither.
    """
    runs: list[Run] = []
    paths = list(map(Path, paths))
    for path in paths:
        if (path / METRICS).is_file():
            runs.append(load_run(path))
            continue
        below = sorted(file.parent for file in path.rglob(METRICS))
        if not below:
            raise UsageError(f"{path} is neither a run nor a study: no {METRICS} in it or below it.")
        base = path.resolve().name if len(paths) > 1 else ""
        runs += [load_run(folder, str(Path(base, folder.relative_to(path)))) for folder in below]
    return _told_apart({run.path.resolve(): run for run in runs})


def with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """Gives a recipe that an earlier version wrote the keys that came later, with their defaults."""
    try:
        return build_config(recipe, where="an earlier run").model_dump(mode="json")
    except ConfigError:
        return recipe


def _told_apart(runs: Mapping[Path, Run]) -> list[Run]:
    alike: dict[str, list[Path]] = {}
    for path, run in runs.items():
        alike.setdefault(run.label, []).append(path)
    made = []
    for path, run in runs.items():
        same, length = alike[run.label], 1
        while len({other.parts[-length:] for other in same}) < len(same):
            length += 1
        made.append(run if len(same) == 1 else replace(run, label=str(Path(*path.parts[-length:]))))
    return made


def read_metrics(path: Path) -> list[Row]:
    """Reads the rows of a metrics.jsonl; a last line cut off by a kill is left out."""
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"Line {number} of {path} is not JSON.", got=line[:80]) from error
    return rows


def read_json(path: Path) -> Row:
    """Reads a JSON object; a missing file reads as an empty one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    return value if isinstance(value, dict) else {"value": value}


def _read_yaml(path: Path) -> Row:
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {error}.") from error
    return value if isinstance(value, dict) else {}


def _of_kind(rows: Sequence[Row], kind: str) -> tuple[Row, ...]:
    """Keeps a kind's rows, one a step: a resumed run logs again what came after its last checkpoint."""
    by_step = {row["step"]: row for row in rows if row.get("kind") == kind}
    return tuple(by_step[step] for step in sorted(by_step))
