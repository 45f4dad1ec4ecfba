import pytest

from megatron_inherit.arch.presets import preset
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.sharing.stage_plan import contiguous, parse_plan, unshared
from megatron_inherit.sharing.tensors import count_shared, enumerate_stored, family_report, first_user, stored_name


def vit_parameters(depth: int, width: int) -> tuple[int, int]:
    """(one block, all) of the paper's vision models: 196 tokens, 16 x 16 patches, 1000 classes, biases everywhere."""
    block = 12 * width * width + 13 * width
    outside = (16 * 16 * 3 * width + width) + 196 * width + 2 * width + (1000 * width + 1000)
    return block, depth * block + outside


@pytest.mark.parametrize(
    ("width", "stored", "family", "ratio"),
    [(768, 36.951016e6, 759.343e6, 20.55), (384, 9.628648e6, 193.882e6, 20.14)],
)
def test_published_parameter_counts_by_closed_form(width, stored, family, ratio):
    assert vit_parameters(5, width)[1] == stored
    total = sum(vit_parameters(depth, width)[1] for depth in range(6, 16))
    assert total == pytest.approx(family, abs=500)
    assert total / stored == pytest.approx(ratio, abs=0.005)


def test_counts_at_llama_width():
    config = preset("llama-2-7b").with_layers(16)
    counts = count_shared(config, contiguous((3, 3, 4, 3, 3)))
    assert counts.layer == 202_383_360
    assert counts.outside == 262_148_096
    assert counts.unique == 5 * counts.layer + counts.outside
    assert counts.virtual == 16 * counts.layer + counts.outside
    assert counts.ratio == pytest.approx(2.75, abs=0.005)


def test_family_ratios_carry_their_denominators():
    report = family_report(
        preset("llama-2-7b").with_layers(16),
        contiguous((3, 3, 4, 3, 3)),
        tuple(range(6, 16)),
        auxiliary_steps=500,
        tuning_steps=20,
        scratch_steps=500,
    )
    assert report.stored_ratio == pytest.approx(18.74, abs=0.01)
    assert report.step_ratio == pytest.approx(5000 / 700)
    assert "10 x 500 from scratch / (500 auxiliary + 10 x 20 tuning)" in str(report)


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("text", ["2,2", "cycle:2:2", "attn=2,2;mlp=4;norm=unshared:4", "unshared:4"])
def test_every_tensor_of_the_model_reads_one_stored_tensor_of_its_shape(name, text):
    config, plan = preset(name), parse_plan(text)
    stored = {spec.name: spec for spec in enumerate_stored(config, plan)}
    virtual = {spec.name: spec for spec in enumerate_tensors(config)}
    assert {stored_name(key, plan) for key in virtual} == set(stored)
    for key, spec in virtual.items():
        assert stored[stored_name(key, plan)].shape == spec.shape
    for key in stored:
        assert stored_name(first_user(key, plan), plan) == key


def test_components_follow_their_own_plans():
    plan = parse_plan("attn=2,2;mlp=4;norm=unshared:4")
    assert stored_name("layers.3.attn.q.weight", plan) == "sws.stages.1.attn.q.weight"
    assert stored_name("layers.3.attn.q_norm.weight", plan) == "sws.stages.1.attn.q_norm.weight"
    assert stored_name("layers.3.mlp.down.bias", plan) == "sws.stages.0.mlp.down.bias"
    assert stored_name("layers.3.attn_norm.weight", plan) == "sws.stages.3.attn_norm.weight"
    assert stored_name("final_norm.weight", plan) == "final_norm.weight"


def test_an_unshared_plan_stores_the_whole_model():
    config = preset("llama-tiny")
    counts = count_shared(config, unshared(4))
    assert counts.unique == counts.virtual
