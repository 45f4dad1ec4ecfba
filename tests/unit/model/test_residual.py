"""Blocks without residual connections: what they compute, and that no format takes them."""

import dataclasses

import pytest
import torch

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.inherit.inheritune import plan_fresh
from megatron_inherit.model.build import build_single
from megatron_inherit.plan.execute import plan_sink
from megatron_inherit.plan.plan import Layout
from tests.support.checkpoints import gpt2, llama


@pytest.mark.parametrize("config", [llama(), gpt2()], ids=["llama", "gpt2"])
def test_a_block_hands_on_what_it_computes_and_nothing_else(config):
    model = build_single(dataclasses.replace(config, residual=False)).eval()
    torch.manual_seed(0)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.1)
    block, hidden = model.decoder.layers[0], torch.randn(6, 2, config.hidden_size)
    tables = model._tables(6, None, None, hidden.device)
    with torch.no_grad():
        attended = block.self_attention(block.input_layernorm(hidden), None, tables)
        expected = block.mlp(block.pre_mlp_layernorm(attended))
        torch.testing.assert_close(block(hidden, None, tables)[0], expected, atol=0, rtol=0)


def test_the_description_of_an_ordinary_model_does_not_change():
    assert "residual" not in llama().to_json()
    odd = dataclasses.replace(llama(), residual=False)
    assert ModelConfig.from_json(odd.to_json()) == odd


@pytest.mark.parametrize("format", ["hf", "megatron", "torch_dist", "ds_universal", "meta"])
def test_no_format_takes_it(format):
    plan = plan_fresh(dataclasses.replace(llama(), residual=False), layout=Layout(format=format))
    with pytest.raises(CheckpointError, match="without residual connections"):
        plan_sink(plan)
