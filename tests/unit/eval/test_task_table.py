"""Task scores of several models in one table, of arms of several seeds, and of models in training."""

import json

import pytest
import yaml

from megatron_inherit.eval.groups import Group
from megatron_inherit.eval.runs import load_run
from megatron_inherit.eval.task_table import evaluations_of, task_curves, task_tables, training_scores_of
from tests.support.run_folders import write_run


def result(value, *, suite=None, items=100, published=None):
    row = {"task": "piqa", "metric": "acc", "shots": 0, "items": items, "value": value, "stderr": 0.05}
    return {"suite": suite, "rows": [row | {"published": published or {}}], "published_names": list(published or {})}


def test_models_with_the_same_task_share_a_row():
    (table,) = task_tables([("teacher", result(0.66)), ("student", result(0.46))])
    assert table.models == ["teacher", "student"]
    (row,) = table.rows
    assert row.values == {"teacher": (0.66, 0.05), "student": (0.46, 0.05)}


def test_scores_on_different_numbers_of_items_are_not_side_by_side():
    (table,) = task_tables([("teacher", result(0.66)), ("student", result(0.46, items=10))])
    assert [list(row.values) for row in table.rows] == [["teacher"], ["student"]]


def test_each_suite_has_its_table_and_its_published_rows():
    ours = [("a", result(0.5)), ("b", result(0.6, suite="inheritune", published={"paper": [0.7, 0.01]}))]
    plain, suite = task_tables(ours)
    assert (plain.suite, plain.published) == ("", [])
    assert (suite.suite, suite.models, suite.published) == ("inheritune", ["b"], ["paper"])
    assert suite.rows[0].published == {"paper": (0.7, 0.01)}


def arm(folder, *scores, evaluated=()):
    """An arm of a seed for each of ``scores``: its piqa accuracy at steps 30 and 60."""
    runs = []
    for seed, pair in enumerate(scores, start=1):
        path = write_run(folder / f"seed{seed}")
        recipe = yaml.safe_load((path / "run.yaml").read_text())
        recipe["run"]["seed"] = seed
        (path / "run.yaml").write_text(yaml.safe_dump(recipe))
        with (path / "metrics.jsonl").open("a") as file:
            for step, value in zip((30, 60), pair, strict=False):
                row = {"kind": "tasks", "step": step, "tokens": 512 * step, "piqa/acc": value, "piqa/acc_stderr": 0.05}
                file.write(json.dumps(row | {"piqa/acc_norm": 0.5, "boolq/acc": value}) + "\n")
        runs.append(path)
    for path, value in zip(runs, evaluated, strict=False):
        (path / "evaluations").mkdir()
        (path / "evaluations" / "tasks.json").write_text(json.dumps(result(value)))
    return Group(folder.name, tuple(load_run(path) for path in runs))


def test_seeds_of_an_arm_are_one_column_with_their_spread(tmp_path):
    group = arm(tmp_path / "arm", (), (), evaluated=(0.5, 0.6))
    (table,) = task_tables([(group.label, found) for found in evaluations_of(group)])
    assert table.models == ["arm"]
    assert table.is_counted
    value, error = table.rows[0].values["arm"]
    assert value == pytest.approx(0.55)
    assert error == pytest.approx(0.05)  # sd 0.0707 / sqrt(2)
    one = arm(tmp_path / "one", (), evaluated=(0.5,))
    assert evaluations_of(one)[0]["rows"][0]["stderr"] == 0.05, "of the items"


def test_scores_on_the_way_are_a_table_of_the_last_and_a_curve_a_task(tmp_path):
    group = arm(tmp_path / "arm", (0.2, 0.5), (0.4, 0.6))
    (found,) = training_scores_of(group)
    (table,) = task_tables([("arm", found)])
    assert not table.is_counted
    assert [(row.task, row.metric) for row in table.rows] == [("piqa", "acc"), ("piqa", "acc_norm"), ("boolq", "acc")]
    assert table.rows[0].values["arm"] == (pytest.approx(0.55), pytest.approx(0.05))
    curves = task_curves([group, Group("silent", (load_run(write_run(tmp_path / "silent")),))])
    assert list(curves) == ["piqa/acc", "boolq/acc"], "the first metric of each task"
    curve, silent = curves["piqa/acc"]
    assert (silent.label, silent.tokens, silent.values) == ("silent", (), ()), "it keeps its place and colour"
    assert (curve.label, curve.tokens) == ("arm", (512 * 30, 512 * 60))
    assert curve.values == (pytest.approx(0.3), pytest.approx(0.55))
    assert curve.errors == (pytest.approx(0.1), pytest.approx(0.05))


def test_where_a_seed_is_behind_the_curve_ends_with_it(tmp_path):
    (curve,) = task_curves([arm(tmp_path / "arm", (0.2, 0.5), (0.4,))])["piqa/acc"]
    assert curve.tokens == (512 * 30,)


def test_a_single_runs_error_is_over_the_items(tmp_path):
    group = arm(tmp_path / "arm", (0.2, 0.5))
    assert task_curves([group])["piqa/acc"][0].errors == (0.05, 0.05)
    assert training_scores_of(group)[0]["rows"][0]["stderr"] == 0.05
    assert training_scores_of(Group("x", (load_run(write_run(tmp_path / "x")),))) == []


def test_what_one_run_scored_twice_counts_once_as_it_was_scored_last(tmp_path):
    group = arm(tmp_path / "arm", (), (), evaluated=(0.5, 0.6))
    again = group.runs[0].path / "evaluations"
    (again / "a.json").write_text(json.dumps(result(0.8) | {"date": "2026-01-02"}))
    (again / "b.json").write_text(json.dumps(result(0.7) | {"date": "2026-01-01"}))
    (found,) = evaluations_of(group)
    (row,) = found["rows"]
    assert row["value"] == pytest.approx((0.8 + 0.6) / 2)
    assert row["stderr"] == pytest.approx(0.1)
