"""Growth with real trainings: it stops where a threshold is planted, and a kill at any instant changes nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.checkpoint.formats.hf_config import write_config
from megatron_inherit.eval.runs import find_runs, load_run
from tests.support import forked_world, tiny_run

pytestmark = pytest.mark.slow
USEFUL, DEPTH = 2, 4
"""Blocks of the planted teacher that do something, and all of its blocks."""
ALIGNED = {"distill.hidden_weight": 1.0, "distill.hidden_kind": "cosine", "distill.alpha": 0.5}
"""What students are trained with whose blocks are to be patched."""


class ForkedRuns:
    """Runs recipes as ``study.arms.Trainer`` does, in processes that have everything imported.

    A run that is killed takes the whole growth with it.
    """

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def train(self, config):
        from megatron_inherit.config.load import to_yaml
        from megatron_inherit.study.arms import is_finished

        folder = Path(config.run.output)
        if not is_finished(config):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "run.yaml").write_text(to_yaml(config))
            faults = json.loads(os.environ.get("FAULT_OF_RUN", "{}"))
            ended = forked_world.run(
                folder / "logs", ["train", str(folder / "run.yaml")], MI_FAULT=faults.get(folder.name, "")
            )
            if ended.codes == [-signal.SIGKILL]:
                os.kill(os.getpid(), signal.SIGKILL)
            assert ended.codes == [0], ended.text
        return load_run(folder)


def grow(folder, path, *overrides, fault="", fault_of_run=None):
    """Runs ``minherit grow`` in a process of its own."""

    def use_forks():
        import megatron_inherit.study.arms as arms

        arms.Trainer = ForkedRuns

    return forked_world.run(
        folder / "console",
        ["grow", path, *overrides],
        before=use_forks,
        MI_FAULT=fault,
        FAULT_OF_RUN=json.dumps(fault_of_run or {}),
    )


def record(run):
    return json.loads((run / "grow.json").read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    forked_world.preload("megatron_inherit.study.grow", "megatron_inherit.cli.grow")
    return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


def write_planted(trained, folder):
    """Puts blocks that do nothing behind those of a trained model: its first ``USEFUL`` blocks are all it is."""
    from safetensors.numpy import load_file, save_file

    from megatron_inherit.study.arms import make_start

    layers = [*range(USEFUL), *[USEFUL - 1] * (DEPTH - USEFUL)]
    make_start(trained, folder, layers=layers)
    values = load_file(folder / "model.safetensors")
    for name in values:
        block = re.match(r"model\.layers\.(\d+)\..*(o_proj|down_proj)", name)
        if block and int(block[1]) >= USEFUL:
            values[name] = np.zeros_like(values[name])
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory, corpus):
    """A teacher of four blocks, the last two of which are identities."""
    folder = tmp_path_factory.mktemp("teacher")
    shape = {"num_layers": USEFUL, "hidden_size": 32, "head_dim": 8, "ffn_size": 64}
    path = tiny_run.recipe(
        folder,
        corpus,
        model={"shape": shape},
        train={"steps": 120},
        optimizer={"lr": 1e-2},
        checkpoint={"every_steps": 120},
        eval={"every_steps": 120},
    )
    ended = forked_world.run(folder, ["train", path])
    assert ended.codes == [0], ended.text
    return write_planted(folder / "run", folder / "planted")


def still(folder, corpus, teacher, **grow_section):
    """A recipe whose students keep the weights they start with."""
    return tiny_run.recipe(
        folder,
        corpus,
        model={"preset": None, "shape": {}, "path": str(teacher), "init": "weights"},
        train={"steps": 2},
        optimizer={"lr": 1e-12},
        schedule={"warmup_steps": 0, "floor_lr": 0.0},
        grow={"start": 1, "increment": 1, "tolerance": 0.001, "margin": 0.03, **grow_section},
    )


@pytest.mark.parametrize("mode", ["restart", "continue"])
def test_it_stops_at_the_planted_depth(tmp_path, corpus, planted, mode):
    ended = grow(tmp_path, still(tmp_path, corpus, planted, mode=mode))
    assert ended.codes == [0], ended.text
    found = record(tmp_path / "run")
    assert found["control"]["gap"] > 0.1
    assert not found["control"]["vacuous"]
    assert [row["layers"] for row in found["rounds"]] == [1, 2]
    assert [row["parity"] for row in found["rounds"]] == [False, True]
    assert found["rounds"][0]["gap"] > 0.01
    assert abs(found["rounds"][1]["gap"]) < 1e-6
    assert found["outcome"] == {"reason": "parity", "layers": USEFUL, "student": "round-02-n02"}
    assert "Not vacuous" in ended.text
    assert re.search(r"2 of 4 blocks match the teacher: .*run/student\.", ended.text)
    teachers = load_run(tmp_path / "run" / "teacher").final["loss"]
    with open_source(tmp_path / "run" / "student") as student:
        assert student.config.num_layers == USEFUL
    assert load_run(tmp_path / "run" / "student").final["loss"] == pytest.approx(teachers, abs=1e-6)
    if mode == "continue":
        made = json.loads((tmp_path / "run" / "round-02-n02" / "start" / "inherit.json").read_text())
        assert made["grown"]["blocks"] == "0 of the student, 1"


def test_patching_scores_ever_more_of_the_teacher_without_training(tmp_path, corpus, planted):
    path = still(
        tmp_path,
        corpus,
        planted,
        mode="patch",
        start=2,
        control=False,
        student=ALIGNED,
    )
    ended = grow(tmp_path, path)
    assert ended.codes == [0], ended.text
    found = record(tmp_path / "run")
    assert [row["trained"] for row in found["rounds"]] == [True, False, False]
    assert [row["blocks"] for row in found["rounds"]] == ["0, 2", "0 of the student, 2-3", "0-3"]
    assert found["control"] is None
    assert found["rounds"][0]["steps"] == 2
    assert found["rounds"][2]["gap"] == 0
    assert found["outcome"]["student"] == "round-03-n04/start"
    assert not list((tmp_path / "run").glob("round-0[23]*/checkpoints/step_*"))
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


def test_a_question_without_an_answer_is_said(tmp_path, corpus):
    path = tiny_run.recipe(tmp_path, corpus, train={"steps": 3}, grow={"start": 1})
    ended = grow(tmp_path, path)
    assert ended.codes == [0], ended.text
    found = record(tmp_path / "run")
    assert found["control"]["vacuous"]
    assert found["rounds"] == []
    assert found["outcome"] == {"reason": "vacuous", "layers": None, "student": None}
    assert "The question is vacuous" in ended.text
    assert "so nothing was grown" in ended.text
    shutil.rmtree(tmp_path / "run")
    ended = grow(tmp_path, path, "grow.when_vacuous=continue")
    assert ended.codes == [0], ended.text
    assert record(tmp_path / "run")["outcome"]["student"].startswith("round-")
    assert "The question was vacuous" in ended.text


def trained(folder, corpus, mode="restart"):
    """A recipe in which everything is trained, and students so fast that they never match their teacher."""
    student = {"optimizer.lr": 0.1} | (ALIGNED if mode == "patch" else {})
    return tiny_run.recipe(
        folder,
        corpus,
        model={"shape": {"num_layers": 4 if mode == "patch" else 3, "hidden_size": 32, "head_dim": 8, "ffn_size": 64}},
        train={"steps": 8},
        checkpoint={"every_steps": 4},
        eval={"every_steps": 8},
        grow={
            "mode": mode,
            "start": 2,
            "increment": 1,
            "tolerance": 0.0,
            "margin": 0.0,
            "when_vacuous": "continue",
            "student": student,
        },
    )


def decisions(run):
    """The record without what depends on time and place."""
    kept = record(run)
    rows = [kept["teacher"], kept["control"], *kept["rounds"]]
    return [{k: v for k, v in row.items() if k not in ("seconds", "path")} for row in rows], kept["outcome"]


def weights(run):
    """Hashes of every run's last checkpoint, and of what every student started from."""
    folders = [folder for folder in run.iterdir() if folder.is_dir() and not folder.is_symlink()]
    trained = [folder for folder in folders if list(folder.glob("checkpoints/step_*"))]
    starts = [path for folder in folders for path in folder.glob("start/model.safetensors")]
    return {folder.name: tiny_run.saved_hashes(folder, 8) for folder in trained} | {
        str(path.parent.relative_to(run)): path.read_bytes() for path in starts
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory, corpus):
    """The uninterrupted growth."""
    folder = tmp_path_factory.mktemp("reference")
    ended = grow(folder, trained(folder, corpus))
    assert ended.codes == [0], ended.text
    assert [row["layers"] for row in record(folder / "run")["rounds"]] == [2, 3]
    runs = {"teacher", "control", "round-01-n02", "round-02-n03"}
    assert set(weights(folder / "run")) == runs | {f"{name}/start" for name in runs - {"teacher"}}
    return folder / "run"


def same(run, reference):
    assert decisions(run) == decisions(reference)
    assert weights(run) == weights(reference)


@pytest.mark.parametrize(
    ("fault", "fault_of_run"),
    [
        ("round_started:0:2", {}),
        ("before_record:0:1", {}),
        ("", {"round-02-n03": "after_step:0:6:kill"}),
    ],
)
def test_killed_anywhere_it_comes_to_the_same_decisions_and_weights(tmp_path, corpus, reference, fault, fault_of_run):
    path = trained(tmp_path, corpus)
    ended = grow(tmp_path, path, fault=f"{fault}:kill" if fault else "", fault_of_run=fault_of_run)
    assert ended.codes == [-signal.SIGKILL]
    ended = grow(tmp_path, path)
    assert ended.codes == [0], ended.text
    same(tmp_path / "run", reference)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("mode", "fault", "fault_of_run"),
    [
        ("continue", "round_started:0:2", {}),
        ("continue", "", {"round-02-n03": "after_step:0:6:kill"}),
        ("patch", "round_started:0:2", {}),
        ("patch", "before_record:0:2", {}),
    ],
)
def test_killed_in_its_second_round_every_mode_comes_to_the_same(tmp_path, corpus, mode, fault, fault_of_run):
    whole = tmp_path / "whole"
    ended = grow(whole, trained(whole, corpus, mode))
    assert ended.codes == [0], ended.text
    rows = record(whole / "run")["rounds"]
    assert [row["layers"] for row in rows] == ([2, 3] if mode == "continue" else [2, 3, 4])
    assert [row["trained"] for row in rows] == ([True, True] if mode == "continue" else [True, False, False])
    path = trained(tmp_path / "killed", corpus, mode)
    ended = grow(tmp_path / "killed", path, fault=f"{fault}:kill" if fault else "", fault_of_run=fault_of_run)
    assert ended.codes == [-signal.SIGKILL]
    assert len(record(tmp_path / "killed" / "run")["rounds"]) == 1, "in the second round"
    ended = grow(tmp_path / "killed", path)
    assert ended.codes == [0], ended.text
    same(tmp_path / "killed" / "run", whole / "run")


def test_a_finished_growth_is_told_again_and_another_recipe_is_refused(tmp_path, corpus, reference):
    shutil.copytree(reference.parent, tmp_path / "copy")
    path = tiny_run.recipe(tmp_path / "copy", corpus)
    (tmp_path / "copy" / "recipe.yaml").write_text((reference.parent / "recipe.yaml").read_text())
    assert {run.label for run in find_runs([reference])} == {"teacher", "control", "round-01-n02", "round-02-n03"}
    stamps = {file: file.stat().st_mtime_ns for file in reference.rglob("*.safetensors")}
    again = grow(tmp_path, str(reference.parent / "recipe.yaml"))
    assert again.codes == [0], again.text
    assert re.search(r"round 2 +3 +8 ", again.text)
    assert {file: file.stat().st_mtime_ns for file in reference.rglob("*.safetensors")} == stamps
    other = grow(tmp_path, path, f"run.output={reference}", "grow.tolerance=0.5", "grow.margin=0.5")
    assert other.codes == [3]
    assert "holds a growth of another recipe" in other.text


@pytest.mark.nightly
def test_the_run_of_a_killed_growth_saves_and_the_next_growth_waits_for_it(tmp_path, corpus, reference):
    path = trained(tmp_path, corpus)
    command = [sys.executable, "-m", "megatron_inherit", "grow", path]
    environment = os.environ | {"MI_FAULT": "step_start:0:6:sleep=3"}
    child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2])
    waiting = tmp_path / "run" / "round-02-n03" / "checkpoints" / "step_00000004"
    deadline = time.monotonic() + 400
    while not waiting.exists() and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    child.kill()
    child.wait()
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 0, ended.stderr
    same(tmp_path / "run", reference)


def test_the_shape_of_the_planted_teacher_is_the_trained_one(planted):
    with open_source(planted) as source:
        assert source.config.num_layers == DEPTH
        names = [spec.name for spec in enumerate_tensors(source.config)]
        assert write_config(source.config, "F32")["num_hidden_layers"] == DEPTH
        assert not source.read("layers.3.attn.o.weight").array().any()
        assert source.read("layers.1.attn.o.weight").array().any()
        assert "layers.3.mlp.down.weight" in names
