"""Which implementation runs, what is said about it, and what bad input is told."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch

from megatron_inherit.kernels import checks, choice, dispatch
from megatron_inherit.kernels.errors import KernelTypeError, KernelValueError
from megatron_inherit.kernels.head import Shard


@pytest.fixture
def ask(monkeypatch):
    """Starts anew, as a process does that was given this value."""

    def set_to(value: str | None) -> None:
        if value is None:
            monkeypatch.delenv(choice.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(choice.VARIABLE, value)
        for cached in (choice.requested, choice.chosen, choice._fall_back, choice._triton_missing):
            cached.cache_clear()

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield set_to
    monkeypatch.undo()
    set_to(None)


def test_auto_on_a_cpu_is_the_reference_and_says_so_once(ask, caplog):
    ask(None)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            dispatch.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)
    assert [record.message for record in caplog.records] == ["kernels on cpu: reference (MINHERIT_KERNELS=auto)"]


def test_auto_on_cuda_is_triton(ask):
    pytest.importorskip("triton")
    ask("auto")
    assert choice.chosen("cuda") == "triton"


def test_a_gpu_without_triton_is_a_warning_unless_it_was_asked_for(ask, caplog, monkeypatch):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    for want, level in (("auto", logging.WARNING), ("reference", logging.INFO)):
        ask(want)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert choice.chosen("cuda") == "reference"
        assert [record.levelno for record in caplog.records] == [level]


def test_triton_on_a_cpu_falls_back_with_one_line(ask, caplog):
    ask("triton")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            y = dispatch.swiglu(torch.ones(2, 4))
    assert y.shape == (2, 2)
    assert len(caplog.records) == 1
    assert "swiglu runs its reference, not triton" in caplog.records[0].message


@pytest.mark.parametrize("rival", ["liger", "quack"])
def test_a_rival_that_cannot_run_falls_back_with_one_line(ask, caplog, rival):
    ask(rival)
    with caplog.at_level(logging.WARNING):
        dispatch.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)
        dispatch.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)
    assert len(caplog.records) == 1
    assert f"rms_norm runs its reference, not {rival}" in caplog.records[0].message


def test_an_unknown_choice_is_refused(ask):
    ask("cuda")
    with pytest.raises(KernelValueError, match=r"MINHERIT_KERNELS.*Got: cuda.*auto \| reference"):
        dispatch.swiglu(torch.ones(2, 4))


def test_triton_refuses_what_its_blocks_do_not_hold(ask, monkeypatch):
    launch = pytest.importorskip("megatron_inherit.kernels.launch")
    ask("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.ones(1, 4)
    assert "exceed" in choice._triton_refuses(x, launch.MAX_WIDTH + 1)
    assert "float64" in choice._triton_refuses(x.double(), 4)
    assert choice._triton_refuses(x, 4) == ""
    wide = torch.ones(2, 1, 1, launch.MAX_WIDTH + 2)
    with pytest.raises(KernelValueError, match=rf"heads of 'packed'.*{launch.MAX_WIDTH + 2}.*{launch.MAX_WIDTH}"):
        importlib.import_module("megatron_inherit.kernels.rope.kernel").rope(wide, torch.ones(2, 1), torch.ones(2, 1))


X, W = torch.ones(3, 4), torch.ones(4)
HIDDEN, HEAD, LABELS = torch.ones(3, 4), torch.ones(6, 4), torch.zeros(3, dtype=torch.int64)
COS = torch.ones(3, 2)


class Group:
    """Two processes, of which this is one; every check comes before the first word to the other."""

    def __init__(self, rank: int):
        self.rank, self.size = lambda: rank, lambda: 2


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dispatch.rms_norm(X.int(), W, 1e-5), KernelTypeError, "'x' is not a float"),
        (lambda: dispatch.rms_norm(X, W.half(), 1e-5), KernelTypeError, "'weight' and 'x' differ in dtype"),
        (lambda: dispatch.rms_norm(X, W[:3], 1e-5), KernelValueError, r"'weight' has the wrong shape.*\(3,\).*\(4,\)"),
        (lambda: dispatch.rms_norm(X, W.to("meta"), 1e-5), KernelValueError, "'weight' and 'x' are on different"),
        (lambda: dispatch.layer_norm(X, W, W[:2], 1e-5), KernelValueError, "'bias' has the wrong shape"),
        (lambda: dispatch.add_rms_norm(X, X[:2], W, 1e-5), KernelValueError, "'residual' has the wrong shape"),
        (lambda: dispatch.swiglu(torch.ones(2, 3)), KernelValueError, "gate and up of equal width"),
        (lambda: dispatch.gelu_tanh(X, W[:3]), KernelValueError, "'bias' has the wrong shape"),
        (lambda: dispatch.rope(torch.ones(3, 1, 2, 2), COS, COS), KernelValueError, "another number of dimensions"),
        (lambda: dispatch.rope(torch.ones(4, 1, 2, 4), COS, COS), KernelValueError, "'cos' has the wrong shape"),
        (
            lambda: dispatch.rope_qkv(torch.ones(3, 1, 15), COS, COS, num_heads=2, num_kv_heads=1, head_dim=4),
            KernelValueError,
            "'qkv' has the wrong shape",
        ),
        (
            lambda: dispatch.rope_qkv(
                torch.ones(3, 1, 16), COS, COS, num_heads=2, num_kv_heads=1, head_dim=4, rotary_dim=2
            ),
            KernelValueError,
            "another number of dimensions",
        ),
        (
            lambda: dispatch.rope_qkv(
                torch.ones(3, 1, 16), COS, COS, num_heads=2, num_kv_heads=1, head_dim=4, pad_to=3
            ),
            KernelValueError,
            "'pad_to' is narrower",
        ),
        (lambda: dispatch.linear_cross_entropy(HIDDEN, HEAD.half(), LABELS), KernelTypeError, "'weight' and 'hidden'"),
        (
            lambda: dispatch.linear_cross_entropy(HIDDEN, HEAD[:, :3], LABELS),
            KernelValueError,
            "'weight' has the wrong",
        ),
        (lambda: dispatch.linear_cross_entropy(HIDDEN, HEAD, LABELS[:2]), KernelValueError, "'labels' has the wrong"),
        (lambda: dispatch.linear_cross_entropy(HIDDEN, HEAD, LABELS.float()), KernelTypeError, "'labels' are no token"),
        (
            lambda: dispatch.linear_cross_entropy(HIDDEN, HEAD, LABELS + 6),
            KernelValueError,
            "'labels' holds ids outside",
        ),
        (lambda: dispatch.linear_cross_entropy(HIDDEN, HEAD, LABELS, vocab_size=9), KernelValueError, "fewer rows"),
        (lambda: dispatch.linear_cross_entropy(HIDDEN, HEAD, LABELS, vocab_start=3), KernelValueError, "'tp_group'"),
        (lambda: dispatch.linear_kl(HIDDEN, HEAD, HIDDEN, HEAD, vocab_sise=6), TypeError, "argument 'vocab_sise'"),
        (
            lambda: dispatch.linear_cross_entropy(HIDDEN, HEAD, LABELS, mask=torch.ones(2)),
            KernelValueError,
            "'mask' has the wrong shape",
        ),
        (
            lambda: dispatch.linear_cross_entropy(HIDDEN, HEAD.to("meta"), LABELS),
            KernelValueError,
            "'weight' and 'hidden' are on different devices.*weight on meta.*cpu",
        ),
        (
            lambda: dispatch.linear_cross_entropy(HIDDEN, HEAD, LABELS, tp_group=Group(0), vocab_size=20),
            KernelValueError,
            "'weight' is not this rank's shard.*6 rows from 0 on rank 0 of 2.*at least 20 rows",
        ),
        (
            lambda: dispatch.linear_cross_entropy(HIDDEN, HEAD, LABELS, tp_group=Group(1), vocab_size=12),
            KernelValueError,
            "'weight' is not this rank's shard.*from 0 on rank 1 of 2",
        ),
        (
            lambda: dispatch.linear_cross_entropy(HIDDEN, HEAD, LABELS, tp_group=Group(0)),
            KernelValueError,
            "needs 'vocab_size'",
        ),
        (
            lambda: dispatch.linear_topk_kl(HIDDEN, HEAD, LABELS[:, None] + 6, X[:, :1], X[:, 0]),
            KernelValueError,
            "'topk_ids' holds ids outside the vocabulary.*6 to 6.*0 to 5",
        ),
        (
            lambda: dispatch.linear_topk_kl(HIDDEN, HEAD, LABELS[:, None], X[:, :1], X[:2, 0]),
            KernelValueError,
            "'ghost_logprob' has the wrong shape",
        ),
        (
            lambda: dispatch.linear_kl(HIDDEN, HEAD, X[:2], HEAD),
            KernelValueError,
            "'teacher_hidden' has the wrong shape",
        ),
        (lambda: dispatch.gelu_tanh(X, W.double()), KernelTypeError, "'bias' and 'x' differ in dtype"),
        (lambda: dispatch.swiglu(X.long()), KernelTypeError, "'packed' is not a float tensor"),
        (lambda: dispatch.rope(torch.ones(3, 1, 2, 4), COS, COS.half()), KernelTypeError, "'sin' and 'cos' differ"),
        (
            lambda: dispatch.rope_qkv(torch.ones(3, 1, 20), COS, COS, num_heads=3, num_kv_heads=2, head_dim=4),
            KernelValueError,
            "do not divide into the key/value heads.*3 and 2",
        ),
        (lambda: dispatch.linear_kl(HIDDEN, HEAD, HIDDEN, HEAD[:5]), KernelValueError, "teacher's vocabulary shard"),
        (lambda: dispatch.linear_kl(HIDDEN, HEAD, HIDDEN, HEAD, kind="kl"), KernelValueError, "unknown divergence"),
        (lambda: dispatch.linear_kl(HIDDEN, HEAD, HIDDEN, HEAD, temperature=0.0), KernelValueError, "must be positive"),
        (lambda: dispatch.linear_kl(HIDDEN, HEAD, HIDDEN, HEAD, alpha=0.5), KernelValueError, "'alpha' does not fit"),
        (
            lambda: dispatch.linear_topk_kl(HIDDEN, HEAD, LABELS[:, None], X[:, :2], X[:, 0]),
            KernelValueError,
            "'topk_logprobs' has the wrong shape",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(("rows", "fits"), [(8, True), (12, False)])
def test_a_teacher_whose_vocabulary_is_cut_at_other_tokens_is_refused(rows, fits):
    hidden, second = torch.zeros(2, 4), Shard(start=8, valid=6, vocab_size=14, group=object())
    tensors = hidden, torch.zeros(8, 4), hidden, torch.zeros(rows, 4)
    if fits:
        checks.teacher("linear_kl", *tensors, second)
        return
    with pytest.raises(KernelValueError, match="cut at other tokens"):
        checks.teacher("linear_kl", *tensors, second)


def test_ids_of_rows_that_do_not_count_may_be_anything_and_others_are_named_on_every_device():
    ids, values, ghost = torch.tensor([[0, 1], [-1, 9], [2, 6]]), torch.full((3, 2), -1.0), torch.full((3,), -1.0)
    hidden = torch.zeros(3, HEAD.shape[1])
    losses = dispatch.linear_topk_kl(hidden, HEAD, ids, values, ghost, mask=torch.tensor([1, 0, 0]))
    assert torch.isfinite(losses).all()
    with pytest.raises(KernelValueError, match="'topk_ids' holds ids outside the vocabulary"):
        dispatch.linear_topk_kl(hidden, HEAD, ids, values, ghost, mask=torch.tensor([1, 0, 1]))
    counted = torch.tensor([True, False, True])
    assert checks.foreign(ids, counted, vocab_size=6).tolist() == [False, False, True]
    assert checks.foreign(torch.tensor([5, 6, -1]), counted, vocab_size=6).tolist() == [False, False, True]
