import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_inherit.arch.presets import preset
from megatron_inherit.base.errors import ConfigError
from megatron_inherit.sharing.stage_plan import (
    StagePlan,
    albert,
    contiguous,
    cycle,
    parse_plan,
    renumber,
    require_cover,
    sandwich,
    unshared,
)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("3,3,4,3,3", (0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 4)),
        ("stages:2,1", (0, 0, 1)),
        ("ids:0,0,1,0", (0, 0, 1, 0)),
        ("ids:5,5,2", (0, 0, 1)),
        ("cycle:2:3", (0, 1, 0, 1, 0, 1)),
        ("each:3:2", (0, 0, 1, 1, 2, 2)),
        ("sandwich:5", (0, 1, 1, 1, 2)),
        ("albert:12:5", (0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4)),
        ("unshared:3", (0, 1, 2)),
    ],
)
def test_presets_give_their_ids(text, ids):
    assert parse_plan(text) == StagePlan(ids, ids, ids)


def test_albert_grouping_is_the_published_formula():
    for layers in range(1, 25):
        for groups in range(1, layers + 1):
            assert albert(layers, groups).attn == tuple(int(i / layers * groups + 1e-9) for i in range(layers))


def test_hierarchical_plan_has_a_list_a_component():
    plan = parse_plan("attn=2,2;mlp=4;norm=unshared:4")
    assert (plan.attn, plan.mlp, plan.norm) == ((0, 0, 1, 1), (0, 0, 0, 0), (0, 1, 2, 3))
    assert not plan.uniform
    assert [plan.num_physical(c) for c in ("attn", "mlp", "norm")] == [2, 1, 4]
    assert parse_plan("attn=2,2;norm=unshared:4").mlp == (0, 0, 1, 1)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_text_and_json_give_the_plan_back(ids):
    for plan in (StagePlan.same(ids), StagePlan(renumber(ids), (0,) * len(ids), tuple(range(len(ids))))):
        assert parse_plan(str(plan)) == plan
        assert StagePlan.from_json(plan.to_json()) == plan


def test_drawing_has_a_column_a_layer():
    assert contiguous((2, 1)).draw().splitlines() == [" depth   0  1  2", " stage   0  0  1"]
    assert len(parse_plan("attn=2;mlp=1,1").draw().splitlines()) == 4
    assert contiguous((2, 1)).draw(rank=(0, 0, 1)).endswith("\n  rank   0  0  1")


def test_a_deep_drawing_is_broken_into_blocks():
    blocks = contiguous((40, 30)).draw().split("\n\n")
    assert [block.splitlines()[0].split()[1] for block in blocks] == ["0", "32", "64"]
    assert blocks[2].splitlines() == [" depth  64 65 66 67 68 69", " stage   1  1  1  1  1  1"]


def test_refinement_is_a_split_of_stages():
    assert contiguous((2, 2)).refines(contiguous((4,)))
    assert not contiguous((4,)).refines(contiguous((2, 2)))
    assert not contiguous((3, 1)).refines(contiguous((2, 2)))
    assert unshared(4).refines(cycle(2, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StagePlan((0, 0), (0,), (0, 0)), "same layers"),
        (lambda: StagePlan((1, 0), (0, 0), (0, 0)), "numbered by first use"),
        (lambda: StagePlan((), (), ()), "no layer"),
        (lambda: parse_plan("3,x"), "not a stage plan"),
        (lambda: parse_plan("spiral:3"), "no stage plan of the form"),
        (lambda: parse_plan("mlp=3"), "not a stage plan"),
        (lambda: contiguous((3, 0)), "at least once"),
        (lambda: sandwich(2), "three layers"),
        (lambda: albert(4, 5), "between 1 and the layers"),
        (lambda: require_cover(contiguous((2, 2)), preset("llama-tiny").with_layers(5)), "does not cover"),
        (lambda: StagePlan.from_json({"attn": [0]}), "incomplete"),
    ],
)
def test_wrong_plans_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_layers_that_differ_inside_a_stage_are_refused():
    import dataclasses

    config = dataclasses.replace(preset("gpt2-tiny"), attn_scale_by_layer=True)
    with pytest.raises(ConfigError, match="not the same function"):
        require_cover(contiguous((2, 2)), config)
    require_cover(unshared(4), config)
