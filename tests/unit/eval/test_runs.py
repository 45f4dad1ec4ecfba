import json

import pytest
import yaml

from megatron_inherit.base.errors import DataError, UsageError
from megatron_inherit.eval.run_facts import arms_of, machine_of
from megatron_inherit.eval.runs import find_runs, load_run
from tests.support.run_folders import write_run


def test_a_run_reads_back_with_its_figures(tmp_path):
    folder = write_run(tmp_path / "a", steps=100, final=2.5, start=6.0)
    run = load_run(folder)
    assert (run.label, run.steps, run.tokens) == ("a", 100, 100 * 512)
    assert run.evals[0]["step"] == 0
    assert run.final["loss"] == pytest.approx(2.5)
    assert run.tokens_per_second == pytest.approx(5000)
    assert run.mfu is None


def test_an_unfinished_last_line_is_left_out_and_damage_inside_is_an_error(tmp_path):
    folder = write_run(tmp_path / "a", steps=10)
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"kind": "train", "st')
    assert load_run(folder).steps == 10
    metrics.write_text("{broken\n" + whole)
    with pytest.raises(DataError, match="Line 1"):
        load_run(folder)


def test_steps_logged_again_after_a_resume_count_once(tmp_path):
    folder = write_run(tmp_path / "a", steps=10)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in (9, 10, 11):
            file.write(json.dumps({"kind": "train", "step": step, "tokens": step, "loss": 1.0, "seconds": step}) + "\n")
    run = load_run(folder)
    assert [row["step"] for row in run.train] == list(range(1, 12))
    assert run.train[9]["loss"] == 1.0


def test_a_study_is_the_runs_below_a_folder(tmp_path):
    write_run(tmp_path / "study" / "random" / "seed-1", init="random")
    write_run(tmp_path / "study" / "inherit" / "seed-1")
    assert [run.label for run in find_runs([tmp_path / "study"])] == ["inherit/seed-1", "random/seed-1"]
    with pytest.raises(UsageError, match="neither a run nor a study"):
        find_runs([tmp_path / "nothing"])


def test_runs_of_one_name_are_told_apart_and_one_given_twice_counts_once(tmp_path):
    for folder in ("one/deep/run", "other/deep/run", "third"):
        write_run(tmp_path / folder)
    one, other, third = (tmp_path / folder for folder in ("one/deep/run", "other/deep/run", "third"))
    labels = [run.label for run in find_runs([one, other, third, one / "..", one])]
    assert labels == ["one/deep/run", "other/deep/run", "third"]


def test_gaps_are_to_the_random_arm_and_only_on_equal_windows(tmp_path):
    runs = [
        load_run(write_run(tmp_path / "inherit", final=2.5)),
        load_run(write_run(tmp_path / "random", final=3.0, init="random")),
        load_run(write_run(tmp_path / "other", final=2.0, fingerprint="other windows")),
    ]
    inherit, random, other = arms_of(runs)
    assert inherit.gap == pytest.approx(-0.5)
    assert random.is_baseline
    assert random.gap is None
    assert other.gap is None
    assert inherit.device_hours == pytest.approx(inherit.seconds / 3600 * 2)


def test_a_random_student_with_a_teacher_is_not_what_others_are_held_against(tmp_path):
    runs = [write_run(tmp_path / name, final=3.0, init="random") for name in ("distilled", "plain")]
    recipe = yaml.safe_load((runs[0] / "run.yaml").read_text()) | {"distill": {"teacher": "teacher", "cache": None}}
    (runs[0] / "run.yaml").write_text(yaml.safe_dump(recipe))
    found = arms_of([load_run(path) for path in runs])
    assert [(arm.init, arm.is_baseline) for arm in found] == [("random, distilled", False), ("random", True)]


def test_a_student_of_fresh_tensors_is_the_random_arm_of_its_depth(tmp_path):
    for name, ops in (("fresh", ["init", "init"]), ("student", ["copy", "init"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inherit.json").write_text(json.dumps({"plan": {"ops": [{"op": op} for op in ops]}}))
    runs = [
        load_run(write_run(tmp_path / "teacher", final=2.0, layers=8, init="random")),
        load_run(write_run(tmp_path / "inherit", final=2.5, model_path="student")),
        load_run(write_run(tmp_path / "random", final=3.0, model_path="fresh")),
    ]
    teacher, inherit, random = arms_of(runs)
    assert random.is_baseline
    assert inherit.gap == pytest.approx(-0.5)
    assert teacher.gap is None


def test_a_utilisation_above_the_peak_is_not_shown(tmp_path):
    run = load_run(write_run(tmp_path / "a", mfu=1.33))
    assert run.mfu == pytest.approx(1.33)
    assert arms_of([run])[0].mfu is None


def test_the_environment_becomes_named_lines(tmp_path):
    rows = dict(machine_of(load_run(write_run(tmp_path / "a"))).rows)
    assert rows["versions: torch"] == "2.13.0"
    assert rows["world size"] == "2"


def test_the_scored_teacher_of_a_growth_is_its_teacher_and_no_round_is(tmp_path):
    def start(run, origin):
        (run / "start").mkdir()
        plan = {"ops": [{"op": "copy", "target": "embed.weight"}], "origin": {"path": str(origin)}}
        (run / "start" / "inherit.json").write_text(json.dumps({"plan": plan}))
        recipe = yaml.safe_load((run / "run.yaml").read_text())
        recipe["model"]["path"] = str(run / "start")
        (run / "run.yaml").write_text(yaml.safe_dump(recipe))

    given, growth = tmp_path / "given", tmp_path / "growth"
    teacher = write_run(growth / "teacher", layers=8, model_path=str(given))
    rows = [json.loads(line) for line in (teacher / "metrics.jsonl").read_text().splitlines()]
    scored = [json.dumps(row) for row in rows if row["kind"] == "eval" and not row["step"]]
    (teacher / "metrics.jsonl").write_text("\n".join(scored) + "\n")
    first = write_run(growth / "round-1")
    start(first, given / "checkpoints" / "step_00000060")
    second = write_run(growth / "round-2", layers=6)
    start(second, first / "checkpoints" / "step_00000060")
    arms = {arm.label: arm.is_teacher for arm in arms_of(find_runs([growth]))}
    assert arms == {"round-1": False, "round-2": False, "teacher": True}


def test_a_study_that_was_moved_still_knows_its_starts_and_its_teacher(tmp_path):
    old = tmp_path / "old"
    write_run(old / "teacher", layers=8)
    arm = write_run(old / "arms/all/seed1", model_path=str(old / "arms/all/seed1/start"))
    (arm / "start").mkdir()
    plan = {"ops": [{"op": "copy", "target": "embed.weight"}], "origin": {"path": f"{old}/teacher/checkpoints/step_1"}}
    (arm / "start" / "inherit.json").write_text(json.dumps({"plan": plan}))
    for run in (old / "teacher", arm):
        recipe = yaml.safe_load((run / "run.yaml").read_text())
        recipe["run"] = {**recipe.get("run", {}), "output": str(run)}
        (run / "run.yaml").write_text(yaml.safe_dump(recipe))
    old.rename(tmp_path / "new")
    runs = {run.label: run for run in find_runs([tmp_path / "new"])}
    assert runs["arms/all/seed1"].plan == plan
    assert {arm.label: arm.is_teacher for arm in arms_of(list(runs.values()))} == {
        "arms/all/seed1": False,
        "teacher": True,
    }


def test_runs_of_two_folders_are_told_apart(tmp_path):
    for name in ("restart", "continue"):
        write_run(tmp_path / name / "round-1")
    labels = [run.label for run in find_runs([tmp_path / "restart", tmp_path / "continue"])]
    assert labels == ["restart/round-1", "continue/round-1"]
