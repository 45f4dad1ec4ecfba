"""What the kernels do with strides, second derivatives and frozen inputs: run by test_interpreted.py."""

from __future__ import annotations

import pytest
import torch

from megatron_inherit.kernels import head
from tests.support import triton_interpreter  # noqa: F401  (repairs bfloat16)
from tests.support.kernel_proof import errors, tensor
from tests.unit.kernels.tolerances import check

from megatron_inherit.kernels.activation import kernel as activation  # isort: skip
from megatron_inherit.kernels.activation import reference as activation_truth  # isort: skip
from megatron_inherit.kernels.linear_cross_entropy import kernel as lce  # isort: skip
from megatron_inherit.kernels.linear_cross_entropy import reference as lce_truth  # isort: skip
from megatron_inherit.kernels.norm import kernel as norm  # isort: skip
from megatron_inherit.kernels.norm import reference as norm_truth  # isort: skip
from megatron_inherit.kernels.rope import kernel as rope  # isort: skip


@pytest.mark.parametrize("spaced", [lambda x: x.repeat_interleave(2)[::2], lambda x: x[:1].expand(40)])
def test_weights_and_biases_of_any_stride(spaced):
    weight, bias = (spaced(tensor(40, seed=seed, dtype=torch.float32)) for seed in (3, 4))
    assert not weight.is_contiguous()
    inputs = {"x": tensor(5, 40, seed=1, dtype=torch.float32), "weight": weight, "bias": bias}

    def layer_norm(module):
        return lambda t: module.layer_norm(*t.values(), 1e-5)

    def gelu(module):
        return lambda t: module.gelu_tanh(t["x"], t["bias"])

    check("norm", torch.float32, errors(layer_norm(norm), layer_norm(norm_truth), inputs))
    del inputs["weight"]
    check("activation", torch.float32, errors(gelu(activation), gelu(activation_truth), inputs))


def test_a_gradient_of_a_gradient_is_refused_and_not_taken_for_zero():
    x = torch.ones(3, 1, 2, 8, requires_grad=True)
    weight, table = torch.ones(8), torch.ones(3, 4)
    for output in (
        norm.rms_norm(x, weight, 1e-5),
        activation.swiglu(x),
        activation.gelu_tanh(x),
        rope.rope(x, table, table),
        rope.rope_qkv(x.flatten(2)[..., :12], table[:, :2], table[:, :2], **HEADS)[0],
    ):
        (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (grad.square().sum() + x.sum()).backward()


HEADS = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 4, "pad_to": 4}


@pytest.mark.parametrize("learns", ["hidden", "weight"])
def test_a_frozen_head_or_trunk_costs_no_gradient_of_its_own(learns, monkeypatch):
    inputs = {
        "hidden" if learns == "hidden" else "_hidden": tensor(9, 16, seed=1, dtype=torch.float32),
        "weight" if learns == "weight" else "_weight": tensor(150, 16, seed=2, dtype=torch.float32, scale=0.3),
    }
    made = []
    monkeypatch.setattr(torch, "empty", lambda *a, _empty=torch.empty, **o: made.append(a) or _empty(*a, **o))
    labels = torch.arange(9)
    options = {
        "counted": torch.ones(9, dtype=torch.bool),
        "shard": head.Shard(start=0, valid=150, vocab_size=150, group=None),
        "per_token_grad": False,
        "reduce_hidden_grad": True,
    }
    found = errors(
        lambda t: lce.linear_cross_entropy(*t.values(), labels, z_loss=0.0, **options),
        lambda t: lce_truth.naive(*t.values(), labels, vocab_size=150),
        inputs,
        same_upstream=True,
    )
    check("linear_cross_entropy", torch.float32, found)
    assert ((torch.Size([150, 16]),) in made) == (learns == "weight")
