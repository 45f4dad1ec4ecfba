"""Both engines with shared stages and with teachers, on every layout, against one plain layout."""

import numpy as np
import pytest

from megatron_inherit.distill.cache import CacheKey, Manifest
from megatron_inherit.distill.cache_writer import write_cache
from megatron_inherit.inherit.inheritune import plan_fresh
from megatron_inherit.plan.execute import execute
from tests.support.engine_world import GLOBAL_BATCH, MODELS, SEQUENCE, VOCAB, run_world
from tests.support.sharing_engines import STEPS, Case, assert_alike, rows, run_cases

pytestmark = pytest.mark.timeout(1200)  # one world runs all cases before the first test

TAU = {"temperature": 2.0, "alpha": 0.7}
DEEP = {"distributed_optimizer": True, "overlap_grad_reduce": True}
MEAN = {"gradient": "mean"}
CROSS = {"allow_cross_rank": True}


def cases_in(folder):
    teacher = str(folder / "teacher")
    taught = {"teacher": teacher, "distill": TAU}
    hidden = {"teacher": teacher, "distill": {"hidden_weight": 0.5}}
    shallow = str(folder / "shallow")
    cached = {"cache": str(folder / "top"), "distill": TAU}
    drawn = {"cache": str(folder / "draw"), "distill": {"temperature": 2.0}}
    return {
        "one rank": Case(plan="4,4", save=str(folder / "state")),
        "pp2": Case(plan="4,4", options={"pp": 2}, save=str(folder / "state-pp2")),
        "tp2 pp2": Case(plan="4,4", options={"pp": 2, "tp": 2}),
        "tp2 sequence": Case(plan="4,4", options={"tp": 2, "sequence_parallel": True}),
        "pp4 crossing": Case(plan="4,4", options={"pp": 4}, sharing=CROSS),
        "pp4 crossing, sharded": Case(plan="4,4", options={"pp": 4} | DEEP, sharing=CROSS),
        "one stage": Case(plan="8"),
        "tp2 pp2 crossing": Case(plan="8", options={"pp": 2, "tp": 2}, sharing=CROSS),
        "tp2 pp2 crossing, sharded": Case(
            plan="8", options={"pp": 2, "tp": 2, "sequence_parallel": True, "recompute": "full"} | DEEP, sharing=CROSS
        ),
        "cp2 pp2 crossing": Case(plan="8", options={"pp": 2, "cp": 2} | DEEP, sharing=CROSS),
        "pp2 recompute": Case(plan="4,4", options={"pp": 2, "recompute": "full"} | DEEP),
        "zero1": Case("deepspeed", plan="4,4", options={"zero_stage": 1}),
        "zero2 recompute": Case("deepspeed", plan="4,4", options={"zero_stage": 2, "recompute": "full"}),
        "zero3 recompute": Case("deepspeed", plan="4,4", options={"zero_stage": 3, "recompute": "full"}),
        "zero3 tp2": Case("deepspeed", plan="4,4", options={"zero_stage": 3, "tp": 2}),
        "zero1 tp2 sequence": Case(
            "deepspeed", plan="4,4", options={"zero_stage": 1, "tp": 2, "sequence_parallel": True}
        ),
        "cp2": Case(plan="4,4", options={"cp": 2}),
        "cp2 pp2 sharded": Case(plan="4,4", options={"cp": 2, "pp": 2} | DEEP),
        "pp2 vpp2": Case(plan="2,2,2,2", options={"pp": 2, "vpp": 2}),
        "pp2 vpp2, sharded": Case(plan="2,2,2,2", options={"pp": 2, "vpp": 2, "recompute": "full"} | DEEP),
        "four stages": Case(plan="2,2,2,2"),
        "mean": Case(plan="1,7", sharing=MEAN),
        "mean, pp4 crossing": Case(plan="1,7", options={"pp": 4} | DEEP, sharing=MEAN | CROSS),
        "mean, zero0": Case("deepspeed", plan="1,7", options={"zero_stage": 0}, sharing=MEAN),
        "mean, zero2": Case("deepspeed", plan="1,7", options={"zero_stage": 2, "recompute": "full"}, sharing=MEAN),
        "mean, zero3": Case("deepspeed", plan="1,7", options={"zero_stage": 3}, sharing=MEAN),
        "sum": Case(plan="1,7"),
        "bf16": Case(plan="4,4", options={"dtype": "bf16"}),
        "bf16, pp4 crossing": Case(plan="4,4", options={"pp": 4, "dtype": "bf16"} | DEEP, sharing=CROSS),
        "bf16, zero2": Case("deepspeed", plan="4,4", options={"zero_stage": 2, "dtype": "bf16", "recompute": "full"}),
        "bf16, zero3": Case("deepspeed", plan="4,4", options={"zero_stage": 3, "dtype": "bf16"}),
        "spoiled": Case(plan="4,4", options={"pp": 4}, sharing=CROSS, spoil=True),
        "refused": Case(plan="4,4", options={"pp": 4}),
        "uncovered": Case(plan="4,3"),
        "resumed": Case(plan="4,4", restore=str(folder / "state")),
        "resumed, pp4": Case(plan="4,4", options={"pp": 4}, sharing=CROSS, restore=str(folder / "state-pp2")),
        "resumed, zero3": Case("deepspeed", plan="4,4", options={"zero_stage": 3}, restore=str(folder / "state-pp2")),
        "split": Case(plan="2,2,2,2", restore=str(folder / "state")),
        "taught": Case(plan="4,4", **taught),
        "taught, pp2": Case(plan="4,4", options={"pp": 2}, **taught),
        "taught, tp2": Case(plan="4,4", options={"tp": 2, "sequence_parallel": True}, **taught),
        "taught, zero3": Case("deepspeed", plan="4,4", options={"zero_stage": 3, "recompute": "full"}, **taught),
        "taught, zero3 tp2": Case("deepspeed", plan="4,4", options={"zero_stage": 3, "tp": 2}, **taught),
        "taught, cp2": Case(plan="4,4", options={"cp": 2}, **taught),
        "taught, four stages": Case(plan="2,2,2,2", **taught),
        "taught, pp2 vpp2": Case(plan="2,2,2,2", options={"pp": 2, "vpp": 2}, **taught),
        "hidden, four stages": Case(plan="2,2,2,2", **hidden),
        "hidden, apart": Case(plan="4,1,3", options={"pp": 2}, teacher=shallow, distill={"hidden_weight": 0.5}),
        "hidden, pp2 vpp2": Case(plan="2,2,2,2", options={"pp": 2, "vpp": 2}, **hidden),
        "hidden": Case(plan="4,4", **hidden),
        "hidden, pp2": Case(plan="4,4", options={"pp": 2, "recompute": "full"}, **hidden),
        "hidden, zero2": Case("deepspeed", plan="4,4", options={"zero_stage": 2}, **hidden),
        "cached": Case(plan="4,4", **cached),
        "cached, pp2": Case(plan="4,4", options={"pp": 2} | DEEP, **cached),
        "cached, tp2 sequence": Case(plan="4,4", options={"tp": 2, "sequence_parallel": True}, **cached),
        "cached, cp2": Case(plan="4,4", options={"cp": 2}, **cached),
        "cached, zero3": Case("deepspeed", plan="4,4", options={"zero_stage": 3}, **cached),
        "cached, four stages": Case(plan="2,2,2,2", **cached),
        "cached, pp2 vpp2": Case(plan="2,2,2,2", options={"pp": 2, "vpp": 2}, **cached),
        "drawn": Case(plan="4,4", **drawn),
        "drawn, tp2": Case(plan="4,4", options={"tp": 2}, **drawn),
    }


def write_targets(folder, method):
    """Makes up a teacher's targets: five tokens of a token, with 0.9 of the probability or as shares of draws."""
    key = CacheKey("", "", "", TAU["temperature"], SEQUENCE, VOCAB)
    random = np.random.default_rng(3)

    def predict(samples):
        shape = (len(samples), SEQUENCE)
        ids = np.argsort(random.random((*shape, VOCAB)))[..., :5]
        inside = 0.9 if method == "top" else 1.0
        return ids, np.log(inside * random.dirichlet(np.ones(5), shape)).astype(np.float32)

    wanted = Manifest(key, method, entries=5, num_samples=STEPS * GLOBAL_BATCH, shard_samples=7)
    list(write_cache(folder, wanted, lambda start, count: np.arange(start, start + count), predict))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    execute(plan_fresh(MODELS["llama"].with_layers(6), seed=5, std=0.2), folder / "teacher")
    execute(plan_fresh(MODELS["llama"].with_layers(4), seed=5, std=0.2), folder / "shallow")
    for method in ("top", "draw"):
        write_targets(folder / method, method)
    return run_world(4, run_cases, cases_in(folder), timeout_s=1100)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("pp2", "one rank"),
        ("tp2 pp2", "one rank"),
        ("tp2 sequence", "one rank"),
        ("pp4 crossing", "one rank"),
        ("pp4 crossing, sharded", "one rank"),
        ("tp2 pp2 crossing", "one stage"),
        ("tp2 pp2 crossing, sharded", "one stage"),
        ("cp2 pp2 crossing", "one stage"),
        ("pp2 recompute", "one rank"),
        ("zero1", "one rank"),
        ("zero2 recompute", "one rank"),
        ("zero3 recompute", "one rank"),
        ("taught, pp2", "taught"),
        ("taught, tp2", "taught"),
        ("taught, zero3", "taught"),
        ("hidden, pp2", "hidden"),
        ("hidden, zero2", "hidden"),
        ("zero3 tp2", "one rank"),
        ("zero1 tp2 sequence", "one rank"),
        ("cp2", "one rank"),
        ("cp2 pp2 sharded", "one rank"),
        ("pp2 vpp2", "four stages"),
        ("pp2 vpp2, sharded", "four stages"),
        ("mean, pp4 crossing", "mean"),
        ("mean, zero0", "mean"),
        ("mean, zero2", "mean"),
        ("mean, zero3", "mean"),
        ("taught, zero3 tp2", "taught"),
        ("taught, cp2", "taught"),
        ("taught, pp2 vpp2", "taught, four stages"),
        ("hidden, pp2 vpp2", "hidden, four stages"),
        ("cached, pp2", "cached"),
        ("cached, tp2 sequence", "cached"),
        ("cached, cp2", "cached"),
        ("cached, zero3", "cached"),
        ("cached, pp2 vpp2", "cached, four stages"),
        ("drawn, tp2", "drawn"),
        ("resumed, pp4", "resumed"),
        ("resumed, zero3", "resumed"),
    ],
)
def test_every_layout_trains_alike(outcomes, name, reference):
    assert_alike(rows(outcomes, name), rows(outcomes, reference))


@pytest.mark.slow
def test_teachers_change_what_is_learnt(outcomes):
    losses = [rows(outcomes, name)[-1][0] for name in ("one rank", "taught", "hidden", "cached", "drawn")]
    assert len({round(loss, 3) for loss in losses}) == 5
    norms = [rows(outcomes, name)[0][1] for name in ("taught", "hidden")]
    assert abs(norms[0] - norms[1]) > 1e-3


@pytest.mark.slow
def test_stored_names_are_those_of_stages(outcomes):
    names = outcomes["zero3 recompute"][1]
    assert "sws.stages.0.attn.q.weight" in names
    assert "sws.stages.1.mlp_norm.weight" in names
    assert not any(name.startswith("layers.") for name in names)


@pytest.mark.slow
def test_a_split_starts_at_the_coarse_models_loss(outcomes):
    """The finer plan's first step: the same function, so the loss of the coarse run at that step."""
    assert rows(outcomes, "split")[0][0] == pytest.approx(rows(outcomes, "resumed")[0][0], abs=1e-6)
    assert rows(outcomes, "split")[2][0] != pytest.approx(rows(outcomes, "resumed")[2][0], abs=1e-6)
    assert "sws.stages.3.attn.q.weight" in outcomes["split"][1]


@pytest.mark.slow
def test_plans_that_do_not_fit_are_refused(outcomes):
    assert "allow_cross_rank" in outcomes["refused"]
    assert "does not cover" in outcomes["uncovered"]
    assert "lies on another pipeline rank" in outcomes["hidden, apart"]


@pytest.mark.slow
def test_a_run_whose_copies_differ_is_stopped(outcomes):
    assert "differ at step 4" in outcomes["spoiled"]


@pytest.mark.slow
def test_a_mean_over_the_uses_is_a_smaller_gradient(outcomes):
    assert rows(outcomes, "mean")[0][0] == rows(outcomes, "sum")[0][0]
    assert rows(outcomes, "mean")[0][1] < 0.9 * rows(outcomes, "sum")[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16, pp4 crossing", "bf16, zero2", "bf16, zero3"])
def test_bf16_layouts_stay_near_one_rank(outcomes, name):
    for (loss, norm), (wanted_loss, wanted_norm) in zip(rows(outcomes, name), rows(outcomes, "bf16"), strict=True):
        assert loss == pytest.approx(wanted_loss, abs=3e-2)
        assert norm == pytest.approx(wanted_norm, rel=3e-2)
