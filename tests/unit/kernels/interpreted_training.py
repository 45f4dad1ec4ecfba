"""A model trained with interpreted kernels, and Liger behind our functions: run by test_interpreted.py."""

from __future__ import annotations

import importlib

import pytest
import torch
import triton.language as tl

from megatron_inherit.kernels import rivals
from tests.support.kernel_proof import errors, tensor
from tests.unit.kernels.interpreted import (
    activation,
    activation_truth,
    head_options,
    kl_truth,
    labels_of,
    lce,
    lce_truth,
    norm,
    norm_inputs,
    norm_truth,
    rope,
    rope_truth,
)
from tests.unit.kernels.tolerances import check


def rsqrt(x):
    """Stands for the one of CUDA's own library, which the interpreter lacks."""
    return tl.rsqrt(x)


@pytest.fixture
def liger():
    pytest.importorskip("liger_kernel")
    return rivals.load("liger")


@pytest.mark.parametrize("names", [("x", "weight"), ("x", "weight", "bias"), ("x", "residual", "weight")], ids=str)
def test_ligers_norms_behind_our_functions(liger, monkeypatch, names):
    for module in ("rms_norm", "layer_norm", "fused_add_rms_norm"):
        monkeypatch.setattr(importlib.import_module(f"liger_kernel.ops.{module}"), "rsqrt", rsqrt)
    name = {2: "rms_norm", 3: "layer_norm" if "bias" in names else "add_rms_norm"}[len(names)]
    inputs = norm_inputs(5, 32, torch.float32)

    def run(module):
        return lambda t: getattr(module, name)(*t.values(), 1e-5)

    check("norm", torch.float32, errors(run(liger), run(norm_truth), {key: inputs[key] for key in names}))


def test_ligers_activation_behind_our_function(liger):
    packed = {"packed": tensor(3, 32, seed=1, dtype=torch.float32)}
    found = errors(lambda t: liger.swiglu(t["packed"]), lambda t: activation_truth.swiglu(t["packed"]), packed)
    check("activation", torch.float32, found)


@pytest.mark.parametrize(("length", "groups", "rotated"), [(3, 2, 8), (3, 2, 4), (1, 1, 8)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_ligers_rope_behind_our_function(liger, length, groups, rotated, per_sample):
    angles = tensor(length, *([1] if per_sample else []), rotated // 2, seed=2, dtype=torch.float32)
    inputs = {
        "qkv": tensor(length, 1, groups * 4 * 8, seed=1, dtype=torch.float32),
        "_cos": angles.cos(),
        "_sin": angles.sin(),
    }
    sizes = {"num_heads": 2 * groups, "num_kv_heads": groups, "head_dim": 8, "pad_to": 12}
    found = errors(
        lambda t: liger.rope_qkv(*t.values(), **sizes), lambda t: rope_truth.rope_qkv(*t.values(), **sizes), inputs
    )
    check("rope", torch.float32, found)


def test_ligers_head_behind_our_function(liger):
    labels = labels_of(6, 70, "some")
    found = errors(
        lambda t: liger.linear_cross_entropy(
            *t.values(), labels, z_loss=0.0, **head_options(labels >= 0, 70, False)
        ).sum(),
        lambda t: lce_truth.naive(*t.values(), labels, vocab_size=70).sum(),
        {"hidden": tensor(6, 16, seed=2, dtype=torch.float32), "weight": tensor(70, 16, seed=3, dtype=torch.float32)},
    )
    check("linear_cross_entropy", torch.float32, found)


@pytest.mark.parametrize("kind", kl_truth.KINDS)
def test_ligers_divergence_behind_our_function(liger, kind):
    counted = torch.arange(6) % 3 != 0
    heads = {
        "hidden": tensor(6, 16, seed=2, dtype=torch.float32),
        "weight": tensor(70, 16, seed=3, dtype=torch.float32, scale=0.3),
        "_teacher_hidden": tensor(6, 12, seed=4, dtype=torch.float32),
        "_teacher_weight": tensor(72, 12, seed=5, dtype=torch.float32, scale=0.3),
    }
    options = head_options(counted, 68, False) | {"labels": None, "alpha": 1.0}

    def run(t):
        return liger.linear_kl(*t.values(), kind=kind, temperature=2.0, **options).sum()

    def truth(t):
        losses = kl_truth.naive(*t.values(), vocab_size=68, kind=kind, temperature=2.0)
        return torch.where(counted, losses, 0.0).sum()

    check("linear_kl", torch.float32, errors(run, truth, heads))


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
