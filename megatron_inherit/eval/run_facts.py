"""The figures of a run that tables show, taken from its recipe, environment and metrics, never typed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_inherit.eval.groups import Group
from megatron_inherit.eval.runs import Run


@dataclasses.dataclass(frozen=True)
class Arm:
    """One line of the arms' table; None where the run did not record it.

    Attributes:
        init: How the model began: ``inherited``, ``random`` or ``given weights``; with ``, distilled`` where a teacher
            helped it on, so that it is not what the others are held against.
        start_loss: Validation loss before the first update, nats.
        loss, stderr: Final validation loss and its standard error over the windows, nats.
        gap: ``loss`` less that of the baseline arm on the same windows.
        tokens_per_second: Median over the run, all devices together.
        mfu: Share of the peak, or None where the device has no known peak.
        devices: Processes of the run, one a device.
        device_hours: Wall time times devices.
        fingerprint: Of the evaluation windows.
        is_baseline: The randomly initialised arm, to which gaps are taken.
        is_teacher: Another arm's student was cut from it.
        seeds: Runs of the arm, whose means these figures are.
        seed_stderr: Standard error of ``loss`` over them, or None for one run.
    """

    label: str
    init: str
    layers: int | None
    parameters: int | None
    steps: int
    tokens: int
    start_loss: float | None
    loss: float | None
    stderr: float | None
    bits_per_byte: float | None
    perplexity: float | None
    tokens_per_second: float | None
    mfu: float | None
    mfu_formula: str
    seconds: float | None
    devices: int
    fingerprint: str
    gap: float | None = None
    is_baseline: bool = False
    is_teacher: bool = False
    seeds: int = 1
    seed_stderr: float | None = None

    @property
    def device_hours(self) -> float | None:
        """Wall time times devices, in hours."""
        return None if self.seconds is None else self.seconds / 3600 * self.devices


_OF_THE_RUN = ("host", "command", "date", "num_layers", "parameters", "slurm_job")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Hardware and versions of a run."""

    rows: tuple[tuple[str, str], ...]


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Tabulates runs; gaps are taken to the random arm, by arms of its depth on the same evaluation windows."""
    return _compared([_with_role(run, runs) for run in runs])


def arms_of_groups(groups: Sequence[Group]) -> list[Arm]:
    """Tabulates arms of several seeds each: means over the seeds, the time of all of them."""
    runs = [run for group in groups for run in group.runs]
    return _compared([_merged(group, [_with_role(run, runs) for run in group.runs]) for group in groups])


def _merged(group: Group, arms: Sequence[Arm]) -> Arm:
    first = dataclasses.replace(arms[0], label=group.label)
    if len(arms) == 1:
        return first
    means: dict[str, Any] = {
        name: statistics.fmean(values) if None not in (values := [getattr(arm, name) for arm in arms]) else None
        for name in ("start_loss", "loss", "bits_per_byte", "perplexity", "tokens_per_second", "mfu")
    }
    seconds = [arm.seconds for arm in arms if arm.seconds is not None]
    return dataclasses.replace(
        first,
        **means,
        stderr=first.stderr if group.final.windows is None else group.final.windows,
        seconds=sum(seconds) if seconds else None,
        seeds=len(arms),
        seed_stderr=group.final.seeds,
    )


def _with_role(run: Run, runs: Sequence[Run]) -> Arm:
    return dataclasses.replace(_arm(run), is_teacher=any(run.is_teacher_of(other) for other in runs))


def _compared(arms: list[Arm]) -> list[Arm]:
    random = [arm for arm in arms if arm.init == "random" and arm.loss is not None]
    baseline = max(random, key=lambda arm: _comparable(arm, arms), default=None)
    if baseline is None or _comparable(baseline, arms) < 2:
        return arms
    return [_against(arm, baseline) for arm in arms]


def machine_of(run: Run) -> Machine:
    """Flattens environment.json to named lines, without empty values, what is of one run, and the host's name."""
    return Machine(tuple(_flatten({key: value for key, value in run.environment.items() if key not in _OF_THE_RUN})))


def _arm(run: Run) -> Arm:
    final = run.final or {}
    start = run.evals[0] if run.evals and run.evals[0]["step"] == 0 else {}
    model = run.recipe.get("model") or {}
    return Arm(
        label=run.label,
        init=_init(run),
        layers=_find(run.environment, "num_layers") or _find(model, "num_layers"),
        parameters=_find(run.environment, "parameters"),
        steps=run.steps,
        tokens=run.tokens,
        start_loss=start.get("loss"),
        loss=final.get("loss"),
        stderr=final.get("stderr"),
        bits_per_byte=final.get("bits_per_byte"),
        perplexity=final.get("perplexity"),
        tokens_per_second=run.tokens_per_second,
        mfu=run.mfu if run.mfu is None or run.mfu <= 1 else None,
        mfu_formula=str(_find(run.environment, "mfu_formula") or "palm"),
        seconds=run.seconds,
        devices=int(_find(run.environment, "world_size") or 1),
        fingerprint=str(final.get("fingerprint", "")),
    )


def _init(run: Run) -> str:
    ops = (run.inheritance.get("plan") or {}).get("ops") or ()
    helped = run.recipe.get("distill") or {}
    helped = ", distilled" if helped.get("teacher") or helped.get("cache") else ""
    if (run.recipe.get("model") or {}).get("init") == "random" or (ops and all(op["op"] == "init" for op in ops)):
        return f"random{helped}"
    return f"{'inherited' if run.inheritance else 'given weights'}{helped}"


def _comparable(baseline: Arm, arms: Sequence[Arm]) -> int:
    """Counts the arms, itself included, of its depth and its evaluation windows."""
    return sum((arm.layers, arm.fingerprint) == (baseline.layers, baseline.fingerprint) for arm in arms)


def _against(arm: Arm, baseline: Arm) -> Arm:
    same = _comparable(baseline, [arm]) and arm.loss is not None
    gap = arm.loss - baseline.loss if same and arm is not baseline else None  # type: ignore[operator]
    return dataclasses.replace(arm, gap=gap, is_baseline=arm is baseline)


def _find(tree: Any, key: str) -> Any:
    """Gives the first value under a key at any depth of nested mappings."""
    if not isinstance(tree, Mapping):
        return None
    if tree.get(key) is not None and not isinstance(tree[key], Mapping):
        return tree[key]
    return next((found for value in tree.values() if (found := _find(value, key)) is not None), None)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{name}: ")
        elif isinstance(value, (list, tuple)):
            rows.append((name, ", ".join(map(str, value))))
        elif value not in (None, ""):
            rows.append((name, str(value)))
    return [row for row in rows if row[1]]
