"""The kernels on the device they are for: real widths, both dtypes, values and all gradients against float64."""

from __future__ import annotations

import pytest
import torch

from megatron_inherit.kernels import dispatch, head
from megatron_inherit.kernels.activation import reference as activation_truth
from megatron_inherit.kernels.linear_cross_entropy import reference as lce_truth
from megatron_inherit.kernels.linear_kl import reference as kl_truth
from megatron_inherit.kernels.norm import reference as norm_truth
from megatron_inherit.kernels.rope import reference as rope_truth
from tests.support.kernel_proof import errors, spread, tensor
from tests.unit.kernels.tolerances import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _exact_products():
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = kept


def draw(*shape: int, seed: int, dtype: torch.dtype, **options) -> torch.Tensor:
    return tensor(*shape, seed=seed, dtype=dtype, device="cuda", **options)


def test_triton_runs(monkeypatch):
    monkeypatch.delenv("MINHERIT_KERNELS", raising=False)
    from megatron_inherit.kernels import choice

    assert choice.implementation("norm", "rms_norm", torch.ones(1, device="cuda"), width=8).__name__.endswith("kernel")


@dtypes
@pytest.mark.parametrize(
    ("rows", "width"),
    [(1, 3200), (777, 3200), (300, 4096), (65, 8192), (65, 8193), (33, 16384), (4099, 128), (9, 1001)],
)
def test_norms(rows, width, dtype):
    inputs = {
        "x": spread(draw(rows, width, seed=1, dtype=dtype)),
        "residual": draw(rows, width, seed=2, dtype=dtype),
        "weight": draw(width, seed=3, dtype=dtype, shift=1.0),
    }
    found = errors(
        lambda t: dispatch.add_rms_norm(t["x"], t["residual"], t["weight"], 1e-5),
        lambda t: norm_truth.add_rms_norm(t["x"], t["residual"], t["weight"], 1e-5),
        inputs,
    )
    check("add_norm", dtype, found)
    inputs["bias"] = draw(width, seed=4, dtype=dtype)
    found = errors(
        lambda t: dispatch.add_layer_norm(*t.values(), 1e-5),
        lambda t: norm_truth.add_layer_norm(*t.values(), 1e-5),
        inputs,
    )
    check("add_norm", dtype, found)


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(513, 8640), (3, 1001)])
def test_activations(rows, width, dtype):
    packed = {"packed": draw(rows, 2 * width, seed=1, dtype=dtype)}
    check(
        "activation",
        dtype,
        errors(lambda t: dispatch.swiglu(*t.values()), lambda t: activation_truth.swiglu(*t.values()), packed),
    )
    inputs = {"x": draw(rows, width, seed=2, dtype=dtype), "bias": draw(width, seed=3, dtype=dtype)}
    check(
        "activation",
        dtype,
        errors(lambda t: dispatch.gelu_tanh(*t.values()), lambda t: activation_truth.gelu_tanh(*t.values()), inputs),
    )


@dtypes
@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "pad"), [(32, 32, 100, 128), (32, 8, 128, 128), (25, 25, 64, 64)]
)
def test_rope(heads, groups, head_dim, pad, dtype):
    angles = draw(65, head_dim // 2, seed=1, dtype=torch.float32)
    inputs = {
        "qkv": draw(65, 2, (heads + 2 * groups) * head_dim, seed=2, dtype=dtype),
        "_cos": angles.cos(),
        "_sin": angles.sin(),
    }
    sizes = {"num_heads": heads, "num_kv_heads": groups, "head_dim": head_dim, "pad_to": pad}
    found = errors(
        lambda t: dispatch.rope_qkv(*t.values(), **sizes), lambda t: rope_truth.rope_qkv(*t.values(), **sizes), inputs
    )
    check("rope", dtype, found)


@dtypes
@pytest.mark.parametrize("vocab", [32000, 50257])
@pytest.mark.parametrize("per_token", [False, True])
def test_linear_cross_entropy(vocab, per_token, dtype, monkeypatch):
    monkeypatch.setattr(head, "MAX_ROWS", 128)
    labels = torch.randint(0, vocab, (300,), generator=torch.Generator().manual_seed(0)).cuda()
    labels[::5] = -100
    inputs = {
        "hidden": draw(300, 512, seed=1, dtype=dtype),
        "weight": draw(vocab + 47, 512, seed=2, dtype=dtype, scale=0.05),
    }
    found = errors(
        lambda t: dispatch.linear_cross_entropy(*t.values(), labels, vocab_size=vocab, per_token_grad=per_token),
        lambda t: lce_truth.naive(*t.values(), labels, vocab_size=vocab),
        inputs,
        same_upstream=not per_token,
    )
    check("linear_cross_entropy", dtype, found)


@dtypes
@pytest.mark.parametrize("kind", kl_truth.KINDS)
def test_linear_kl(kind, dtype):
    inputs = {
        "hidden": draw(200, 256, seed=1, dtype=dtype),
        "weight": draw(32000, 256, seed=2, dtype=dtype, scale=0.1),
        "_teacher_hidden": draw(200, 384, seed=3, dtype=dtype),
        "_teacher_weight": draw(32000, 384, seed=4, dtype=dtype, scale=0.1),
    }
    found = errors(
        lambda t: dispatch.linear_kl(*t.values(), kind=kind, temperature=2.0),
        lambda t: kl_truth.naive(*t.values(), vocab_size=32000, kind=kind, temperature=2.0),
        inputs,
        same_upstream=True,
    )
    check("linear_kl", dtype, found)


def test_two_runs_agree_bit_for_bit():
    x, residual = (draw(4096, 3200, seed=s, dtype=torch.bfloat16).requires_grad_() for s in (1, 2))
    weight = draw(3200, seed=3, dtype=torch.bfloat16).requires_grad_()

    def run():
        y, summed = dispatch.add_rms_norm(x, residual, weight, 1e-5)
        return torch.autograd.grad((y.float() + summed.float()).square().sum(), (x, residual, weight))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_gradient_that_differs_from_token_to_token_becomes_nan():
    hidden = draw(8, 64, seed=1, dtype=torch.bfloat16).requires_grad_()
    losses = dispatch.linear_cross_entropy(
        hidden, draw(128, 64, seed=2, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int64, device="cuda")
    )
    (losses * torch.arange(8, device="cuda")).sum().backward()
    assert torch.isnan(hidden.grad).all()


def test_a_label_outside_the_vocabulary_gives_nan():
    labels = torch.tensor([3, 128, -1, -100], device="cuda")
    losses = dispatch.linear_cross_entropy(
        draw(4, 64, seed=1, dtype=torch.bfloat16), draw(128, 64, seed=2, dtype=torch.bfloat16), labels
    )
    assert torch.isnan(losses).tolist() == [False, True, True, False]


def test_ignored_labels_under_torch_compile():
    hidden, weight = draw(64, 128, seed=1, dtype=torch.bfloat16), draw(1000, 128, seed=2, dtype=torch.bfloat16)
    labels = torch.arange(64, device="cuda")
    labels[::2] = -100
    plain = dispatch.linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(torch.compile(dispatch.linear_cross_entropy)(hidden, weight, labels), plain)


@pytest.mark.parametrize("vocab", [32000, 128256])
def test_peak_memory_is_at_most_55_percent_of_the_unfused(vocab):
    hidden = draw(8192, 1024, seed=1, dtype=torch.bfloat16).requires_grad_()
    weight = draw(vocab, 1024, seed=2, dtype=torch.bfloat16, scale=0.05).requires_grad_()
    labels = torch.randint(0, vocab, (8192,), device="cuda")

    def unfused():
        return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels)

    def fused():
        return dispatch.linear_cross_entropy(hidden, weight, labels).mean()

    peaks = []
    for run in (fused, unfused):
        torch.autograd.grad(run(), (hidden, weight))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(run(), (hidden, weight))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] <= 0.55 * peaks[1], peaks


def test_ids_outside_the_vocabulary_give_nan_where_they_count():
    hidden, weight = draw(3, 64, seed=1, dtype=torch.float32), draw(40, 64, seed=2, dtype=torch.float32)
    ids = torch.tensor([[0, 1], [-1, 41], [2, 40]], device="cuda")
    values, ghost = torch.full((3, 2), -1.0, device="cuda"), torch.full((3,), -1.0, device="cuda")
    losses = dispatch.linear_topk_kl(hidden, weight, ids, values, ghost, mask=torch.tensor([1, 0, 1], device="cuda"))
    assert losses.isnan().tolist() == [False, False, True]
