"""Runs of two ranks whose stages are split on the way, by step and by patience, against the run of one process."""

import os

import pytest

from megatron_inherit.cli.main import main
from tests.support import tiny_run
from tests.support.engine_world import run_world
from tests.support.forked_world import free_port
from tests.support.tiny_run import recipe, rows

pytestmark = pytest.mark.slow

SPLITS = (
    "model.shape.num_layers=8",
    "sharing.plan=4,4",
    "sharing.untie=[{plan: '2,2,2,2', step: 2}, {plan: 'unshared:8', patience: 1, improvement: 10.0}]",
    "train.steps=8",
    "eval.every_steps=2",
)
LAYOUTS = {
    "pp2": ("parallel.pp=2", "megatron.distributed_optimizer=true"),
    "dp2": ("megatron.distributed_optimizer=true", "megatron.overlap_grad_reduce=true"),
}


def run_lines(lines):
    """Runs command lines one after another, each in a world of its own port; gives their exit codes."""
    codes = []
    for port, words in lines:
        os.environ["MASTER_PORT"] = str(port)
        codes.append(main(list(words)))
    return codes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    corpus = tiny_run.write_corpus(folder / "corpus")
    paths = {name: recipe(folder / name, corpus) for name in ("one", *LAYOUTS, "parts")}
    assert main(["train", paths["one"], *SPLITS]) == 0
    lines = [("train", paths[name], *SPLITS, *words) for name, words in LAYOUTS.items()]
    parts = ("train", paths["parts"], *SPLITS, *LAYOUTS["dp2"])
    lines += [(*parts, "train.stop_after=3"), (*parts, "train.stop_after=2"), parts]
    ports = [free_port() for _ in lines]
    codes = run_world(2, run_lines, list(zip(ports, lines, strict=True)), timeout_s=400)
    assert codes == [[0] * len(LAYOUTS) + [75, 75, 0]] * 2
    return folder


def curve(runs, name, kind="train"):
    return [(row["step"], row["loss"], row.get("grad_norm", 0.0)) for row in rows(runs / name / "run", kind)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_split_as_one_process_does(runs, name):
    assert [(row["step"], row["plan"]) for row in rows(runs / name / "run", "untie")] == [
        (2, "stages:2,2,2,2"),
        (6, "stages:1,1,1,1,1,1,1,1"),
    ]
    for (step, loss, norm), (other, wanted, wanted_norm) in zip(curve(runs, name), curve(runs, "one"), strict=True):
        assert step == other
        assert loss == pytest.approx(wanted, abs=1e-5)
        assert norm == pytest.approx(wanted_norm, rel=1e-4)


def test_a_run_stopped_around_its_splits_goes_on_exactly(runs):
    assert curve(runs, "parts") == curve(runs, "dp2")
    assert curve(runs, "parts", "eval") == curve(runs, "dp2", "eval")
