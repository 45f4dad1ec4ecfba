"""A stored state continues bit for bit on its own layout, to 1e-6 on any other and on the other engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.engine_acts import Act, Outcome, play
from tests.support.engine_world import run_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LAYOUTS = {
    "tp2": ("megatron", {"tp": 2}),
    "pp2": ("megatron", {"pp": 2}),
    "distributed-optimizer-bf16": ("megatron", {"distributed_optimizer": True, "dtype": "bf16"}),
    "zero1-bf16": ("deepspeed", {"zero_stage": 1, "dtype": "bf16"}),
    "zero2": ("deepspeed", {"zero_stage": 2}),
    "zero3": ("deepspeed", {"zero_stage": 3}),
}
CROSSED = [("pp2", "tp2"), ("tp2", "zero3"), ("zero3", "pp2"), ("zero2", "tp2")]
POISONED = {
    "dp2": ("megatron", {}),
    "zero0": ("deepspeed", {"zero_stage": 0}),
    "zero1": ("deepspeed", {"zero_stage": 1}),
    "zero3": ("deepspeed", {"zero_stage": 3}),
    "zero1-bf16": ("deepspeed", {"zero_stage": 1, "dtype": "bf16"}),
    "zero2-bf16": ("deepspeed", {"zero_stage": 2, "dtype": "bf16"}),
}
Outcomes = dict[tuple[str, str], list[Outcome]]


def _run(world: int, acts: dict[tuple[str, str], Act]) -> Outcomes:
    ranks = run_world(world, play, list(acts.values()), timeout_s=1000)
    return {key: [rank[index] for rank in ranks] for index, key in enumerate(acts)}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Outcomes:
    """(what, layout) -> outcome of each rank, from two worlds of two processes and one between them."""
    root: Path = tmp_path_factory.mktemp("parts")
    acts = {}
    for name, case in LAYOUTS.items():
        acts["whole", name] = Act(*case, steps=7 if name == "pp2" else 4)
        acts["first", name] = Act(*case, steps=2, save=str(root / name))
        acts["resumed", name] = Act(*case, first=2, steps=2, load=str(root / name))
    for source, target in CROSSED:
        acts["crossed", f"{source}-{target}"] = Act(*LAYOUTS[target], first=2, steps=2, load=str(root / source))
    for name, case in POISONED.items():
        acts["poisoned", name] = Act(*case, steps=3, poison=1)
    found = _run(2, acts)
    one = Act("megatron", {}, first=2, steps=2, load=str(root / "pp2"), save=str(root / "one"))
    found |= _run(1, {("alone", "pp2"): one})
    back = Act(*LAYOUTS["pp2"], first=4, steps=3, load=str(root / "one"))
    return found | _run(2, {("back", "pp2"): back})


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_layout_is_bitwise(outcomes, name):
    for whole, resumed in zip(outcomes["whole", name], outcomes["resumed", name], strict=True):
        assert resumed.losses == whole.losses[2:4]
        assert resumed.norms == whole.norms[2:4]
        if name != "pp2":  # its uninterrupted run goes on to step 7
            assert resumed.hashes == whole.hashes
            assert resumed.sums == whole.sums


@pytest.mark.parametrize(("source", "target"), CROSSED)
def test_another_layout_or_engine_goes_on(outcomes, source, target):
    for whole, resumed in zip(outcomes["whole", source], outcomes["crossed", f"{source}-{target}"], strict=True):
        assert resumed.updates == 4
        assert resumed.losses == pytest.approx(whole.losses[2:4], abs=1e-6)
        assert resumed.norms == pytest.approx(whole.norms[2:4], abs=1e-5)


def test_two_one_two_processes(outcomes):
    whole = outcomes["whole", "pp2"][0].losses
    assert outcomes["alone", "pp2"][0].losses == pytest.approx(whole[2:4], abs=1e-6)
    assert outcomes["back", "pp2"][0].losses == pytest.approx(whole[4:7], abs=1e-6)


@pytest.mark.parametrize("name", POISONED)
def test_one_bad_gradient_skips_the_step_on_all_ranks(outcomes, name):
    ranks = outcomes["poisoned", name]
    for outcome in ranks:
        assert outcome.skipped == [False, True, False]
        assert outcome.updates == 2
    assert len(set(ranks[0].hashes)) == 1
