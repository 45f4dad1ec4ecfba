"""What a growth's runs are told, and what is refused before the first of them."""

import pytest

from megatron_inherit.cli.main import main
from megatron_inherit.config.load import flatten, load_recipe, recipe_names
from megatron_inherit.study.growth_recipes import plan_growth
from tests.support.tiny_hf import tiny_llama
from tests.support.tiny_run import recipe


@pytest.fixture
def path(tmp_path):
    return recipe(tmp_path, tmp_path / "corpus", grow={"start": 1, "student": {"optimizer.lr": 1e-3}})


def changed(one, other):
    one, other = (flatten(config.model_dump(mode="json")) for config in (one, other))
    return {key: other.get(key) for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def test_students_differ_from_their_teacher_in_what_the_recipe_says_and_nothing_else(path, tmp_path):
    plan = plan_growth(load_recipe(path, ["grow.student={optimizer.lr: 1.0e-3, distill.alpha: 0.5}"]))
    teacher = plan.teacher_recipe()
    student = changed(teacher, plan.student_recipe(tmp_path / "start", "round-01-n01"))
    assert student.pop("run.output").endswith("round-01-n01")
    assert {key for key in student if not key.startswith(("run.", "model"))} == {
        "optimizer.lr",
        "distill.alpha",
        "distill.teacher",
    }
    assert student["distill.teacher"] == str(plan.folder / "teacher")
    control = changed(teacher, plan.control_recipe(tmp_path / "start"))
    assert {key for key in control if not key.startswith(("run.", "model"))} == {"optimizer.lr"}
    assert teacher.model.preset == "llama-tiny"


def test_a_teacher_with_weights_is_scored_not_trained(path, tmp_path):
    folder = tiny_llama(tmp_path / "teacher", layers=6)
    given = [f"model={{path: {folder}, init: weights}}", "grow.start=null", "schedule.warmup_steps=20"]
    plan = plan_growth(load_recipe(path, given))
    scored = plan.teacher_recipe()
    assert (scored.train.steps, scored.schedule.warmup_steps) == (0, 0)
    assert plan.rule.depths == (3, 5, 6)
    assert plan.student_recipe(tmp_path, "round").train.steps == 20


@pytest.mark.parametrize(
    ("override", "code", "said"),
    [
        ("eval.windows=null", 3, "eval.windows"),
        ("grow.start=3", 3, "grow.start"),
        ("grow.tolerance=0.5", 3, "grow.margin"),
        ("grow.mode=again", 3, "grow.mode"),
        ("grow.tolerence=0.1", 3, "Nearest: grow.tolerance"),
        ("grow.student={data.path: other}", 3, "data.path must be the same"),
        ("grow.student={eval.windows: other}", 3, "eval.windows must be the same"),
        ("grow.student={optimizer.rate: 1}", 3, "optimizer.rate: unknown key"),
        ("model={path: nowhere, init: weights}", 5, "nowhere does not exist"),
        ("parallel.tp=2", 3, "tp"),
    ],
)
def test_bad_recipes_end_with_a_sentence_and_their_code(path, capsys, override, code, said):
    assert main(["grow", path, override]) == code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_growth_without_its_data_begins_nothing(path, tmp_path, capsys):
    assert main(["grow", path]) == 4
    error = capsys.readouterr().err
    assert f"The growth reads what is not there: data.path {tmp_path / 'corpus' / 'corpus'}, eval.windows" in error
    assert not (tmp_path / "run").exists()


def test_a_depth_that_the_pipeline_cannot_hold_is_refused_before_the_first_run(path, capsys):
    shape = "model.shape={num_layers: 4, hidden_size: 32, head_dim: 8, ffn_size: 64}"
    words = ["grow", path, shape, "parallel.pp=2", "--processes", "2", "--dry-run"]
    assert main([*words, "grow.start=2", "grow.increment=2"]) == 0
    assert main([*words, "grow.start=2", "grow.increment=1"]) == 3
    assert "3" in capsys.readouterr().err


def test_stages_of_shared_weights_do_not_grow(path, capsys):
    assert main(["grow", path, "sharing.plan='2'"]) == 3
    assert "sharing.plan" in capsys.readouterr().err


def test_a_dry_run_tells_the_rounds_and_writes_nothing(path, tmp_path, capsys):
    assert main(["grow", path, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "trained for 20 steps" in out
    assert "round  1  1 blocks" in out
    assert "round  2  2 blocks" in out
    assert not (tmp_path / "run").exists()


def test_the_recipes_of_the_package_that_grow_can_be_planned():
    names = [name for name in recipe_names() if "grow" in name]
    assert "quickstart-growth" in names
    for name in names:
        plan = plan_growth(load_recipe(name))
        assert plan.rule.start == plan.rule.depth // 2
        assert plan.rule.increment == 2
