"""Means over seeds, their two errors, and what they are compared by, against figures worked out by hand."""

import json

import pytest
import yaml

from megatron_inherit.base.errors import DataError
from megatron_inherit.eval.groups import Group, gap, group_runs, require_same_windows, sooner
from megatron_inherit.eval.runs import find_runs, load_run


def run(folder, losses, *, seed=1, name="arm", fingerprint="w", windows=None, every=10):
    folder.mkdir(parents=True)
    rows = [
        {"kind": "eval", "step": every * place, "tokens": 100 * every * place, "loss": loss, "fingerprint": fingerprint}
        for place, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(yaml.safe_dump({"run": {"name": name, "seed": seed}}))
    if windows:
        (folder / "window_losses.json").write_text(json.dumps({"losses": windows, "counts": [2] * len(windows)}))
    return load_run(folder)


def test_means_and_errors(tmp_path):
    group = Group(
        "a",
        (
            run(tmp_path / "1", [5, 4, 3], windows=[4.0, 8.0], seed=1),
            run(tmp_path / "2", [5, 5, 4], windows=[6.0, 10.0], seed=2),
        ),
    )
    assert group.losses == [5, 4.5, 3.5]
    assert group.at(0.25) == pytest.approx(4.75)
    assert group.final.mean == 3.5
    assert group.final.seeds == pytest.approx(0.5)  # sd of (3, 4) is 1/sqrt 2, over sqrt 2
    assert group.final.windows == pytest.approx(1.0)  # window means 2.5 and 4.5 a token
    assert group.reaches(4.0) == pytest.approx(15)
    assert group.reaches(3.0) is None


def test_a_gap_is_paired_by_seed_and_window(tmp_path):
    ours = Group("a", tuple(run(tmp_path / f"a{s}", [5, 2 + s], windows=[2.0, 6.0], seed=s) for s in (1, 2)))
    theirs = Group("b", tuple(run(tmp_path / f"b{s}", [5, 4 + s], windows=[4.0, 8.0], seed=s) for s in (1, 2)))
    found = gap(ours, theirs)
    assert found.mean == pytest.approx(-2)
    assert found.seeds == pytest.approx(0, abs=1e-12)
    assert found.windows == pytest.approx(0, abs=1e-12)
    assert gap(ours, Group("c", (run(tmp_path / "c", [5, 5], seed=9),))).seeds is None


def test_a_gap_leaves_out_seeds_that_only_one_arm_has(tmp_path):
    def arm(name, *losses):
        runs = (run(tmp_path / f"{name}{s}", [9, loss], windows=[loss, loss], seed=s) for s, loss in enumerate(losses))
        return Group(name, tuple(runs))

    found = gap(arm("a", 2.0, 3.0, 7.0), arm("b", 2.5, 3.5))
    assert found.mean == pytest.approx(-0.5), "the third seed is harder, not the arm worse"
    assert found.seeds == pytest.approx(0, abs=1e-12)
    assert found.windows == pytest.approx(0, abs=1e-12)


def test_sooner(tmp_path):
    control = Group("c", (run(tmp_path / "c", [6, 5, 4, 3, 2]),))
    found = sooner(Group("a", (run(tmp_path / "a", [4, 3, 1, 1, 1]),)), control)
    assert found.times == pytest.approx(40 / 15)
    assert str(found) == "2.7x"
    worse = sooner(Group("b", (run(tmp_path / "b", [8, 7, 6, 3.5]),)), control)
    assert worse.times == pytest.approx(25 / 30), "steps to 3.5 nats, where this arm ends"
    assert str(worse) == "0.83x"
    early = sooner(Group("d", (run(tmp_path / "d", [4, 1]),)), control)
    assert (early.times, str(early)) == (4, "≥4.0x")
    late = sooner(Group("e", (run(tmp_path / "e", [9, 8, 7, 6, 5.5]),)), control)
    assert (late.times, str(late)) == (0.25, "≤0.25x")
    assert sooner(Group("f", (run(tmp_path / "f", [9, 8]),)), Group("g", (run(tmp_path / "g", [9, 7]),))) is None


def test_runs_are_grouped_by_arm(tmp_path):
    for arm in ("x", "y"):
        for seed in (1, 2):
            run(tmp_path / "study/arms" / arm / f"seed{seed}", [3, 2], seed=seed, name=arm)
    run(tmp_path / "study/teacher", [3, 1], name="teacher")
    groups = group_runs(find_runs([tmp_path / "study"]))
    assert [(group.label, group.seeds) for group in groups] == [("x", [1, 2]), ("y", [1, 2]), ("teacher", [1])]


def test_runs_of_one_name_and_other_recipes_are_no_seeds_of_one_arm(tmp_path):
    for seed, rate in ((1, 0.1), (2, 0.2), (3, 0.1)):
        folder = tmp_path / f"s{seed}"
        run(folder, [3, 2], seed=seed, name="run")
        section = {"name": "run", "seed": seed, "output": str(folder)}
        recipe = {"run": section, "model": {"path": str(folder / "start")}, "optimizer": {"lr": rate}}
        (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    assert [group.seeds for group in group_runs(find_runs([tmp_path]))] == [[1, 3], [2]]


def test_other_windows_are_refused(tmp_path):
    groups = [Group("a", (run(tmp_path / "a", [1]),)), Group("b", (run(tmp_path / "b", [1], fingerprint="v"),))]
    with pytest.raises(DataError, match="different windows"):
        require_same_windows(groups)
