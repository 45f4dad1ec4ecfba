"""A model trained with interpreted kernels, and Liger behind our functions: run by test_interpreted.py."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_proof import errors, tensor
from tests.unit.kernels.interpreted import (
    activation,
    activation_truth,
    head_options,
    labels_of,
    lce,
    lce_truth,
    norm,
    norm_truth,
    rope,
    rope_truth,
)
from tests.unit.kernels.tolerances import check


def test_liger_behind_our_functions():
    pytest.importorskip("liger_kernel")
    from megatron_inherit.kernels import rivals

    liger = rivals.load("liger")
    packed = {"packed": tensor(3, 32, seed=1, dtype=torch.float32)}
    check(
        "activation",
        torch.float32,
        errors(lambda t: liger.swiglu(t["packed"]), lambda t: activation_truth.swiglu(t["packed"]), packed),
    )
    labels = labels_of(6, 70, "some")
    found = errors(
        lambda t: liger.linear_cross_entropy(
            *t.values(), labels, z_loss=0.0, **head_options(labels >= 0, 70, False)
        ).sum(),
        lambda t: lce_truth.naive(*t.values(), labels, vocab_size=70).sum(),
        {"hidden": tensor(6, 16, seed=2, dtype=torch.float32), "weight": tensor(70, 16, seed=3, dtype=torch.float32)},
    )
    check("linear_cross_entropy", torch.float32, found)


def block(module_norm, module_rope, module_activation, weights: dict[str, torch.Tensor], x: torch.Tensor, tables):
    """One pre-norm block: the operations of a Llama layer, [s, b, 16]."""
    y, x = module_norm.add_rms_norm(x, torch.zeros_like(x), weights["norm"], 1e-5)
    qkv = y @ weights["qkv"].t()
    q, k, v = module_rope.rope_qkv(qkv, *tables, num_heads=2, num_kv_heads=1, head_dim=8, pad_to=12)
    q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=8**-0.5, enable_gqa=True)
    out = out[..., :8].permute(2, 0, 1, 3).flatten(2)
    y, x = module_norm.add_rms_norm(out @ weights["o"].t(), x, weights["mlp_norm"], 1e-5)
    return x + module_activation.swiglu(y @ weights["up"].t()) @ weights["down"].t()


def train(modules, module_head, steps: int) -> list[float]:
    length, batch, width, vocab = 4, 1, 16, 40
    shapes = {
        "qkv": (32, 16), "o": (16, 16), "up": (48, 16), "down": (16, 24), "embed": (vocab, width),
        "head": (vocab, width),
    }  # fmt: skip
    weights = {
        name: tensor(*shape, seed=index, dtype=torch.float32, scale=0.2)
        for index, (name, shape) in enumerate(shapes.items())
    }
    weights |= {name: torch.ones(width) for name in ("norm", "mlp_norm")}
    optimizer = torch.optim.AdamW([weight.requires_grad_() for weight in weights.values()], lr=1e-2)
    angles = torch.outer(torch.arange(length), torch.tensor([1.0, 0.3, 0.1, 0.03]))
    tokens = torch.randint(0, vocab, (4, length + 1, batch), generator=torch.Generator().manual_seed(0))
    counted = torch.ones(length * batch, dtype=torch.bool)
    losses = []
    for step in range(steps):
        inputs, labels = tokens[step % 4][:-1], tokens[step % 4][1:].flatten()
        x = block(*modules, weights, weights["embed"][inputs], (angles.cos(), angles.sin()))
        options = head_options(counted, vocab, False)
        loss = module_head.linear_cross_entropy(x.flatten(0, 1), weights["head"], labels, z_loss=1e-4, **options).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_fifty_steps_of_training_have_the_losses_of_the_references():
    ours = train((norm, rope, activation), lce, 50)
    truth = train((norm_truth, rope_truth, activation_truth), lce_truth, 50)
    assert truth[-1] < truth[0] / 2
    torch.testing.assert_close(ours, truth, rtol=2e-4, atol=2e-4)
