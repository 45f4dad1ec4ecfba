"""Runs of two ranks whose stages are split on the way, by step and by patience, against the run of one process."""

import os

import numpy as np
import pytest

from megatron_inherit.checkpoint.formats import native
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
    "zero1": ("engine=deepspeed", "deepspeed.zero_stage=1"),
    "zero3": ("engine=deepspeed", "deepspeed.zero_stage=3", "train.recompute=full"),
}
ZERO = ("zero1", "zero3")
BETA = 0.9
COARSE = (
    "model.shape.num_layers=8",
    "sharing.plan=4,4",
    "train.steps=3",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=9",
    "optimizer.clip=0",
    f"optimizer.beta1={BETA}",
)
FINER = "sharing.untie=[{plan: '2,2,2,2', step: 2}]"


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
    for name in ZERO:
        for more in ("coarse", "finer"):
            path = recipe(folder / f"{name} {more}", corpus)
            lines.append(("train", path, *COARSE, *LAYOUTS[name], *((FINER,) if more == "finer" else ())))
    ports = [free_port() for _ in lines]
    codes = run_world(2, run_lines, list(zip(ports, lines, strict=True)), timeout_s=400)
    assert codes == [[0] * len(LAYOUTS) + [75, 75, 0] + [0] * 2 * len(ZERO)] * 2
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


def state(runs, name, step, what):
    with native.open_source(runs / name / "run" / "checkpoints" / f"step_{step:08d}") as source:
        return source.read(what).array().astype(np.float64)


@pytest.mark.parametrize("name", ZERO)
def test_a_split_under_zero_moves_neither_loss_nor_moments(runs, name):
    """The step after it: the loss of a run that was not split, and children's moments that decay from their parent's.

    Unclipped gradients of the children add up to their parent's, so with m and n the parent's first moment before the
    step and after it where nothing was split, those of its two children add up to n + beta m.
    """
    coarse, finer = curve(runs, f"{name} coarse"), curve(runs, f"{name} finer")
    assert finer[:2] == coarse[:2]
    assert finer[2][1] == pytest.approx(coarse[2][1], abs=1e-6)
    for first in (0, 4):  # layers 0-3 and 4-7 before; 0-1, 2-3, 4-5, 6-7 after
        for inside in ("attn.q.weight", "mlp.down.weight", "mlp_norm.weight"):
            before, after = (state(runs, f"{name} coarse", s, f"exp_avg:layers.{first}.{inside}") for s in (2, 3))
            one, other = (
                state(runs, f"{name} finer", 3, f"exp_avg:layers.{child}.{inside}") for child in (first, first + 2)
            )
            np.testing.assert_allclose(one + other, after + BETA * before, rtol=1e-3, atol=1e-6)
            assert np.abs(one - other).max() > 1e-6
