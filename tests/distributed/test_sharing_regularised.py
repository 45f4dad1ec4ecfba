"""Pulls between layers and kept zeros at every ZeRO stage, on two ranks, against one process of the other engine."""

import pytest

from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.inherit.inheritune import plan_fresh, plan_inheritance
from megatron_inherit.plan.execute import execute
from megatron_inherit.sharing.expand import compressed
from megatron_inherit.sharing.regularise import SoftTie
from megatron_inherit.sharing.stage_plan import contiguous
from tests.support.engine_world import MODELS, run_world
from tests.support.sharing_engines import Case, assert_alike, rows, run_cases

pytestmark = pytest.mark.slow

LAYOUTS = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2 recompute": {"zero_stage": 2, "recompute": "full"},
    "zero2 offload": {"zero_stage": 2, "offload": "optimizer"},
    "zero3": {"zero_stage": 3},
    "zero3 offload": {"zero_stage": 3, "offload": "all"},
    "zero1 tp2 sequence": {"zero_stage": 1, "tp": 2, "sequence_parallel": True},
    "zero3 tp2": {"zero_stage": 3, "tp": 2},
}
BF16 = {"zero2 bf16": {"zero_stage": 2, "dtype": "bf16"}, "zero3 bf16": {"zero_stage": 3, "dtype": "bf16"}}
TIES = {
    "l2": SoftTie(plan=contiguous((4, 4)), weight=0.05),
    "fading": SoftTie(plan=contiguous((4, 4)), weight=0.2, fade_steps=2),
    "group_lasso": SoftTie(plan=contiguous((3, 5)), weight=0.05, kind="group_lasso"),
}
EDITS = {name: {"soft_tie": tie} for name, tie in TIES.items()} | {
    "zeros": {"keep_zeros": True},
    "both": {"soft_tie": TIES["l2"], "keep_zeros": True},
}
CASES = [
    (what, name)
    for what in EDITS
    for name in LAYOUTS
    if (what != "group_lasso" or "tp2" not in name) and (what in ("l2", "zeros") or name in ("zero1", "zero3"))
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regularised")
    execute(plan_fresh(MODELS["llama"], seed=3, std=0.1), folder / "whole")
    with open_source(folder / "whole") as source:
        pruned = compressed(plan_inheritance(source, layers=range(8)), "2:4")
        execute(pruned, folder / "pruned", source=source)
    start = str(folder / "pruned")
    cases = {
        f"{what}, {name}": Case("deepspeed", options=LAYOUTS[name] | EDITS[what], source=start) for what, name in CASES
    }
    cases |= {
        f"both, {name}": Case("deepspeed", options=options | EDITS["both"], source=start)
        for name, options in BF16.items()
    }
    plain = {what: Case(options=edit, source=start) for what, edit in EDITS.items()} | {"none": Case(source=start)}
    return run_world(2, run_cases, cases, timeout_s=400)[0] | run_world(1, run_cases, plain)[0]


@pytest.mark.parametrize(("what", "name"), CASES)
def test_zero_trains_as_one_process_does(outcomes, what, name):
    assert_alike(rows(outcomes, f"{what}, {name}"), rows(outcomes, what))


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_changes_the_gradient(outcomes, what):
    assert rows(outcomes, what)[0][1] != pytest.approx(rows(outcomes, "none")[0][1], rel=1e-3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_half_of_the_weights_stay_zero(outcomes, name):
    matrices = [spec for spec in enumerate_tensors(MODELS["llama"]) if spec.layer is not None and len(spec.shape) == 2]
    half = sum(spec.numel for spec in matrices) / 2
    assert outcomes[f"zeros, {name}"][2]["zeros"] * LAYOUTS[name].get("tp", 1) == half


@pytest.mark.parametrize("name", BF16)
def test_bf16_keeps_zeros_and_stays_near_fp32(outcomes, name):
    for (loss, norm), (wanted_loss, wanted_norm) in zip(
        rows(outcomes, f"both, {name}"), rows(outcomes, "both"), strict=True
    ):
        assert loss == pytest.approx(wanted_loss, abs=3e-2)
        assert norm == pytest.approx(wanted_norm, rel=3e-2)
    assert outcomes[f"both, {name}"][2]["zeros"] == outcomes["both"][2]["zeros"]
