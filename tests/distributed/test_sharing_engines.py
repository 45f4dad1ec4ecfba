"""Both engines with shared stages and with teachers, on every layout, against one plain layout."""

import pytest

from megatron_inherit.inherit.inheritune import plan_fresh
from megatron_inherit.plan.execute import execute
from tests.support.engine_world import MODELS, run_world
from tests.support.sharing_engines import Case, run_cases

TAU = {"temperature": 2.0, "alpha": 0.7}
DEEP = {"distributed_optimizer": True, "overlap_grad_reduce": True}


def cases_in(folder):
    teacher = str(folder / "teacher")
    taught = {"teacher": teacher, "distill": TAU}
    hidden = {"teacher": teacher, "distill": {"hidden_weight": 0.5}}
    return {
        "one rank": Case(plan="4,4", save=str(folder / "state")),
        "pp2": Case(plan="4,4", options={"pp": 2}, save=str(folder / "state-pp2")),
        "tp2 pp2": Case(plan="4,4", options={"pp": 2, "tp": 2}),
        "tp2 sequence": Case(plan="4,4", options={"tp": 2, "sequence_parallel": True}),
        "pp4 crossing": Case(plan="4,4", options={"pp": 4}, sharing={"allow_cross_rank": True}),
        "pp4 crossing, sharded": Case(plan="4,4", options={"pp": 4} | DEEP, sharing={"allow_cross_rank": True}),
        "pp2 recompute": Case(plan="4,4", options={"pp": 2, "recompute": "full"} | DEEP),
        "zero1": Case("deepspeed", plan="4,4", options={"zero_stage": 1}),
        "zero2 recompute": Case("deepspeed", plan="4,4", options={"zero_stage": 2, "recompute": "full"}),
        "zero3 recompute": Case("deepspeed", plan="4,4", options={"zero_stage": 3, "recompute": "full"}),
        "refused": Case(plan="4,4", options={"pp": 4}),
        "uncovered": Case(plan="4,3"),
        "resumed": Case(plan="4,4", restore=str(folder / "state")),
        "resumed, pp4": Case(
            plan="4,4", options={"pp": 4}, sharing={"allow_cross_rank": True}, restore=str(folder / "state-pp2")
        ),
        "resumed, zero3": Case("deepspeed", plan="4,4", options={"zero_stage": 3}, restore=str(folder / "state-pp2")),
        "split": Case(plan="2,2,2,2", restore=str(folder / "state")),
        "taught": Case(plan="4,4", **taught),
        "taught, pp2": Case(plan="4,4", options={"pp": 2}, **taught),
        "taught, tp2": Case(plan="4,4", options={"tp": 2, "sequence_parallel": True}, **taught),
        "taught, zero3": Case("deepspeed", plan="4,4", options={"zero_stage": 3, "recompute": "full"}, **taught),
        "hidden": Case(plan="4,4", **hidden),
        "hidden, pp2": Case(plan="4,4", options={"pp": 2, "recompute": "full"}, **hidden),
        "hidden, zero2": Case("deepspeed", plan="4,4", options={"zero_stage": 2}, **hidden),
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    execute(plan_fresh(MODELS["llama"].with_layers(6), seed=5, std=0.2), folder / "teacher")
    return run_world(4, run_cases, cases_in(folder), timeout_s=500)[0]


def rows(outcomes, name):
    assert isinstance(outcomes[name], tuple), outcomes[name]
    return outcomes[name][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("pp2", "one rank"),
        ("tp2 pp2", "one rank"),
        ("tp2 sequence", "one rank"),
        ("pp4 crossing", "one rank"),
        ("pp4 crossing, sharded", "one rank"),
        ("pp2 recompute", "one rank"),
        ("zero1", "one rank"),
        ("zero2 recompute", "one rank"),
        ("zero3 recompute", "one rank"),
        ("taught, pp2", "taught"),
        ("taught, tp2", "taught"),
        ("taught, zero3", "taught"),
        ("hidden, pp2", "hidden"),
        ("hidden, zero2", "hidden"),
        ("resumed, pp4", "resumed"),
        ("resumed, zero3", "resumed"),
    ],
)
def test_every_layout_trains_alike(outcomes, name, reference):
    for (loss, norm), (wanted_loss, wanted_norm) in zip(rows(outcomes, name), rows(outcomes, reference), strict=True):
        assert loss == pytest.approx(wanted_loss, abs=5e-6)
        assert norm == pytest.approx(wanted_norm, rel=2e-5)


@pytest.mark.slow
def test_teachers_change_what_is_learnt(outcomes):
    losses = [rows(outcomes, name)[-1][0] for name in ("one rank", "taught", "hidden")]
    assert len({round(loss, 3) for loss in losses}) == 3
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
