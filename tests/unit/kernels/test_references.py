"""The references: right by gradcheck in float64, and the chunked heads equal to whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from megatron_inherit.kernels import dispatch, head
from megatron_inherit.kernels.activation import reference as activation
from megatron_inherit.kernels.errors import KernelValueError
from megatron_inherit.kernels.linear_cross_entropy import reference as lce
from megatron_inherit.kernels.linear_kl import reference as kl
from megatron_inherit.kernels.norm import reference as norm
from megatron_inherit.kernels.rope import reference as rope
from tests.support.kernel_proof import errors, tensor

DOUBLE = torch.float64
VOCAB, PADDED, ROWS, WIDTH = 13, 15, 11, 5


def leaf(*shape: int, seed: int) -> torch.Tensor:
    return tensor(*shape, seed=seed, dtype=DOUBLE).requires_grad_()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setitem(head.BUFFER_BYTES, "cpu", 1)
    monkeypatch.setattr(head, "MIN_ROWS", 4)


def test_norms_pass_gradcheck():
    x, residual, weight, bias = leaf(3, 4, seed=1), leaf(3, 4, seed=2), leaf(4, seed=3), leaf(4, seed=4)
    assert gradcheck(lambda *t: norm.add_rms_norm(*t, 1e-5), (x, residual, weight))
    assert gradcheck(lambda *t: norm.add_layer_norm(*t, 1e-5), (x, residual, weight, bias))
    expected = (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()) * weight
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-5), expected)


def test_activations_pass_gradcheck():
    assert gradcheck(activation.swiglu, leaf(3, 6, seed=1))
    assert gradcheck(activation.gelu_tanh, (leaf(3, 4, seed=1), leaf(4, seed=2)))
    packed = leaf(3, 6, seed=5)
    torch.testing.assert_close(
        activation.swiglu(packed), torch.nn.functional.silu(packed[:, :3]) * packed[:, 3:], rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("per_sample", [False, True])
def test_rope_passes_gradcheck(per_sample):
    qkv = leaf(2, 2, 4 * 6, seed=1)
    angles = tensor(2, *([2] if per_sample else []), 2, seed=2, dtype=DOUBLE)
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 6, "pad_to": 8}
    assert gradcheck(lambda x: rope.rope_qkv(x, angles.cos(), angles.sin(), **sizes), qkv)
    assert gradcheck(lambda x: rope.rope(x, angles.cos(), angles.sin()), leaf(2, 2, 1, 6, seed=3))


def test_rope_is_the_rotation_of_hugging_face_on_unpacked_heads():
    length, batch, groups, queries, head_dim = 4, 2, 2, 3, 8
    q = tensor(length, batch, groups * queries, head_dim, seed=1, dtype=DOUBLE)
    k, v = (tensor(length, batch, groups, head_dim, seed=seed, dtype=DOUBLE) for seed in (2, 3))
    packed = torch.cat([q.unflatten(2, (groups, queries)), k.unsqueeze(3), v.unsqueeze(3)], dim=3).flatten(2)
    angles = tensor(length, head_dim // 2, seed=4, dtype=DOUBLE)
    got = rope.rope_qkv(
        packed, angles.cos(), angles.sin(), num_heads=6, num_kv_heads=2, head_dim=head_dim, pad_to=head_dim + 4
    )
    cos, sin = (torch.cat([table, table], -1)[:, None, None] for table in (angles.cos(), angles.sin()))

    def turned(x):
        return x * cos + torch.cat([-x[..., head_dim // 2 :], x[..., : head_dim // 2]], -1) * sin

    for found, expected in zip(got, (turned(q), turned(k), v), strict=True):
        torch.testing.assert_close(found[..., :head_dim], expected)
        assert not found[..., head_dim:].any()


def labels(ignored: str = "some") -> torch.Tensor:
    values = torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(0))
    if ignored != "none":
        values[:: 3 if ignored == "some" else 1] = -100
    return values


def student() -> dict[str, torch.Tensor]:
    return {"hidden": tensor(ROWS, WIDTH, seed=1, dtype=DOUBLE), "weight": tensor(PADDED, WIDTH, seed=2, dtype=DOUBLE)}


def agree(found: dict[str, float]) -> None:
    assert all(error < 1e-12 for error in found.values()), found


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_linear_cross_entropy_equals_whole_logits(ignored, z_loss, per_token):
    targets = labels(ignored)
    agree(
        errors(
            lambda t: dispatch.linear_cross_entropy(
                *t.values(), targets, vocab_size=VOCAB, z_loss=z_loss, per_token_grad=per_token
            ),
            lambda t: lce.naive(*t.values(), targets, vocab_size=VOCAB, z_loss=z_loss),
            student(),
            same_upstream=not per_token,
        )
    )


def test_z_loss_is_off_when_it_is_off():
    inputs = student()
    plain = torch.nn.functional.cross_entropy(inputs["hidden"] @ inputs["weight"][:VOCAB].t(), labels("none"))
    ours = dispatch.linear_cross_entropy(*inputs.values(), labels("none"), vocab_size=VOCAB).mean()
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-14)


def test_masked_rows_give_nothing():
    mask = (torch.arange(ROWS) % 2).to(DOUBLE)
    inputs = {name: value.requires_grad_() for name, value in student().items()}
    losses = dispatch.linear_cross_entropy(*inputs.values(), labels("none"), vocab_size=VOCAB, mask=mask)
    (losses * mask).sum().backward()
    assert not losses[::2].any()
    assert not inputs["hidden"].grad[::2].any()
    assert not inputs["weight"].grad[VOCAB:].any(), "padding rows take no part"


def test_a_gradient_that_differs_from_token_to_token_is_refused():
    inputs = {name: value.requires_grad_() for name, value in student().items()}
    losses = dispatch.linear_cross_entropy(*inputs.values(), labels(), vocab_size=VOCAB)
    with pytest.raises(KernelValueError, match="differs from token to token"):
        (losses * torch.arange(ROWS)).sum().backward()


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (2.5, 0.3), (1.0, 0.0)])
@pytest.mark.parametrize("kind", kl.KINDS)
def test_linear_kl_equals_whole_logits(kind, temperature, alpha):
    targets = labels()
    teacher = {
        "_hidden": tensor(ROWS, 7, seed=3, dtype=DOUBLE),
        "_weight": tensor(PADDED + 2, 7, seed=4, dtype=DOUBLE),
    }

    def truth(t):
        soft = kl.naive(*t.values(), vocab_size=VOCAB, temperature=temperature, kind=kind)
        hard = lce.naive(t["hidden"], t["weight"], targets, vocab_size=VOCAB)
        return torch.where(targets >= 0, alpha * soft + (1 - alpha) * hard, 0.0)

    agree(
        errors(
            lambda t: dispatch.linear_kl(
                *t.values(), labels=targets, temperature=temperature, kind=kind, alpha=alpha, vocab_size=VOCAB
            ),
            truth,
            student() | teacher,
            same_upstream=True,
        )
    )


@pytest.mark.parametrize("k", [1, 4, VOCAB])
def test_linear_topk_kl_equals_whole_logits(k):
    logits = tensor(ROWS, VOCAB, seed=5, dtype=DOUBLE, scale=2.0)
    values, ids = logits.log_softmax(-1).topk(k)
    ghost = torch.log1p(-values.exp().sum(-1)) if k < VOCAB else torch.full((ROWS,), -torch.inf, dtype=DOUBLE)
    found = errors(
        lambda t: dispatch.linear_topk_kl(*t.values(), ids, values, ghost, temperature=2.0, vocab_size=VOCAB),
        lambda t: kl.naive_topk(*t.values(), ids, values, ghost, temperature=2.0, vocab_size=VOCAB),
        student(),
        same_upstream=True,
    )
    agree(found)


def test_a_ghost_never_raises_a_divergence_and_k_of_all_is_the_whole():
    inputs = list(student().values())
    teacher_hidden, teacher_weight = tensor(ROWS, 7, seed=3, dtype=DOUBLE), tensor(VOCAB, 7, seed=4, dtype=DOUBLE)
    whole = dispatch.linear_kl(*inputs, teacher_hidden, teacher_weight, vocab_size=VOCAB)
    log_p = (teacher_hidden @ teacher_weight.t()).log_softmax(-1)
    for k in (3, VOCAB):
        values, ids = log_p.topk(k)
        ghost = torch.log1p(-values.exp().sum(-1)) if k < VOCAB else torch.full((ROWS,), -torch.inf, dtype=DOUBLE)
        part = dispatch.linear_topk_kl(*inputs, ids, values, ghost, vocab_size=VOCAB)
        assert (part <= whole + 1e-12).all()
    torch.testing.assert_close(part, whole)


def test_a_model_equal_to_its_teacher_has_no_divergence_and_no_gradient():
    hidden, weight = (value.requires_grad_() for value in student().values())
    for kind in kl.KINDS:
        losses = dispatch.linear_kl(hidden, weight, hidden, weight, kind=kind, temperature=3.0)
        grads = torch.autograd.grad(losses.sum(), (hidden, weight))
        assert losses.abs().max() < 1e-12
        assert max(grad.abs().max() for grad in grads) < 1e-12


def test_weight_gradients_of_chunks_add_up_in_float32():
    hidden = tensor(4096, 8, seed=1, dtype=torch.bfloat16)
    weight = tensor(16, 8, seed=2, dtype=torch.bfloat16).requires_grad_()
    targets = torch.zeros(4096, dtype=torch.int64)
    (ours,) = torch.autograd.grad(dispatch.linear_cross_entropy(hidden, weight, targets).mean(), weight)
    exact = weight.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(lce.naive(hidden.double(), exact, targets, vocab_size=16).mean(), exact)
    assert (ours.double() - truth).abs().max() < 4e-3 * truth.abs().max()


def test_no_tensor_of_all_logits_is_made():
    rows, vocab = 64, 512
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else [out]:
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.untyped_storage().nbytes())
            return out

    with Watch():
        dispatch.linear_cross_entropy(hidden, weight, torch.zeros(rows, dtype=torch.int64)).sum().backward()
    assert largest <= vocab * 8 * 4, "the gradient of the weight is the largest tensor, not the logits"


def test_evaluation_makes_no_gradient(monkeypatch):
    monkeypatch.setattr(head, "_gradients", None)
    with torch.no_grad():
        losses = dispatch.linear_cross_entropy(*(v.requires_grad_() for v in student().values()), labels("none"))
    assert losses.shape == (ROWS,)
