"""A growth's decisions as rows, read from its grow.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_inherit.base.errors import DataError
from megatron_inherit.eval.runs import read_json

RECORD = "grow.json"
"""Name of the record that ``study.grow`` keeps in a growth's folder."""


@dataclass(frozen=True)
class GrowthRow:
    """One model of a growth.

    Attributes:
        name: ``teacher``, ``control``, or ``round 1``.
        layers: Its blocks.
        blocks: Whose they are; of a round only.
        parameters: Of the model.
        loss, stderr: Validation loss in nats a token, and its standard error over the windows.
        gap, gap_stderr: That loss less the teacher's, window by window; None for the teacher.
        clear: The gap is two standard errors or more from the bar it was held against.
        decision: What followed from it.
        steps, tokens: Of its own training.
    """

    name: str
    layers: int
    blocks: str
    parameters: int | None
    loss: float
    stderr: float | None
    gap: float | None
    gap_stderr: float | None
    clear: bool
    decision: str
    steps: int
    tokens: int


@dataclass(frozen=True)
class Growth:
    """A growth, as far as it has come.

    Attributes:
        name: Of its folder.
        mode, tolerance, margin: Of its rule; in nats.
        teacher: What every round is held against.
        rows: The control, if there is one, and the rounds.
        verdict: What it came to, without a full stop.
        caution: What to know about that; mostly nothing.
        has_student: There is one that matched, or a last one.
    """

    name: str
    mode: str
    tolerance: float
    margin: float
    teacher: GrowthRow
    rows: tuple[GrowthRow, ...]
    verdict: str
    caution: str
    has_student: bool

    @property
    def rounds(self) -> tuple[GrowthRow, ...]:
        """The rows of students that were grown."""
        return tuple(row for row in self.rows if row.name != "control")


def find_growths(paths: Iterable[Path]) -> list[Growth]:
    """Reads the growths in or below some folders; those whose teacher is not scored yet are left out.

    Raises:
        DataError: A grow.json is not one of a growth.
    """
    files = {file.resolve(): file for path in paths for file in sorted(Path(path).rglob(RECORD))}
    return [growth for file in files.values() if (growth := read_growth(file)) is not None]


def read_growth(file: Path) -> Growth | None:
    """Reads a growth's record, or None where its teacher is not scored yet.

    Raises:
        DataError: It is not one of a growth.
    """
    record = read_json(file)
    try:
        rule = record["recipe"]["grow"]
        if record["teacher"] is None:
            return None
        control = [] if record["control"] is None else [_control(record["control"], rule)]
        verdict, caution = _verdict(record)
        return Growth(
            name=file.parent.resolve().name,
            mode=rule["mode"],
            tolerance=rule["tolerance"],
            margin=rule["margin"],
            teacher=_row("teacher", record["teacher"], ""),
            rows=(*control, *_rounds(record)),
            verdict=verdict,
            caution=caution,
            has_student=bool((record["outcome"] or {}).get("student")),
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{file} is no record of a growth: {error!r}.") from error


def _control(row: Mapping[str, Any], rule: Mapping[str, Any]) -> GrowthRow:
    goes_on = not row["vacuous"] or rule["when_vacuous"] == "continue"
    words = "vacuous" if row["vacuous"] else "not vacuous"
    return _row("control", row, f"{words}: {'grow' if goes_on else 'stop'}")


def _rounds(record: Mapping[str, Any]) -> list[GrowthRow]:
    rounds: Sequence[Mapping[str, Any]] = record["rounds"]
    following = [f"grow to {row['layers']}" for row in rounds[1:]]
    last = "go on" if record["outcome"] is None else "stop"
    found = []
    for row, then in zip(rounds, [*following, last], strict=False):
        found.append(_row(f"round {row['round']}", row, f"{'matches' if row['parity'] else 'does not match'}: {then}"))
    return found


def _row(name: str, row: Mapping[str, Any], decision: str) -> GrowthRow:
    return GrowthRow(
        name=name,
        layers=row["layers"],
        blocks=row.get("blocks", ""),
        parameters=row.get("parameters"),
        loss=row["loss"],
        stderr=row["stderr"],
        gap=row.get("gap"),
        gap_stderr=row.get("gap_stderr"),
        clear=row.get("clear", True),
        decision=decision,
        steps=row["steps"],
        tokens=row["tokens"],
    )


def _verdict(record: Mapping[str, Any]) -> tuple[str, str]:
    outcome, depth = record["outcome"], record["teacher"]["layers"]
    if outcome is None:
        return f"Not ended yet, after {len(record['rounds'])} rounds", ""
    if outcome["reason"] == "vacuous":
        return "Vacuous: a random student does as well as the teacher, so nothing was grown", ""
    vacuous = (record["control"] or {}).get("vacuous")
    caution = "The question was vacuous: a random student does as well as the teacher." if vacuous else ""
    if outcome["reason"] == "parity":
        return f"{outcome['layers']} of {depth} blocks match the teacher", caution
    return f"No student matches the teacher, not even one of all {depth} blocks", caution
