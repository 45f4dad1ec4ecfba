"""Stages on pipeline ranks against the same model on one rank, with each safeguard removed once."""

import pytest

from megatron_inherit.sharing.partition import partition
from megatron_inherit.sharing.stage_plan import contiguous, parse_plan
from megatron_inherit.sharing.tensors import count_shared
from tests.support.sharing_world import Case, outcomes_of, tiny

CASES = {
    "one rank, 2 stages": Case("2,2"),
    "one rank, unshared": Case("unshared:4", steps=1),
    "a": Case("2,2", pp=2),
    "a, distributed optimizer, overlap": Case("2,2", pp=2, distributed_optimizer=True, overlap=True),
    "a, recompute, overlap": Case("2,2", pp=2, overlap=True, recompute="full", distributed_optimizer=True),
    "b, recompute, overlap": Case("4", pp=2, overlap=True, recompute="full", distributed_optimizer=True),
    "c, recompute, overlap": Case("each:8:2", pp=4, vpp=2, overlap=True, recompute="selective"),
    "one rank, uneven": Case("1,3"),
    "a, uneven": Case("1,3", pp=2),
    "one rank, hierarchical": Case("attn=2,2;mlp=4;norm=unshared:4"),
    "b, hierarchical": Case("attn=2,2;mlp=4;norm=unshared:4", pp=2, distributed_optimizer=True),
    "one rank, 1 stage": Case("4"),
    "b": Case("4", pp=2, twin="wrong start"),
    "b, distributed optimizer, overlap": Case("4", pp=2, distributed_optimizer=True, overlap=True),
    "b, four ranks": Case("4", pp=4),
    "b, no broadcast": Case("4", pp=2, twin="no broadcast"),
    "b, no reduce": Case("4", pp=2, twin="no reduce"),
    "b, no mark": Case("4", pp=2, twin="no mark"),
    "b, no bucket": Case("4", pp=2, twin="no bucket", distributed_optimizer=True),
    "one rank, bf16": Case("4", dtype="bf16"),
    "b, bf16": Case("4", pp=2, dtype="bf16", distributed_optimizer=True),
    "one rank, 8 stages": Case("each:8:2"),
    "c": Case("each:8:2", pp=4, vpp=2),
    "c, distributed optimizer": Case("each:8:2", pp=4, vpp=2, distributed_optimizer=True),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return outcomes_of(4, tmp_path_factory.mktemp("sharing"), CASES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("a", "one rank, 2 stages"),
        ("a, distributed optimizer, overlap", "one rank, 2 stages"),
        ("a, recompute, overlap", "one rank, 2 stages"),
        ("b, recompute, overlap", "one rank, 1 stage"),
        ("c, recompute, overlap", "one rank, 8 stages"),
        ("a, uneven", "one rank, uneven"),
        ("b, hierarchical", "one rank, hierarchical"),
        ("b", "one rank, 1 stage"),
        ("b, distributed optimizer, overlap", "one rank, 1 stage"),
        ("b, four ranks", "one rank, 1 stage"),
        ("c", "one rank, 8 stages"),
        ("c, distributed optimizer", "one rank, 8 stages"),
    ],
)
def test_pipelined_stages_train_as_one_rank_does(outcomes, name, reference):
    got, expected = outcomes[name], outcomes[reference]
    assert got.losses == pytest.approx(expected.losses, abs=2e-6)
    assert got.norms == pytest.approx(expected.norms, abs=1e-5)
    assert got.drift == 0.0
    assert got.guard == ""


@pytest.mark.slow
def test_bf16_copies_stay_equal_and_near_one_rank(outcomes):
    got, expected = outcomes["b, bf16"], outcomes["one rank, bf16"]
    assert got.losses == pytest.approx(expected.losses, abs=3e-2)
    assert got.norms == pytest.approx(expected.norms, rel=3e-2)
    assert got.drift == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("twin", ["b, no broadcast", "b, no reduce", "b, no bucket"])
def test_the_guard_stops_copies_that_drift(outcomes, twin):
    assert outcomes[twin].drift > 1e-3
    assert "differ at step 3" in outcomes[twin].guard


@pytest.mark.slow
def test_a_missing_mark_shows_in_the_norm(outcomes):
    wrong, right = outcomes["b, no mark"].norms[0], outcomes["one rank, 1 stage"].norms[0]
    assert wrong > 1.1 * right


@pytest.mark.slow
def test_a_gradient_comes_in_as_many_parts_as_uses_are_recomputed(outcomes):
    """Ranks 0 have two layers of their stage, and the embedding, which nothing recomputes."""
    for name, attention, mlp in (
        ("a, distributed optimizer, overlap", 1, 1),
        ("a, recompute, overlap", 2, 2),
        ("b, recompute, overlap", 2, 2),
        ("c, recompute, overlap", 1, 2),
    ):
        hooks = outcomes[name].hooks
        assert hooks["embedding.word_embeddings.weight"] == 1
        assert hooks["decoder.layers.0.self_attention.linear_qkv.weight"] == attention, name
        assert hooks["decoder.layers.0.mlp.linear_fc1.weight"] == mlp, name


@pytest.mark.slow
def test_gradient_traffic_of_replicas_falls_by_the_repeats(outcomes):
    """Bytes handed to the replicas' all-reduces in a step: fp32, of stored parameters, each once."""
    counts = count_shared(tiny(4), contiguous((2, 2)))
    for name, stored in (("unshared", 4), ("2 stages", 2), ("1 stage", 1)):
        assert outcomes[f"one rank, {name}"].replica_bytes == 4 * (counts.outside + stored * counts.layer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b", "b, distributed optimizer, overlap", "b, bf16", "b, four ranks"])
def test_tie_traffic_is_the_planned(outcomes, name):
    """A ring all-reduce over r ranks sends 2 (r - 1) / r of what it is handed."""
    ranks = CASES[name].pp
    split = partition(parse_plan("4"), ranks, allow_cross_rank=True)
    assert 2 * (ranks - 1) * outcomes[name].tie_bytes // ranks == max(split.tie_bytes(tiny(4)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a", "a, uneven", "c"])
def test_aligned_stages_send_nothing_more(outcomes, name):
    assert outcomes[name].tie_bytes == 0
