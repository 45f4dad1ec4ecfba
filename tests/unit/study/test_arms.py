"""One arm: its start is made once, its run is resumed or only read, and a run of another recipe is not continued."""

import signal
import subprocess
import sys
import time

import pytest
import yaml

from megatron_inherit.base.errors import ConfigError, PreemptedError
from megatron_inherit.config.load import load_recipe, to_yaml
from megatron_inherit.study.arms import Trainer, is_finished, make_start
from tests.support import forked_world
from tests.support.forked_trainer import ForkedTrainer
from tests.support.tiny_run import curve, recipe, status, write_corpus

pytest.importorskip("megatron.core")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    forked_world.preload()
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.slow
def test_an_arm_from_start_to_rows_and_back_again(tmp_path, corpus):
    teacher = load_recipe(recipe(tmp_path / "teacher", corpus))
    with ForkedTrainer() as trainer:
        trainer.train(teacher)
        start = make_start(teacher.run.output, tmp_path / "start", layers="first:1")
        stamp = (start / "inherit.json").stat().st_mtime_ns
        student = load_recipe(
            recipe(
                tmp_path / "student", corpus, model={"path": str(start), "preset": None, "init": "weights", "shape": {}}
            )
        )
        run = trainer.train(student)
        assert run.evals[-1]["step"] == 20
        assert run.evals[0]["step"] == 0
        assert run.inheritance["plan"]["layer_map"] == [0]
        began = (tmp_path / "student/run/console.log").stat().st_size
        again = trainer.train(student)
        assert again.evals == run.evals
        assert (tmp_path / "student/run/console.log").stat().st_size == began, "a finished run was run again"
    assert make_start(teacher.run.output, start, layers="first:1").joinpath("inherit.json").stat().st_mtime_ns == stamp
    other = student.model_copy(update={"optimizer": student.optimizer.model_copy(update={"lr": 1e-3})})
    with pytest.raises(ConfigError, match=r"another recipe: optimizer\.lr differs"):
        is_finished(other)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_rows(tmp_path, corpus):
    whole = load_recipe(recipe(tmp_path / "whole", corpus))
    with ForkedTrainer() as trainer:
        trainer.train(whole)
    path = recipe(tmp_path / "killed", corpus)
    code = (
        "import sys\n"
        "from megatron_inherit.config.load import load_recipe, to_yaml\n"
        "from megatron_inherit.study.arms import Trainer\n"
        "with Trainer() as trainer: trainer.train(load_recipe(sys.argv[1]))"
    )
    folder = tmp_path / "killed/run"
    parent = subprocess.Popen([sys.executable, "-c", code, path])
    while not list(folder.glob("checkpoints/step_*/manifest.json")):
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    with Trainer() as trainer:
        trainer.train(load_recipe(path))
    assert curve(folder) == curve(tmp_path / "whole/run")
    assert status(folder)["exit_code"] == 0


@pytest.mark.slow
def test_a_run_that_fails_says_why_with_its_exit_code(tmp_path, corpus):
    path = recipe(tmp_path / "bad", corpus, data={"path": str(tmp_path / "nowhere")})
    with ForkedTrainer() as trainer, pytest.raises(Exception, match="nowhere") as caught:
        trainer.train(load_recipe(path))
    assert caught.value.exit_code == 4


@pytest.mark.slow
def test_a_stopped_trainer_begins_nothing(tmp_path, corpus):
    trainer = Trainer()
    trainer.stop()
    with pytest.raises(PreemptedError):
        trainer.train(load_recipe(recipe(tmp_path / "late", corpus)))
    assert not list((tmp_path / "late/run").glob("*.yaml"))


def test_a_run_of_a_version_with_fewer_keys_is_still_the_same_run(tmp_path):
    config = load_recipe(recipe(tmp_path, tmp_path / "corpus"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    values = yaml.safe_load(to_yaml(config))
    del values["deepspeed"], values["eval"]["every_steps"]
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"eval\.every_steps differs"):
        is_finished(config)
    del values["schedule"]["decay_shape"]
    values["eval"]["every_steps"] = config.eval.every_steps
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    assert not is_finished(config)
    values["a_key_of_the_past"] = 1
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="a_key_of_the_past differs"):
        is_finished(config)
