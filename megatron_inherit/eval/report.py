"""One self-contained page, and one picture, of a run or a study: what was inherited, how it learned, what it cost."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from megatron_inherit import __version__
from megatron_inherit.base.atomic import write_bytes, write_text
from megatron_inherit.base.errors import DataError, UsageError
from megatron_inherit.base.quantities import format_bytes, format_count, format_seconds
from megatron_inherit.eval import plots
from megatron_inherit.eval.analysis_charts import Drawing, drawings_of
from megatron_inherit.eval.groups import Group, group_runs
from megatron_inherit.eval.growth_table import Growth, find_growths
from megatron_inherit.eval.layer_map import LayerMap, map_of
from megatron_inherit.eval.page_table import PageTable
from megatron_inherit.eval.rerun import commands_of_folders, commands_of_run, recipe_text
from megatron_inherit.eval.run_facts import Arm, Machine, arms_of_groups, machine_of
from megatron_inherit.eval.runs import Run, find_runs, read_json
from megatron_inherit.eval.task_table import TaskCurve, evaluations_of, task_curves, task_tables, training_scores_of

MISSING = "\N{EN DASH}"
LONG_BUDGETS = (10**9, 50 * 10**9)
MAP_KEY = (
    ("kept", "the teacher's bytes"),
    ("made", "computed from the teacher's"),
    ("fresh", "fresh, seeded initialisation"),
    ("tied", "tied to the embedding"),
    ("dropped", "not inherited"),
)
MFU_FORMULAS = {
    "palm": "6N + 12Lhs FLOPs a token (PaLM; N matrix parameters, L blocks, h width of all heads, s sequence length)",
    "causal": "6N + 6Lhs FLOPs a token: as PaLM's, with the half of attention that a causal mask computes",
}


@dataclass(frozen=True)
class Chart:
    """One figure in two shapes, as inline SVG."""

    title: str
    note: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Extras:
    """What a page shows beside its runs.

    Attributes:
        analyses: Content of JSON files of ``minherit analyze``.
        evaluations: Content of JSON files of ``minherit evaluate``, of models that are no runs.
        growths: What was decided in each growth.
        tables: What each study found.
        again: Name of each whole that the runs belong to, and the command that makes it again.
    """

    analyses: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    growths: Sequence[Growth] = ()
    tables: Sequence[PageTable] = ()
    again: Sequence[tuple[str, str]] = ()


def write_report(
    paths: Sequence[Path],
    *,
    out: Path,
    title: str = "",
    price: float | None = None,
    analyses: Sequence[Path] = (),
    evaluations: Sequence[Path] = (),
    tables: Sequence[PageTable] = (),
) -> tuple[Path, Path]:
    """Writes the page and, beside it under the same name, the picture.

    Args:
        paths: Folders of runs, studies and growths.
        out: The HTML file.
        title: Heading; default made of the runs.
        price: Money for one device-hour, for the cost lines; without it only device-hours are given.
        analyses: JSON files of ``minherit analyze`` to show too.
        evaluations: JSON files of ``minherit evaluate --out``, of models that are no runs (a teacher, say).
        tables: What a study found.

    Returns:
        The HTML and the PNG file.

    Raises:
        UsageError: A path is neither run nor study, or ``out`` is a picture.
        DataError: A JSON file is missing, or of another kind; a file of a run is damaged.
        MissingExtraError: matplotlib is not installed.
    """
    runs = find_runs(paths)
    out = Path(out) / "report.html" if Path(out).is_dir() else Path(out)
    picture = out.with_suffix(".png")
    if picture == out:
        raise UsageError(
            f"{out} is the place of the picture.", fix=f"Name the page, such as {out.with_suffix('.html')}."
        )
    extras = Extras(
        analyses=[_given(path, "analyze", drawings_of) for path in analyses],
        evaluations=[_given(path, "evaluate", lambda value: "checkpoint" in value) for path in evaluations],
        growths=find_growths(paths),
        tables=tables,
        again=commands_of_folders(paths),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render(runs, title=title, price=price, extras=extras))
    write_bytes(picture, picture_of(runs))
    return out, picture


def _given(path: Path, command: str, is_of: Callable[[Mapping[str, Any]], object]) -> Mapping[str, Any]:
    """Reads a JSON file that the user named."""
    if not path.is_file():
        raise DataError(f"{path} does not exist.", fix=f"Give a JSON file of 'minherit {command}'.")
    value = read_json(path)
    if not is_of(value):
        raise DataError(f"{path} is no JSON file of 'minherit {command}'.")
    return value


def render(runs: Sequence[Run], *, title: str = "", price: float | None = None, extras: Extras | None = None) -> str:
    """Gives the page's HTML; nothing in it is fetched from elsewhere."""
    extras = extras or Extras()
    groups = group_runs(runs)
    arms = arms_of_groups(groups)
    students = [group for group, arm in zip(groups, arms, strict=True) if not arm.is_teacher]
    teachers = [group for group, arm in zip(groups, arms, strict=True) if arm.is_teacher]
    teacher = next(((arm.label, arm.loss) for arm in arms if arm.is_teacher and arm.loss is not None), None)
    maps = _maps(groups)
    comparable = len({arm.fingerprint for arm in arms if arm.fingerprint}) <= 1
    best = min((arm for arm in arms if arm.loss is not None and not arm.is_teacher), key=_loss, default=None)
    best = best if comparable else None
    paced = best or arms[0]
    page = {
        "title": title or _title(runs, maps),
        "subtitle": f"{len(runs)} runs" if len(runs) > 1 else str(runs[0].path),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "arms": arms,
        "comparable": comparable,
        "baseline": next((arm.label for arm in arms if arm.is_baseline), None),
        "several_seeds": any(arm.seeds > 1 for arm in arms),
        "show_blocks": _differs([arm.layers for arm in arms]),
        "show_mfu": any(arm.mfu is not None for arm in arms),
        "show_parameters": any(arm.parameters is not None for arm in arms),
        "colors": _colors(arms),
        "maps": maps,
        "map_key": [(state, words) for state, words in MAP_KEY if any(drawing.has(state) for *_, drawing in maps)],
        "best": best,
        "growths": [(growth, _growth_chart(growth)) for growth in extras.growths],
        "charts": [
            *_loss_charts(students, teacher, comparable=comparable),
            *([] if extras.growths else _sweep_chart([arm for arm in arms if not arm.is_teacher])),
        ],
        "tasks": task_tables(
            [(Path(result["checkpoint"]).name, result) for result in extras.evaluations]
            + [(group.label, result) for group in groups for result in evaluations_of(group)]
        ),
        "training_tasks": task_tables(
            [(group.label, result) for group in groups for result in training_scores_of(group)]
        ),
        "task_charts": [_task_chart(name, curves) for name, curves in task_curves([*students, *teachers]).items()],
        "analyses": [_drawn(drawing) for analysis in extras.analyses for drawing in drawings_of(analysis)],
        "machines": _machines(runs),
        "formula": MFU_FORMULAS.get(arms[0].mfu_formula, arms[0].mfu_formula),
        "price": price,
        "paced": paced.label,
        "costs": [(budget, _cost(paced, budget, price)) for budget in LONG_BUDGETS],
        "tables": extras.tables,
        "whole": extras.again,
        "commands": [(group.label, *commands_of_run(group.runs[0])) for group in groups],
        "recipes": [(group.label, recipe_text(group.runs[0])) for group in groups if group.runs[0].recipe],
    }
    return _environment().get_template("report.html.j2").render(page)


def picture_of(runs: Sequence[Run]) -> bytes:
    """Gives a PNG with the curves of the arms and their table."""
    groups = group_runs(runs)
    arms = arms_of_groups(groups)
    header = ("arm", "start", "final loss", "bits/byte", "tokens", "tokens/s", "wall time")
    rows = [
        (
            arm.label,
            _number(arm.start_loss, 3),
            _plus_minus(arm.loss, arm.stderr),
            _number(arm.bits_per_byte, 3),
            format_count(arm.tokens),
            MISSING if arm.tokens_per_second is None else format_count(arm.tokens_per_second),
            MISSING if arm.seconds is None else format_seconds(arm.seconds),
        )
        for arm in arms
    ]
    students = [group for group, arm in zip(groups, arms, strict=True) if not arm.is_teacher]
    teacher = next(((arm.label, arm.loss) for arm in arms if arm.is_teacher and arm.loss is not None), None)
    return plots.to_png(plots.curves_and_table(_eval_curves(students), header, rows, reference=teacher))


def _colors(arms: Sequence[Arm]) -> dict[str, str]:
    """Gives each arm the CSS of its curve's colour, dashed where the curve is; the teacher is a grey line."""
    styles = {}
    for place, arm in enumerate(arm for arm in arms if not arm.is_teacher):
        lap, number = divmod(place, len(plots.SERIES))
        styles[arm.label] = f"{'border: 2px dashed' if lap else 'background:'} var(--series-{number + 1})"
    return styles


def _differs(values: Sequence[Any]) -> bool:
    """Tells whether a column is worth its width."""
    return values[0] is not None if len(values) == 1 else len(set(values)) > 1


def _environment() -> jinja2.Environment:
    source = resources.files("megatron_inherit.eval")
    loader = jinja2.FunctionLoader(lambda name: (source / name).read_text())
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": lambda value: MISSING if value is None else format_count(value),
        "duration": lambda value: MISSING if value is None else format_seconds(value),
        "size": format_bytes,
        "number": _number,
        "percent": lambda value: MISSING if value is None else f"{100 * value:.1f}%",
        "signed": _signed,
    }
    return environment


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return MISSING
    return f"{value:.{digits}f}" if math.isfinite(value) and abs(value) < 1e5 else f"{value:.2e}"


def _signed(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _plus_minus(value: float | None, error: float | None) -> str:
    return _number(value) + (f" ± {_number(error)}" if error is not None else "")


def _title(runs: Sequence[Run], maps: Sequence[tuple[str, str, LayerMap]]) -> str:
    if maps:
        _, teacher, drawing = maps[0]
        return f"{len(drawing.layers)} of {drawing.teacher_layers} blocks of {teacher}"
    return runs[0].label if len(runs) == 1 else runs[0].path.resolve().parent.name


def _maps(groups: Sequence[Group]) -> list[tuple[str, str, LayerMap]]:
    """Draws each different inheritance once: label of the first arm that has it, teacher's name, picture."""
    seen: dict[str, tuple[str, str, LayerMap]] = {}
    for group in groups:
        found = map_of(group.runs[0].inheritance)
        if found is not None and found[1].links:
            teacher, drawing = found
            seen.setdefault(repr((teacher, drawing.boxes, drawing.links)), (group.label, teacher, drawing))
    return list(seen.values())


def _eval_curves(groups: Sequence[Group]) -> list[plots.Curve]:
    """Gives a curve a group; one without an evaluation keeps its place and colour."""
    curves = []
    for group in groups:
        alone = len(group.runs) == 1
        errors = [row.get("stderr") for row in group.runs[0].evals] if alone else group.seed_errors
        curves.append(plots.Curve(group.label, group.tokens, group.losses, errors))
    return curves


def _train_curves(groups: Sequence[Group], points: int = 120) -> list[plots.Curve]:
    """Means of equal stretches of steps, so that noise and length do not fill the page; of an arm's first run."""
    curves = []
    for group in groups:
        run = group.runs[0]
        size = max(1, math.ceil(len(run.train) / points))
        chunks = [run.train[start : start + size] for start in range(0, len(run.train), size)]
        x = [chunk[-1]["tokens"] for chunk in chunks]
        y = [math.fsum(row["loss"] for row in chunk) / len(chunk) for chunk in chunks]
        curves.append(plots.Curve(group.label, x, y))
    return curves


def _loss(arm: Arm) -> float:
    return math.inf if arm.loss is None else arm.loss


def _loss_charts(groups: Sequence[Group], teacher: tuple[str, float] | None, *, comparable: bool) -> list[Chart]:
    charts = []
    curves = _eval_curves(groups)
    if any(curve.x for curve in curves):
        over = "seeds" if any(len(group.runs) > 1 for group in groups) else "windows"
        windows = "the same for every arm" if comparable else "not the same for every arm: heights say nothing"
        note = f"Fixed windows, {windows}. Bands: one standard error over the {over}."
        charts.append(_chart("Validation loss", note, plots.loss_curves, curves, reference=teacher))
    curves = _train_curves(groups)
    if any(curve.x for curve in curves):
        note = "Mean over equal stretches of steps, before each update."
        charts.append(_chart("Training loss", note, plots.loss_curves, curves, ylabel="training loss (nats)"))
    return charts


def _sweep_chart(arms: Sequence[Arm]) -> list[Chart]:
    """Final loss against depth, where at least three depths were tried."""
    groups: dict[str, list[tuple[float, float, float | None]]] = {}
    for arm in arms:
        if arm.layers is not None and arm.loss is not None:
            groups.setdefault(arm.init, []).append((arm.layers, arm.loss, arm.seed_stderr or arm.stderr))
    groups = {name: values for name, values in groups.items() if len({x for x, _, _ in values}) >= 3}
    if not groups:
        return []
    note = (
        "Final validation loss of each depth; bars: one standard error over the seeds, of single runs over the windows."
    )
    return [_chart("Depth", note, plots.points, groups, xlabel="blocks of the student", ylabel="loss (nats)")]


def _growth_chart(growth: Growth) -> Chart | None:
    """Each round's loss above the teacher's, and the bar."""
    points = [(row.layers, row.gap, row.gap_stderr) for row in growth.rounds if row.gap is not None]
    if not points:
        return None
    note = (
        "Validation loss less the teacher's, window by window; bars: one standard error. At or below the line it ends."
    )
    bar = (f"tolerance {growth.tolerance:g}", growth.tolerance)
    axes = {"xlabel": "blocks of the student", "ylabel": "loss above the teacher's (nats)"}
    return _chart(f"Rounds of {growth.name}", note, plots.points, {"student": points}, reference=bar, **axes)


def _task_chart(name: str, curves: Sequence[TaskCurve]) -> Chart:
    drawn = [plots.Curve(curve.label, curve.tokens, curve.values, curve.errors) for curve in curves]
    return _chart(name, "", plots.loss_curves, drawn, ylabel=name.rpartition("/")[2])


def _chart(title: str, note: str, draw: Callable[..., Any], *args: Any, **options: Any) -> Chart:
    return _drawn(Drawing(title.lower(), title, note, functools.partial(draw, *args, **options)))


def _drawn(drawing: Drawing) -> Chart:
    wide, narrow = (
        plots.to_svg(drawing.draw(wide=wide), description=f"{drawing.title} ({'wide' if wide else 'narrow'})")
        for wide in (True, False)
    )
    return Chart(drawing.title, drawing.note, wide, narrow)


def _machines(runs: Sequence[Run]) -> list[tuple[str, Machine]]:
    """Each different machine once, with the labels of its runs."""
    labels: dict[Machine, list[str]] = {}
    for run in runs:
        labels.setdefault(machine_of(run), []).append(run.label)
    return [("all runs" if len(labels) == 1 else ", ".join(names), machine) for machine, names in labels.items()]


def _cost(arm: Arm, budget: int, price: float | None) -> tuple[float, float | None] | None:
    """Device-hours, and money, for a token budget at the arm's measured rate."""
    if not arm.tokens_per_second:
        return None
    hours = budget / arm.tokens_per_second / 3600 * arm.devices
    return hours, None if price is None else hours * price
