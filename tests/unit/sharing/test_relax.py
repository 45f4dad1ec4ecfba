"""What layers have of their own: nothing at the start of a learngene, the difference from the stage otherwise."""

import dataclasses

import pytest
import torch

from megatron_inherit.arch.presets import preset
from megatron_inherit.model.build import build_single
from megatron_inherit.model.load import load_chunk, random_reader
from megatron_inherit.sharing.options import Sharing
from megatron_inherit.sharing.regularise import matrices
from megatron_inherit.sharing.relax import own_reader, share_model
from megatron_inherit.sharing.stage_plan import contiguous
from megatron_inherit.sharing.tensors import by_first_layer, stored_name

pytestmark = pytest.mark.slow

PLAN = contiguous((4, 4))


def model_of(name, sharing, start):
    config = preset(name).with_layers(8)
    model = build_single(config)
    read = start
    if sharing is not None:
        share_model([model], sharing)
        read = own_reader(by_first_layer(start, sharing.plan), start, config, sharing, seed=1)
    load_chunk(model, read)
    return model


def logits(model):
    ids = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids)


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
def test_factors_take_up_the_difference_rank_by_rank(name):
    """At full rank the shared model is the unshared one; at rank 0 it is plain sharing, bit for bit."""
    config = preset(name).with_layers(8)
    start = random_reader(config, 3)
    whole, plain = logits(model_of(name, None, start)), logits(model_of(name, Sharing(plan=PLAN), start))
    errors = []
    for rank in (1, 8, 32, 64):
        model = model_of(name, Sharing(plan=PLAN, low_rank=rank), start)
        worst = 0.0
        for layer in model.decoder.layers:
            linear = layer.mlp.linear_fc2
            merged = linear.weight + linear.low_rank_up @ layer.mlp.linear_fc2_down
            other = whole_weights(name, start)[layer.layer_number - 1]
            worst = max(worst, float((merged - other).norm()))
        errors.append(worst)
    assert errors == sorted(errors, reverse=True)
    assert float((plain - whole).abs().max()) > 0.1
    assert float((logits(model) - whole).abs().max()) <= 1e-5
    assert torch.equal(logits(model_of(name, Sharing(plan=PLAN, low_rank=0), start)), plain)


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
def test_what_layers_have_of_their_own_is_counted(name):
    start = random_reader(preset(name).with_layers(8), 3)
    for sharing in (Sharing(plan=PLAN, low_rank=3), Sharing(plan=PLAN, gates=True), Sharing(plan=PLAN)):
        model = model_of(name, sharing, start)
        assert sharing.parameters(model.model) == sum(parameter.numel() for parameter in model.parameters())


def whole_weights(name, start):
    model = model_of(name, None, start)
    return [layer.mlp.linear_fc2.weight.detach() for layer in model.decoder.layers]


def test_a_learngene_is_unchanged_at_the_start():
    config = preset("llama-tiny").with_layers(8)
    drawn = by_first_layer(random_reader(config, 3), PLAN)

    def start(spec, box):
        return drawn(dataclasses.replace(spec, name=stored_name(spec.name, PLAN)), box)

    plain = logits(model_of("llama-tiny", Sharing(plan=PLAN), start))
    relaxed = model_of("llama-tiny", Sharing(plan=PLAN, low_rank=4, gates=True), start)
    assert torch.equal(logits(relaxed), plain)
    ids = torch.randint(0, 512, (2, 13), generator=torch.Generator().manual_seed(2))
    relaxed(ids[:, :-1], labels=ids[:, 1:]).backward()
    for layer in relaxed.decoder.layers:
        assert float(layer.self_attention.gate.grad.abs()) > 0
        assert float(layer.mlp.linear_fc1.low_rank_up.grad.abs().max()) > 0


def test_a_mask_is_of_the_stages_matrices_and_not_of_the_factors():
    """Factors start at zero, and a mask taken of them would keep them there."""
    start = random_reader(preset("llama-tiny").with_layers(8), 3)
    models = [model_of("llama-tiny", Sharing(plan=PLAN, low_rank=rank, gates=rank > 0), start) for rank in (0, 2)]
    plain, relaxed = ([one.shape for one in matrices(model)] for model in models)
    assert relaxed == plain
    assert len(plain) == 2 * 4
