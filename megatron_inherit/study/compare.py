"""What a study found, from its runs' files alone: a line an arm, and each claim held or not."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_inherit.base.errors import DataError, UsageError
from megatron_inherit.base.quantities import format_count
from megatron_inherit.eval.groups import Estimate, Group, Sooner, gap, require_same_windows, sooner
from megatron_inherit.eval.rerun import studies_in
from megatron_inherit.eval.runs import METRICS, Run, load_run, read_json
from megatron_inherit.plan.plan import describe_layers
from megatron_inherit.study.arms import is_finished
from megatron_inherit.study.schema import ClaimSection, Study, load_study

MARKS = (0.025, 0.25)
"""Shares of an arm's steps at which tables give its loss beside the start and the end."""


@dataclass(frozen=True)
class Line:
    """One arm of the table.

    Attributes:
        arm: Its name.
        layers: Blocks of the origin of which it takes something.
        seeds: Of its runs.
        steps: Of each.
        parameters: Of its model.
        start: Mean loss before training.
        marks: Mean losses at ``MARKS``.
        final: Loss at the end.
        gap: To the control at its end; None for the control, and while that has not finished.
        sooner: Times fewer steps than the control for the higher of their final losses; None where that is not known.
        is_control: Gaps are taken to it.
    """

    arm: str
    layers: tuple[int, ...] | None
    seeds: tuple[int, ...]
    steps: int
    parameters: int | None
    start: float
    marks: tuple[float, ...]
    final: Estimate
    gap: Estimate | None
    sooner: Sooner | None
    is_control: bool


@dataclass(frozen=True)
class Verdict:
    """A claim and its figures.

    Attributes:
        claim: What was claimed.
        gains: ``loss(higher) - loss(lower)`` at each of ``claim.at``.
        bound: What they were held against.
        holds: Whether they meet it.
    """

    claim: ClaimSection
    gains: tuple[float, ...]
    bound: str
    holds: bool


@dataclass(frozen=True)
class Findings:
    """A study's figures.

    Attributes:
        study: The study.
        teacher: Its teacher's run, if it is one of the study.
        groups: Arms that have finished, by name.
        missing: Runs that have not.
        lines: The table.
        verdicts: Of the claims whose arms have finished.
    """

    study: Study
    teacher: Run | None
    groups: Mapping[str, Group]
    missing: tuple[str, ...]
    lines: tuple[Line, ...]
    verdicts: tuple[Verdict, ...]


def find_studies(folder: Path) -> list[Path]:
    """Lists the studies that were run in a folder.

    Raises:
        UsageError: There is none.
    """
    found = studies_in(folder)
    if not found:
        raise UsageError(f"{folder} holds no study.", fix="Run one with 'minherit study run STUDY --out FOLDER'.")
    return found


def read_findings(path: Path) -> Findings:
    """Reads a study that was run.

    Args:
        path: Its YAML in its folder.

    Raises:
        DataError: Runs were trained on different data, or scored on different windows.
    """
    study = load_study(path, folder=path.parent)
    groups: dict[str, Group] = {}
    missing: list[str] = []
    for arm in study.section.arms:
        jobs = [job for job in study.jobs if job.arm is arm]
        done = [job for job in jobs if (job.folder / METRICS).is_file() and is_finished(job.config)]
        missing += [job.name for job in jobs if job not in done]
        if done:
            groups[arm.name] = Group(arm.name, tuple(load_run(job.folder, arm.name) for job in done))
    teacher = None
    if study.teacher is not None and (study.teacher.folder / METRICS).is_file():
        teacher = load_run(study.teacher.folder, "teacher")
    everything = [*groups.values(), *([Group("teacher", (teacher,))] if teacher is not None else [])]
    require_same_windows(everything)
    if study.section.varies != "data":
        _require_same_data(groups)
    control = groups.get(study.section.control)
    return Findings(
        study=study,
        teacher=teacher,
        groups=groups,
        missing=tuple(missing),
        lines=tuple(_line(group, control) for group in groups.values()),
        verdicts=tuple(
            judge(claim, groups)
            for claim in study.section.claims
            if {claim.lower, claim.higher, claim.of or claim.lower} <= groups.keys()
        ),
    )


def judge(claim: ClaimSection, groups: Mapping[str, Group]) -> Verdict:
    """Holds a claim against the figures; every arm is read at a share of its own steps."""
    gains = tuple(_gain(claim, groups, claim.lower, share) for share in claim.at)
    if claim.by is not None:
        holds = all(gain >= least for gain, least in zip(gains, claim.by, strict=True))
        bound = "at least " + ", ".join(f"{least:g}" for least in claim.by)
    elif claim.within is not None:
        holds, bound = all(abs(gain) <= claim.within for gain in gains), f"within {claim.within:g}"
    elif claim.shrinks:
        holds, bound = all(late < early for early, late in itertools.pairwise(gains)), "falling"
    else:
        most = [(claim.share or 0.0) * _gain(claim, groups, claim.of or "", share) for share in claim.at]
        holds = all(gain <= limit for gain, limit in zip(gains, most, strict=True))
        bound = "at most " + ", ".join(f"{limit:.3f}" for limit in most)
    return Verdict(claim, gains, bound, holds)


def rows_of(found: Findings) -> list[dict[str, Any]]:
    """Gives a row a run for a CSV file: arm, seed, blocks, figures, machine and date."""
    rows = []
    for group in found.groups.values():
        for run, seed in zip(group.runs, group.seeds, strict=True):
            rows.append(_row(found, group.label, seed, run))
    if found.teacher is not None:
        rows.append(_row(found, "teacher", int(found.teacher.recipe["run"]["seed"]), found.teacher))
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes rows of equal keys."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def table_of(found: Findings) -> tuple[list[str], list[list[str]]]:
    """Gives the columns' names and the lines as text; parameters are a column where the arms differ in them."""
    marks = [f"{100 * mark:g}%" for mark in MARKS]
    head = ["arm", "blocks", "steps", "parameters", "start", *marks]
    head += ["final", "± windows", "± seeds", "gap", "± gap", "sooner"]
    lines = [_cells(line) for line in found.lines]
    if len({line.parameters for line in found.lines}) > 1:
        return head, lines
    place = head.index("parameters")
    return head[:place] + head[place + 1 :], [cells[:place] + cells[place + 1 :] for cells in lines]


def _cells(line: Line) -> list[str]:
    difference = line.gap
    return [
        line.arm,
        "" if line.layers is None else describe_layers(line.layers),
        str(line.steps),
        "" if line.parameters is None else format_count(line.parameters),
        f"{line.start:.3f}",
        *(f"{loss:.3f}" for loss in line.marks),
        f"{line.final.mean:.3f}",
        _error(line.final.windows),
        _error(line.final.seeds),
        "control" if line.is_control else "" if difference is None else f"{difference.mean:+.3f}",
        "" if difference is None else f"{_error(difference.windows)} / {_error(difference.seeds)}",
        "" if line.sooner is None else str(line.sooner),
    ]


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _gain(claim: ClaimSection, groups: Mapping[str, Group], lower: str, share: float) -> float:
    above = share if claim.higher_at is None else claim.higher_at
    return groups[claim.higher].at(above) - groups[lower].at(share)


def _line(group: Group, control: Group | None) -> Line:
    run = group.runs[0]
    same = control is None or group is control
    return Line(
        arm=group.label,
        layers=_blocks_taken(run),
        seeds=tuple(group.seeds),
        steps=group.steps[-1],
        parameters=run.environment.get("parameters"),
        start=group.at(0.0),
        marks=tuple(group.at(mark) for mark in MARKS),
        final=group.final,
        gap=None if same or control is None else gap(group, control),
        sooner=None if same or control is None else sooner(group, control),
        is_control=group is control,
    )


def _blocks_taken(run: Run) -> tuple[int, ...] | None:
    """Gives the origin's block for each block, or None where nothing of a block is inherited."""
    inside = [op["op"] for op in run.plan.get("ops") or () if op["target"].startswith("layers.")]
    return None if set(inside) <= {"init"} else tuple(run.plan["layer_map"])


def _row(found: Findings, arm: str, seed: int, run: Run) -> dict[str, Any]:
    group = Group(arm, (run,))
    versions = run.environment.get("versions") or {}
    layers = _blocks_taken(run)
    return {
        "study": found.study.section.name,
        "arm": arm,
        "seed": seed,
        "blocks": run.environment.get("num_layers"),
        "from": "" if layers is None else ",".join(map(str, layers)),
        "parameters": run.environment.get("parameters"),
        "steps": run.steps,
        "tokens": run.tokens,
        "loss_start": round(group.at(0.0), 4),
        **{f"loss_{100 * mark:g}pct": round(group.at(mark), 4) for mark in MARKS},
        "loss": round(group.losses[-1], 4),
        "stderr_windows": None if group.final.windows is None else round(group.final.windows, 4),
        "seconds": run.seconds and round(run.seconds, 1),
        "windows": (run.final or {}).get("fingerprint"),
        "date": run.environment.get("date"),
        "device": run.environment.get("device"),
        "cpus": run.environment.get("cpus"),
        "threads": run.environment.get("threads"),
        "versions": " ".join(f"{name}=={versions[name]}" for name in ("torch", "megatron-core") if name in versions),
    }


def _require_same_data(groups: Mapping[str, Group]) -> None:
    """Refuses runs of one seed that read other data or another order."""
    seen: dict[int, tuple[Any, Path]] = {}
    for group in groups.values():
        for run, seed in zip(group.runs, group.seeds, strict=True):
            identity = read_json(run.path / "manifest.json").get("identity") or {}
            data = identity.get("data"), identity.get("order")
            first = seen.setdefault(seed, (data, run.path))
            if data != first[0]:
                raise DataError(
                    f"{run.path} and {first[1]} were trained on different data, or in another order.",
                    got=data,
                    expected=first[0],
                    fix="Run one of them again, or set varies: data if that is the question.",
                )


def as_json(found: Findings) -> dict[str, Any]:
    """Gives all figures as plain values."""
    return {
        "study": found.study.section.name,
        "question": found.study.section.question,
        "control": found.study.section.control,
        "missing": list(found.missing),
        "lines": [dataclasses.asdict(line) for line in found.lines],
        "claims": [
            {
                "id": verdict.claim.id,
                "says": verdict.claim.says,
                "gains": list(verdict.gains),
                "bound": verdict.bound,
                "holds": verdict.holds,
            }
            for verdict in found.verdicts
        ],
    }
