"""Every kernel under Triton's interpreter against float64: run by test_interpreted.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_inherit.kernels import head, launch
from tests.support import triton_interpreter  # noqa: F401  (repairs bfloat16)
from tests.support.kernel_proof import errors, spread, tensor, transposed
from tests.support.vocabulary_shards import compare
from tests.unit.kernels.tolerances import check

from megatron_inherit.kernels.activation import kernel as activation  # isort: skip
from megatron_inherit.kernels.activation import reference as activation_truth  # isort: skip
from megatron_inherit.kernels.linear_cross_entropy import kernel as lce  # isort: skip
from megatron_inherit.kernels.linear_cross_entropy import reference as lce_truth  # isort: skip
from megatron_inherit.kernels.linear_kl import kernel as kl  # isort: skip
from megatron_inherit.kernels.linear_kl import reference as kl_truth  # isort: skip
from megatron_inherit.kernels.norm import kernel as norm  # isort: skip
from megatron_inherit.kernels.norm import long_rows  # isort: skip
from megatron_inherit.kernels.norm import reference as norm_truth  # isort: skip
from megatron_inherit.kernels.rope import kernel as rope  # isort: skip
from megatron_inherit.kernels.rope import reference as rope_truth  # isort: skip

DTYPES = [torch.float32, torch.bfloat16]
SETTINGS = settings(
    max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fills new tensors with NaN, cuts heads into chunks of 4 rows, logits into blocks of 64, sums into two parts."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.isnan(torch.empty(3)).all()
    monkeypatch.setitem(head.BUFFER_BYTES, "cpu", 1)
    monkeypatch.setattr(head, "MIN_ROWS", 4)
    monkeypatch.setattr(launch, "resident_programs", lambda device, num_warps: 2)
    monkeypatch.setattr(lce, "BLOCK", 64)
    monkeypatch.setattr(kl, "BLOCK", 64)
    yield
    torch.use_deterministic_algorithms(False)


def norm_inputs(rows: int, width: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "x": tensor(rows, width, seed=1, dtype=dtype, scale=2.0, shift=0.5),
        "residual": tensor(rows, width, seed=2, dtype=dtype),
        "weight": tensor(width, seed=3, dtype=dtype, shift=1.0),
        "bias": tensor(width, seed=4, dtype=dtype),
    }


def check_norms(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    def only(*names: str) -> dict[str, torch.Tensor]:
        return {name: inputs[name] for name in names}

    for module_names, names, run in (
        ("norm", ("x", "weight"), lambda m, t: m.rms_norm(t["x"], t["weight"], 1e-5)),
        ("norm", ("x", "weight", "bias"), lambda m, t: m.layer_norm(t["x"], t["weight"], t["bias"], 1e-5)),
        (
            "add_norm",
            ("x", "residual", "weight"),
            lambda m, t: m.add_rms_norm(t["x"], t["residual"], t["weight"], 1e-5),
        ),
        (
            "add_norm",
            ("x", "residual", "weight", "bias"),
            lambda m, t: m.add_layer_norm(t["x"], t["residual"], t["weight"], t["bias"], 1e-5),
        ),
    ):
        found = errors(lambda t, run=run: run(norm, t), lambda t, run=run: run(norm_truth, t), only(*names))
        check(module_names, dtype, found)


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 100), (33, 24), (3, 2500)])
def test_norms(rows, width, dtype):
    check_norms(norm_inputs(rows, width, dtype), dtype)


@dtypes
def test_norms_of_strided_rows(dtype):
    inputs = norm_inputs(6, 40, dtype)
    inputs["x"], inputs["residual"] = spread(inputs["x"]), transposed(inputs["residual"])
    check_norms(inputs, dtype)


@SETTINGS
@given(rows=st.integers(0, 9), width=st.integers(1, 300), dtype=st.sampled_from(DTYPES))
def test_norms_of_drawn_shapes(rows, width, dtype):
    check_norms(norm_inputs(rows, width, dtype), dtype)


@pytest.fixture
def short_blocks(monkeypatch):
    """Lets every row of more than 16 elements be walked along in blocks of 16."""
    monkeypatch.setattr(launch, "MAX_WIDTH", 16)
    monkeypatch.setattr(long_rows, "BLOCK", 16)
    monkeypatch.setattr(long_rows, "SUM_BLOCK", 16)


@SETTINGS
@given(rows=st.integers(0, 9), width=st.integers(1, 100), dtype=st.sampled_from(DTYPES))
def test_norms_of_rows_longer_than_a_block(short_blocks, rows, width, dtype):
    check_norms(norm_inputs(rows, width, dtype), dtype)


@dtypes
def test_norms_of_long_strided_rows(short_blocks, dtype):
    inputs = norm_inputs(6, 40, dtype)
    inputs["x"], inputs["residual"] = spread(inputs["x"]), transposed(inputs["residual"])
    check_norms(inputs, dtype)


@pytest.mark.parametrize("width", [8193, 12288, 20000])
def test_norms_of_rows_that_exceed_the_true_block(width):
    check_norms(norm_inputs(3, width, torch.float32), torch.float32)


def test_long_rows_are_normalised_the_same_way_bit_for_bit_twice(short_blocks):
    x, residual = (tensor(40, 90, seed=s, dtype=torch.bfloat16).requires_grad_() for s in (1, 2))
    weight, bias = (tensor(90, seed=s, dtype=torch.bfloat16).requires_grad_() for s in (3, 4))

    def run():
        y, summed = norm.add_layer_norm(x, residual, weight, bias, 1e-5)
        return torch.autograd.grad((y.float() * summed.float()).sum(), (x, residual, weight, bias))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_norm_without_bias_and_with_a_wide_weight():
    inputs = {"x": tensor(4, 30, seed=1, dtype=torch.bfloat16), "weight": tensor(30, seed=3, dtype=torch.float32)}
    for module_run in (
        lambda m, t: m.layer_norm(t["x"], t["weight"], None, 1e-5),
        lambda m, t: m.rms_norm(t["x"], t["weight"], 1e-5),
    ):
        found = errors(
            lambda t, run=module_run: run(norm, t), lambda t, run=module_run: run(norm_truth, t), dict(inputs)
        )
        check("norm", torch.bfloat16, found)


def test_only_the_sum_of_an_added_norm_is_used():
    x, residual = (tensor(3, 20, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
    weight = torch.ones(20, requires_grad=True)
    norm.add_rms_norm(x, residual, weight, 1e-5)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 20))
    assert torch.equal(weight.grad, torch.zeros(20))


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 33), (2, 1100)])
def test_activations(rows, width, dtype):
    check_activations(rows, width, dtype)


@SETTINGS
@given(rows=st.integers(0, 6), width=st.integers(1, 200), dtype=st.sampled_from(DTYPES))
def test_activations_of_drawn_shapes(rows, width, dtype):
    check_activations(rows, width, dtype)


def check_activations(rows: int, width: int, dtype: torch.dtype) -> None:
    packed = {"packed": spread(tensor(rows, 2 * width, seed=5, dtype=dtype, scale=2.0))}
    check(
        "activation",
        dtype,
        errors(lambda t: activation.swiglu(t["packed"]), lambda t: activation_truth.swiglu(t["packed"]), packed),
    )
    inputs = {
        "x": tensor(rows, width, seed=6, dtype=dtype, scale=2.0),
        "bias": tensor(width, seed=7, dtype=dtype),
    }
    for names in (("x",), ("x", "bias")):
        found = errors(
            lambda t: activation.gelu_tanh(t["x"], t.get("bias")),
            lambda t: activation_truth.gelu_tanh(t["x"], t.get("bias")),
            {name: inputs[name] for name in names},
        )
        check("activation", dtype, found)


def check_rope(length, batch, groups, queries, head_dim, rotary_dim, pad_to, dtype, *, per_sample=False) -> None:
    heads = groups * (queries + 2)
    angles = tensor(length, *([batch] if per_sample else []), rotary_dim // 2, seed=8, dtype=torch.float32)
    inputs = {
        "qkv": spread(tensor(length, batch, heads * head_dim, seed=9, dtype=dtype)),
        "_cos": angles.cos() * 1.3,
        "_sin": angles.sin() * 1.3,
    }
    sizes = {"num_heads": groups * queries, "num_kv_heads": groups, "head_dim": head_dim, "pad_to": pad_to}

    def run(module):
        return lambda t: module.rope_qkv(t["qkv"], t["_cos"], t["_sin"], **sizes)

    check("rope", dtype, errors(run(rope), run(rope_truth), inputs))
    alone = {"x": tensor(length, batch, heads, head_dim, seed=10, dtype=dtype)} | {
        name: inputs[name] for name in ("_cos", "_sin")
    }
    alone["x"] = transposed(alone["x"])
    found = errors(
        lambda t: rope.rope(t["x"], t["_cos"], t["_sin"]),
        lambda t: rope_truth.rope(t["x"], t["_cos"], t["_sin"]),
        alone,
    )
    check("rope", dtype, found)


@dtypes
@pytest.mark.parametrize(
    ("groups", "queries", "head_dim", "rotary_dim", "pad_to"),
    [(1, 1, 2, 2, 2), (2, 2, 100, 100, 128), (3, 1, 16, 8, 16), (2, 4, 10, 6, 12)],
)
def test_rope(groups, queries, head_dim, rotary_dim, pad_to, dtype):
    check_rope(3, 2, groups, queries, head_dim, rotary_dim, pad_to, dtype)


def test_rope_with_positions_of_each_sample():
    check_rope(3, 2, 2, 2, 8, 8, 8, torch.float32, per_sample=True)


@SETTINGS
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_rope_of_drawn_shapes(data, dtype):
    head_dim = data.draw(st.integers(2, 70))
    rotary_dim = 2 * data.draw(st.integers(1, head_dim // 2))
    sizes = [data.draw(st.integers(low, high)) for low, high in ((0, 3), (1, 2), (1, 3), (1, 3))]
    check_rope(*sizes, head_dim, rotary_dim, head_dim + data.draw(st.integers(0, 9)), dtype)


def test_rope_of_gradients_as_attention_gives_them():
    qkv = tensor(3, 2, 2 * 3 * 8, seed=1, dtype=torch.float32).requires_grad_()
    angles = tensor(3, 4, seed=2, dtype=torch.float32)
    results = []
    for module in (rope, rope_truth):
        sizes = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "pad_to": 8}
        q, k, v = (x.permute(1, 2, 0, 3) for x in module.rope_qkv(qkv, angles.cos(), angles.sin(), **sizes))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        results.append(torch.autograd.grad(out.square().sum(), qkv)[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def whole(vocab_size: int, group=None) -> head.Shard:
    return head.Shard(start=0, valid=vocab_size, vocab_size=vocab_size, group=group)


def head_options(counted: torch.Tensor, vocab_size: int, per_token: bool) -> dict:
    return {
        "counted": counted,
        "shard": whole(vocab_size),
        "per_token_grad": per_token,
        "reduce_hidden_grad": True,
    }


def labels_of(rows: int, vocab_size: int, ignored: str) -> torch.Tensor:
    labels = torch.randint(0, vocab_size, (rows,), generator=torch.Generator().manual_seed(rows))
    if ignored == "all":
        labels[:] = -1
    elif ignored == "some":
        labels[::3] = -1
    return labels


def check_cross_entropy(rows, width, vocab_size, extra, dtype, *, ignored="some", z_loss=0.0, per_token=False) -> None:
    labels = labels_of(rows, vocab_size, ignored)
    inputs = {
        "hidden": spread(tensor(rows, width, seed=11, dtype=dtype)),
        "weight": tensor(vocab_size + extra, width, seed=12, dtype=dtype, scale=0.3),
    }
    options = head_options(labels >= 0, vocab_size, per_token)
    found = errors(
        lambda t: lce.linear_cross_entropy(t["hidden"], t["weight"], labels, z_loss=z_loss, **options),
        lambda t: lce_truth.naive(t["hidden"], t["weight"], labels, vocab_size=vocab_size, z_loss=z_loss),
        inputs,
        same_upstream=not per_token,
    )
    check("linear_cross_entropy", dtype, found)


@dtypes
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_linear_cross_entropy(ignored, per_token, dtype):
    check_cross_entropy(9, 16, 150, 10, dtype, ignored=ignored, per_token=per_token)


def test_linear_cross_entropy_with_z_loss():
    check_cross_entropy(6, 16, 70, 0, torch.float32, z_loss=1e-2)


@SETTINGS
@given(
    rows=st.integers(0, 9), width=st.integers(1, 20), vocab=st.integers(1, 200), extra=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES), ignored=st.sampled_from(["none", "some", "all"]),
)  # fmt: skip
def test_linear_cross_entropy_of_drawn_shapes(rows, width, vocab, extra, dtype, ignored):
    check_cross_entropy(rows, width, vocab, extra, dtype, ignored=ignored)


def check_kl(rows, vocab_size, dtype, *, kind, temperature, alpha, per_token=False) -> None:
    labels = labels_of(rows, vocab_size, "some")
    inputs = {
        "hidden": spread(tensor(rows, 12, seed=13, dtype=dtype)),
        "weight": tensor(vocab_size + 3, 12, seed=14, dtype=dtype, scale=0.4),
        "_teacher_hidden": spread(tensor(rows, 20, seed=15, dtype=dtype)),
        "_teacher_weight": tensor(vocab_size + 3, 20, seed=16, dtype=dtype, scale=0.4),
    }
    options = head_options(labels >= 0, vocab_size, per_token)

    def run(t):
        return kl.linear_kl(
            *t.values(),
            labels=labels if alpha < 1 else None,
            temperature=temperature,
            kind=kind,
            alpha=alpha,
            **options,
        )

    def truth(t):
        soft = kl_truth.naive(*t.values(), vocab_size=vocab_size, temperature=temperature, kind=kind)
        hard = lce_truth.naive(t["hidden"], t["weight"], labels, vocab_size=vocab_size)
        return torch.where(labels >= 0, alpha * soft + (1 - alpha) * hard, 0.0)

    check("linear_kl", dtype, errors(run, truth, inputs, same_upstream=not per_token))


@dtypes
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (2.5, 0.3)])
@pytest.mark.parametrize("kind", kl_truth.KINDS)
def test_linear_kl(kind, temperature, alpha, dtype):
    check_kl(7, 130, dtype, kind=kind, temperature=temperature, alpha=alpha, per_token=alpha < 1)


@SETTINGS
@given(
    rows=st.integers(0, 7), vocab=st.integers(2, 150), kind=st.sampled_from(kl_truth.KINDS),
    temperature=st.sampled_from([0.7, 1.0, 4.0]), alpha=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_linear_kl_of_drawn_shapes(rows, vocab, kind, temperature, alpha, dtype):
    check_kl(rows, vocab, dtype, kind=kind, temperature=temperature, alpha=alpha)


@pytest.mark.parametrize(("kind", "alpha"), [("forward", 1.0), ("jsd", 0.5)])
def test_linear_kl_of_no_rows(kind, alpha):
    check_kl(0, 20, torch.float32, kind=kind, temperature=1.0, alpha=alpha)


@dtypes
@pytest.mark.parametrize(("rows", "vocab_size", "k"), [(6, 130, 5), (6, 9, 9), (0, 20, 3)])
def test_linear_topk_kl(rows, vocab_size, k, dtype):
    temperature = 2.0
    teacher = (tensor(rows, vocab_size, seed=17, dtype=torch.float64, scale=2.0) / temperature).log_softmax(-1)
    values, ids = teacher.topk(k)
    ghost = torch.log1p(-values.exp().sum(-1)) if k < vocab_size else torch.full((rows,), -torch.inf)
    inputs = {
        "hidden": spread(tensor(rows, 12, seed=18, dtype=dtype)),
        "weight": tensor(vocab_size + 2, 12, seed=19, dtype=dtype, scale=0.4),
    }
    options = head_options(torch.arange(rows) != 2, vocab_size, False)

    def run(t):
        return kl.linear_topk_kl(
            t["hidden"], t["weight"], ids, values.float(), ghost.float(), temperature=temperature, **options
        )

    def truth(t):
        losses = kl_truth.naive_topk(
            t["hidden"], t["weight"], ids, values, ghost.double(), vocab_size=vocab_size, temperature=temperature
        )
        return torch.where(options["counted"], losses, 0.0)

    check("linear_kl", dtype, errors(run, truth, inputs, same_upstream=True))


def test_two_runs_agree_bit_for_bit():
    x, residual = (tensor(40, 64, seed=s, dtype=torch.bfloat16).requires_grad_() for s in (1, 2))
    weight = tensor(64, seed=3, dtype=torch.bfloat16).requires_grad_()

    def run():
        y, summed = norm.add_rms_norm(x, residual, weight, 1e-5)
        return torch.autograd.grad((y.float() * summed.float()).sum(), (x, residual, weight))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_two_shards_of_the_vocabulary_equal_the_whole(tmp_path):
    torch.set_num_threads(1)
    assert compare(lce, kl, [(130, 160), (70, 160)], tmp_path) < 1e-5
