"""Runs of one arm over several seeds, as one line of a table and one curve: means, and what they are uncertain by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_inherit.base.errors import DataError
from megatron_inherit.config.load import flatten
from megatron_inherit.eval.runs import Run, with_defaults
from megatron_inherit.eval.val_loss import difference_stderr, summarize

_OF_A_RUN = ("run.", "data.seed", "model.path", "distill.teacher", "distill.cache", "checkpoint", "logging", "guard")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: In nats.
        windows: Its standard error over the evaluation windows; None where the runs did not keep the windows' losses.
        seeds: Its standard error over the seeds; None with fewer than two.
    """

    mean: float
    windows: float | None
    seeds: float | None

    def __str__(self) -> str:
        errors = [
            f"{name} {value:.4f}" for name, value in (("w", self.windows), ("s", self.seeds)) if value is not None
        ]
        return f"{self.mean:.4f}" + (f" ({', '.join(errors)})" if errors else "")


@dataclass(frozen=True)
class Group:
    """The runs of an arm, which differ in nothing but the seed.

    Attributes:
        label: Name of the arm.
        runs: By seed; each has been scored at the same steps on the same windows.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs."""
        return [int((run.recipe.get("run") or {}).get("seed", 0)) for run in self.runs]

    @cached_property
    def steps(self) -> list[int]:
        """Steps at which every run has been scored."""
        shared = set.intersection(*({row["step"] for row in run.evals} for run in self.runs))
        return sorted(shared)

    @cached_property
    def tokens(self) -> list[int]:
        """Tokens seen at these steps."""
        seen = {row["step"]: row["tokens"] for row in self.runs[0].evals}
        return [seen[step] for step in self.steps]

    @cached_property
    def losses(self) -> list[float]:
        """Mean loss over the seeds at these steps."""
        return [statistics.fmean(self.losses_at(step)) for step in self.steps]

    @cached_property
    def seed_errors(self) -> list[float | None]:
        """Standard error of these means over the seeds."""
        return [_stderr(self.losses_at(step)) for step in self.steps]

    def losses_at(self, step: float) -> list[float]:
        """Gives each run's loss at a step, on a straight line between two evaluations."""
        return [_interpolate([(row["step"], row["loss"]) for row in run.evals], step) for run in self.runs]

    def at(self, share: float) -> float:
        """Gives the mean loss at a share of the arm's own steps."""
        return statistics.fmean(self.losses_at(share * self.steps[-1]))

    @cached_property
    def final(self) -> Estimate:
        """The loss at the last step."""
        finals = self.losses_at(self.steps[-1])
        windows = self.mean_window_losses
        error = None if windows is None else summarize(windows, self.runs[0].window_losses["counts"], None).stderr
        return Estimate(statistics.fmean(finals), error, _stderr(finals))

    @cached_property
    def mean_window_losses(self) -> list[float] | None:
        """Summed loss of each window at the end, mean over the seeds."""
        kept = [run.window_losses.get("losses") for run in self.runs]
        if not all(kept):
            return None
        return [statistics.fmean(values) for values in zip(*(losses for losses in kept if losses), strict=True)]

    def reaches(self, loss: float) -> float | None:
        """Gives the step at which the mean curve first comes down to a loss, or None.

        Between two evaluations the curve is a straight line; before the first one after the start it is steep and
        unknown, so that no earlier step is given than that one's.
        """
        before: tuple[int, float] | None = None
        for step, value in zip(self.steps, self.losses, strict=True):
            if value <= loss:
                if before is None or before[0] == self.steps[0] or before[1] <= loss:
                    return float(step)
                return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
            before = (step, value)
        return None


def gap(group: Group, control: Group) -> Estimate:
    """Compares two arms at their ends, seed by seed and window by window.

    Pairing takes out what both share: the order of the samples of a seed, the difficulty of the windows. Seeds that
    only one of them has, while a study goes on, are left out, unless they share none.
    """
    shared = sorted(set(group.seeds) & set(control.seeds))
    if shared:
        group, control = _of_seeds(group, shared), _of_seeds(control, shared)
    mean = group.final.mean - control.final.mean
    ends = zip(group.losses_at(group.steps[-1]), control.losses_at(control.steps[-1]), strict=bool(shared))
    seeds = _stderr([ours - theirs for ours, theirs in ends]) if shared else None
    first, second = group.mean_window_losses, control.mean_window_losses
    if first is None or second is None:
        return Estimate(mean, None, seeds)
    error = difference_stderr(first, second, group.runs[0].window_losses["counts"])[1]
    return Estimate(mean, None if math.isnan(error) else error, seeds)


def _of_seeds(group: Group, seeds: Sequence[int]) -> Group:
    runs = dict(zip(group.seeds, group.runs, strict=True))
    return Group(group.label, tuple(runs[seed] for seed in seeds))


@dataclass(frozen=True)
class Sooner:
    """How many times fewer steps an arm needs than the control for a loss that both come down to.

    Attributes:
        times: The ratio; below 1 the control is there first.
        bound: ``≥`` where the arm, ``≤`` where the control was there at its first evaluation after the start, so that
            only a bound of the ratio is known.
    """

    times: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound}{self.times:.{1 if self.times >= 1 else 2}f}x"


def sooner(group: Group, control: Group) -> Sooner | None:
    """Compares the steps that two arms need for the higher of their final losses.

    None where both were there at their first evaluation after the start.
    """
    loss = max(group.losses[-1], control.losses[-1])
    ours, is_ours_early = _first_at(group, loss)
    theirs, is_theirs_early = _first_at(control, loss)
    if is_ours_early and is_theirs_early:
        return None
    return Sooner(theirs / ours, "≥" if is_ours_early else "≤" if is_theirs_early else "")


def _first_at(group: Group, loss: float) -> tuple[float, bool]:
    """Gives the step at which an arm is at a loss that it gets to, and whether it was there earlier."""
    first = float(group.steps[min(1, len(group.steps) - 1)])
    reached = group.reaches(loss) or first
    return max(reached, first), reached <= first


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Puts runs together that differ in nothing but the seed: one name, one parent folder, one recipe, other seeds."""
    groups: dict[object, list[Run]] = {}
    for run in runs:
        name = (run.recipe.get("run") or {}).get("name")
        key: object = (name, run.path.resolve().parent, *_recipe_of(run)) if name and run.evals else run.path
        groups.setdefault(key, []).append(run)
    made: list[Group] = []
    for together in groups.values():
        seeds = [(run.recipe.get("run") or {}).get("seed") for run in together]
        if len(together) > 1 and len(set(seeds)) == len(seeds) and None not in seeds:
            made.append(Group(_label(together), tuple(together)))
        else:
            made += [Group(run.label, (run,)) for run in together]
    return made


def require_same_windows(groups: Sequence[Group]) -> None:
    """Refuses runs that were scored on different windows.

    Raises:
        DataError: Two runs differ.
    """
    seen = {run.evals[-1].get("fingerprint", ""): run.path for group in groups for run in group.runs if run.evals}
    if len(seen) > 1:
        (one, first), (two, second) = list(seen.items())[:2]
        raise DataError(
            f"{first} and {second} were scored on different windows, so that their losses cannot be compared.",
            got=f"{one} and {two}",
            fix="Run one of them again with the other's eval.windows.",
        )


def _recipe_of(run: Run) -> tuple[str, ...]:
    """Gives what the runs of an arm have in common: not their folders and seeds, nor where a start or teacher is."""
    values = flatten(with_defaults(run.recipe)).items()
    return tuple(sorted(f"{key}={value!r}" for key, value in values if not key.startswith(_OF_A_RUN)))


def _label(runs: Sequence[Run]) -> str:
    name = runs[0].label.rpartition("/")[0].rpartition("/")[2]
    return name or str((runs[0].recipe.get("run") or {}).get("name"))


def _stderr(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _interpolate(points: Sequence[tuple[int, float]], step: float) -> float:
    before = [point for point in points if point[0] <= step] or [points[0]]
    after = [point for point in points if point[0] >= step] or [points[-1]]
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 if x1 <= x0 else y0 + (y1 - y0) * (step - x0) / (x1 - x0)
