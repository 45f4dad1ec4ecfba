"""What sharing a stage saves and does not cost, and the fused divergence, at LLaMA-2-7B's width on the device."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from megatron_inherit.arch.presets import preset
from megatron_inherit.data.loader import Batch
from megatron_inherit.kernels import dispatch
from megatron_inherit.sharing.options import Sharing
from megatron_inherit.sharing.stage_plan import contiguous
from megatron_inherit.sharing.tensors import count_shared

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYERS, BYTES = 4, 18
"""A stage of four repeats; bf16 weight, fp32 gradient, master and two moments a parameter."""


def peak_bytes(config, sharing, length, dtype="bf16"):
    """Trains two steps of one sequence and gives the largest memory held meanwhile."""
    from megatron_inherit.engines.base import EngineOptions
    from megatron_inherit.engines.create import create_engine

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine = create_engine("megatron", EngineOptions(dtype=dtype, recompute="full", sharing=sharing), config, seed=1)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, length + 1))
    mask = np.ones((1, length), dtype=bool)
    for step in range(2):
        batch = Batch(tokens=tokens[:, :-1], labels=tokens[:, 1:], loss_mask=mask, sample_ids=np.array([step]))
        assert np.isfinite(engine.train_step([batch], lr=1e-4).loss)
    engine.close()
    return torch.cuda.max_memory_allocated()


def test_a_stage_of_four_repeats_saves_three_layers_of_everything():
    config = preset("llama-2-7b").with_layers(LAYERS)
    plan = contiguous((LAYERS,))
    saved = peak_bytes(config, None, 4096) - peak_bytes(config, Sharing(plan=plan), 4096)
    wanted = (LAYERS - 1) * count_shared(config, plan).layer * BYTES
    assert saved == pytest.approx(wanted, rel=0.05)


def test_the_fused_divergence_takes_at_most_55_percent_of_the_memory():
    rows, width, vocab = 8192, 1024, 32000
    generator = torch.Generator("cuda").manual_seed(1)
    make = lambda *shape: torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    hidden, teacher = make(rows, width).requires_grad_(), make(rows, width)
    head, teacher_head = (make(vocab, width) * 0.05).requires_grad_(), make(vocab, width) * 0.05

    def whole():
        log_q, log_p = (
            torch.log_softmax((h @ w.t()).float(), -1) for h, w in ((hidden, head), (teacher, teacher_head))
        )
        return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def fused():
        return dispatch.linear_kl(hidden, head, teacher, teacher_head).mean()

    values, peaks = [], []
    for run in (fused, whole):
        torch.autograd.grad(run(), (hidden, head))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = run()
        torch.autograd.grad(loss, (hidden, head))
        values.append(float(loss))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert peaks[0] <= 0.55 * peaks[1], peaks
