"""Gates, factors and splits of stages on every layout of both engines, against one plain rank."""

import pytest

from megatron_inherit.sharing.regularise import SoftTie
from megatron_inherit.sharing.stage_plan import contiguous
from tests.support.engine_world import run_world
from tests.support.sharing_engines import Case, assert_alike, rows, run_cases

pytestmark = pytest.mark.slow

SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True}
LAYOUTS = {
    "pp2": ("megatron", {"pp": 2}),
    "pp4 crossing": ("megatron", {"pp": 4}),
    "dp4 sharded": ("megatron", SHARDED),
    "dp4 sharded recompute": ("megatron", SHARDED | {"recompute": "full"}),
    "tp2": ("megatron", {"tp": 2}),
    "tp2 sequence": ("megatron", {"tp": 2, "sequence_parallel": True}),
    "cp2": ("megatron", {"cp": 2}),
    "zero0": ("deepspeed", {"zero_stage": 0}),
    "zero2 recompute": ("deepspeed", {"zero_stage": 2, "recompute": "full"}),
    "zero2 tp2": ("deepspeed", {"zero_stage": 2, "tp": 2}),
    "zero1 tp2 sequence": ("deepspeed", {"zero_stage": 1, "tp": 2, "sequence_parallel": True}),
    "zero3": ("deepspeed", {"zero_stage": 3}),
}
OWN = {"gates": {"gates": True}, "factors": {"low_rank": 3}}
RELAXED = [
    (what, name) for what in OWN for name in LAYOUTS if name != "zero3" and not (what == "factors" and "tp2" in name)
]
REFUSED = [("factors", "tp2", "parallel.tp"), ("factors", "zero3", "zero_stage"), ("gates", "zero3", "zero_stage")]
UNTIED = {
    "dp4 sharded recompute": ("megatron", SHARDED | {"recompute": "full"}),
    "pp2": ("megatron", {"pp": 2}),
    "pp4 crossing": ("megatron", {"pp": 4} | SHARDED),
    "tp2 sequence": ("megatron", {"tp": 2, "sequence_parallel": True}),
    "zero0": ("deepspeed", {"zero_stage": 0}),
    "zero2": ("deepspeed", {"zero_stage": 2}),
    "zero3 recompute": ("deepspeed", {"zero_stage": 3, "recompute": "full"}),
    "zero3 tp2": ("deepspeed", {"zero_stage": 3, "tp": 2}),
}


def crossing(name):
    return {"allow_cross_rank": True} if "crossing" in name else {}


def relaxed(what, name):
    engine, options = LAYOUTS[name]
    return Case(engine, plan="4,4", options=options, sharing=OWN[what] | crossing(name))


REENTRANT = (0, 1, 2, 3)

PULLS = {
    "l2": ("pp2", "tp2 sequence", "dp4 sharded", "cp2"),
    "group_lasso": ("pp2", "dp4 sharded"),
}
UNPULLED = [("l2", {"pp": 4}, "several pipeline ranks"), ("group_lasso", {"tp": 2}, "whole matrices")]


def pulled(kind, options):
    return Case(options=options | {"soft_tie": SoftTie(plan=contiguous((4, 4)), weight=0.05, kind=kind)})


def cases_in(folder):
    cases = {
        "one rank": Case(plan="4,4", save=str(folder / "state")),
        "split": Case(plan="2,2,2,2", restore=str(folder / "state")),
        **{what: Case(plan="4,4", sharing=own) for what, own in OWN.items()},
    }
    cases |= {f"{what}, {name}": relaxed(what, name) for what, name in (*RELAXED, *(r[:2] for r in REFUSED))}
    for name, (engine, options) in UNTIED.items():
        state = str(folder / f"untied-{name}")
        cases[f"untied, {name}"] = Case(
            engine, plan="4,4", options=options, sharing=crossing(name), untie="2,2,2,2", save=state
        )
    for kind, names in PULLS.items():
        cases[kind] = pulled(kind, {})
        cases |= {f"{kind}, {name}": pulled(kind, LAYOUTS[name][1]) for name in names}
    cases |= {f"{kind}, refused": pulled(kind, options) for kind, options, _ in UNPULLED}
    cases["unpulled"] = Case()
    for stage in REENTRANT:
        again = {"zero_stage": stage, "recompute": "full"}
        cases[f"reentrant, {stage}"] = Case("deepspeed", plan="4,4", options=again, reentrant=True)
        cases[f"after, {stage}"] = Case("deepspeed", plan="4,4", options=again)
    return cases


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_world(4, run_cases, cases_in(tmp_path_factory.mktemp("own")), timeout_s=580)[0]


@pytest.mark.parametrize(("what", "name"), RELAXED)
def test_layers_learn_what_is_their_own_on_every_layout(outcomes, what, name):
    assert_alike(rows(outcomes, f"{what}, {name}"), rows(outcomes, what))
    found, wanted = outcomes[f"{what}, {name}"][2], outcomes[what][2]
    assert len(wanted) == {"gates": 16, "factors": 8 * (4 + 7)}[what]
    assert found == pytest.approx(wanted, rel=1e-3)
    assert all(value > 0 for value in wanted.values())


@pytest.mark.parametrize(("what", "name", "word"), REFUSED)
def test_layouts_that_cannot_hold_it_are_refused_with_the_key(outcomes, what, name, word):
    assert isinstance(outcomes[f"{what}, {name}"], str)
    assert word in outcomes[f"{what}, {name}"]


def coarse_name(fine):
    """Of two stages of 2,2,2,2 one of 4,4 was the origin."""
    _, _, stage, inside = fine.split(".", 3)
    return f"sws.stages.{int(stage) // 2}.{inside}"


@pytest.mark.parametrize("name", UNTIED)
def test_a_split_goes_on_as_that_of_one_rank(outcomes, name):
    """Three steps under the coarse plan, the split, three under the finer one: weights and moments came along."""
    before, after = rows(outcomes, f"untied, {name}")[:3], rows(outcomes, f"untied, {name}")[3:]
    assert_alike(before, rows(outcomes, "one rank"))
    assert_alike(after, rows(outcomes, "split"))
    moments = outcomes[f"untied, {name}"][2]
    assert len(moments["before"]) == 2 * 9
    wanted = {fine: moments["before"][coarse_name(fine)] for fine in moments["after"]}
    assert moments["after"] == pytest.approx(wanted, rel=1e-6)
    assert len(moments["after"]) == 4 * 9


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in PULLS.items() for name in names])
def test_a_pull_between_layers_is_the_same_on_every_layout(outcomes, kind, name):
    assert_alike(rows(outcomes, f"{kind}, {name}"), rows(outcomes, kind))
    assert rows(outcomes, kind)[0][1] != pytest.approx(rows(outcomes, "unpulled")[0][1], rel=1e-3)


@pytest.mark.parametrize(("kind", "options", "words"), UNPULLED)
def test_a_pull_that_needs_whole_stages_is_refused_without(outcomes, kind, options, words):
    assert words in outcomes[f"{kind}, refused"]


@pytest.mark.parametrize("stage", REENTRANT)
def test_reentrant_recomputation_is_refused_with_zero(outcomes, stage):
    """The must-fail twin of every recomputing ZeRO stage: DeepSpeed's own assertion would come later, or never."""
    message = outcomes[f"reentrant, {stage}"]
    assert isinstance(message, str), message
    assert "eentrant" in message
    assert "came twice" in message
    assert_alike(rows(outcomes, f"after, {stage}"), rows(outcomes, "one rank"))
