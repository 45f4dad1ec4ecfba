"""An arm has one colour in every figure and table, whatever of it there is so far."""

import json
import re
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib")

from megatron_inherit.eval import plots, report
from megatron_inherit.eval.groups import group_runs
from megatron_inherit.eval.run_facts import arms_of_groups
from megatron_inherit.eval.runs import find_runs
from megatron_inherit.eval.task_table import task_curves
from megatron_inherit.study import pages
from tests.support.run_folders import write_run


@pytest.fixture
def groups(tmp_path):
    """Arms a, b, c: b has not been evaluated, and only c was scored on a task."""
    for name in "abc":
        write_run(tmp_path / name, final=2.5)
    path = tmp_path / "b" / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"train"' in line))
    with (tmp_path / "c" / "metrics.jsonl").open("a") as file:
        for step in (30, 60):
            file.write(json.dumps({"kind": "tasks", "step": step, "tokens": 512 * step, "piqa/acc": 0.5}) + "\n")
    return group_runs(find_runs([tmp_path]))


def color_of(svg, label):
    """Gives the variable that a label is filled with."""
    (style,) = re.findall(rf'<text style="([^"]*)"[^>]*>{label}</text>', svg)
    return re.search(r"var\((--[\w-]+)\)", style)[1]


def test_an_arm_has_the_same_colour_in_every_chart_and_in_the_table(groups):
    validation, training = report._loss_charts(groups, None, comparable=True)
    tasks = report._task_chart("piqa/acc", task_curves(groups)["piqa/acc"])
    assert color_of(validation.wide, "c") == color_of(training.wide, "c") == color_of(tasks.narrow, "c") == "--series-3"
    assert color_of(training.wide, "b") == "--series-2"
    assert ">b</text>" not in validation.wide + tasks.wide
    assert report._colors(arms_of_groups(groups)) == {
        "a": "background: var(--series-1)",
        "b": "background: var(--series-2)",
        "c": "background: var(--series-3)",
    }


def test_a_swatch_is_dashed_where_its_curve_is():
    arms = [SimpleNamespace(label=str(number), is_teacher=number == 0) for number in range(10)]
    styles = report._colors(arms)
    assert "0" not in styles
    assert (styles["1"], styles["9"]) == ("background: var(--series-1)", "border: 2px dashed var(--series-1)")


def test_a_studys_picture_keeps_the_places_of_arms_that_have_not_finished(groups, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "loss_curves", lambda curves, **_: drawn.extend(curves))
    monkeypatch.setattr(plots, "to_png", lambda figure: b"")
    first, _, last = groups
    arms = [SimpleNamespace(name=name) for name in "abc"]
    found = SimpleNamespace(
        groups={"c": last, "a": first}, teacher=None, study=SimpleNamespace(section=SimpleNamespace(arms=arms))
    )
    pages.picture(found)
    assert [(curve.label, bool(curve.x)) for curve in drawn] == [("a", True), ("b", False), ("c", True)]
