"""The Triton kernels inside the model, on both engines, under tensor and sequence parallelism and ZeRO-3."""

from __future__ import annotations

import pytest

from tests.support.engine_acts import Act, Outcome, play
from tests.support.engine_world import run_world
from tests.support.plain_loop import golden

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]
ACTS = {
    "tp2-sp": Act("megatron", {"tp": 2, "sequence_parallel": True}, steps=2),
    "tp2-sp-gpt2": Act("megatron", {"tp": 2, "sequence_parallel": True}, model="gpt2", steps=2),
    "zero3": Act("deepspeed", {"zero_stage": 3}, steps=2),
}


def play_with_kernels(acts: list[Act]) -> list[Outcome]:
    """Plays acts and makes sure that no operation fell back to its reference."""
    from megatron_inherit.kernels import choice

    outcomes = play(acts)
    assert choice.chosen("cpu") == "triton"
    assert choice._fall_back.cache_info().currsize == 0
    return outcomes


@pytest.fixture(scope="module")
def outcomes():
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # Triton reads it when a kernel is defined: new processes only
        patch.setenv("MINHERIT_KERNELS", "triton")
        ranks = run_world(2, play_with_kernels, list(ACTS.values()), timeout_s=800)
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(ACTS)}


@pytest.mark.parametrize("name", ACTS)
def test_kernels_train_as_the_plain_loop_does(outcomes, name):
    for outcome in outcomes[name]:
        for at, (loss, norm) in enumerate(golden(ACTS[name].model)[:2]):
            assert outcome.losses[at] == pytest.approx(loss, abs=1e-5), f"step {at}"
            assert outcome.norms[at] == pytest.approx(norm, abs=1e-4), f"step {at}"
