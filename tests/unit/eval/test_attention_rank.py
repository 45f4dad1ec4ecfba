"""Checks A9 and A10 of the method: rank, mass and the bound of a collapsed attention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_inherit.eval.attention_rank import approximate_rank, mass, sink


def causal_maps(seed, heads=3, length=32, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(heads, length, length, generator=generator)
    return torch.softmax(scores.masked_fill(torch.triu(torch.ones(length, length, dtype=torch.bool), 1), -math.inf), -1)


def reference_rank(matrix, tau):
    energy = torch.linalg.svdvals(matrix.double()) ** 2
    total, running = float(energy.sum()), 0.0
    for count, part in enumerate(energy.tolist(), start=1):
        running += part
        if running >= tau * total * (1 - 1e-12):
            return count
    return len(energy)


def reference_mass(matrix, eta):
    columns = sorted((float((matrix[:, j].double() ** 2).sum()) for j in range(matrix.shape[1])), reverse=True)
    running = 0.0
    for count, part in enumerate(columns, start=1):
        running += part
        if running >= eta * sum(columns) * (1 - 1e-12):
            return count
    return len(columns)


def test_a_single_column_has_rank_and_mass_one():
    maps = torch.zeros(1, 64, 64)
    maps[:, :, 0] = 1
    assert approximate_rank(maps).tolist() == [1]
    assert mass(maps).tolist() == [1]
    assert sink(maps).tolist() == [1.0]


def test_the_identity_needs_nine_tenths_of_its_size():
    maps = torch.eye(128)[None]
    assert approximate_rank(maps).tolist() == [116]
    assert mass(maps).tolist() == [116]
    assert sink(maps).item() == pytest.approx(1 / 128)


@pytest.mark.parametrize(("tau", "expected"), [(0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (0.95, 3), (0.97, 4), (1.0, 4)])
def test_a_known_spectrum_is_counted_exactly(tau, expected):
    left = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    energy = torch.zeros(16, dtype=torch.float64)
    energy[:4] = torch.tensor([0.505, 0.305, 0.145, 0.045])
    assert approximate_rank((left * energy.sqrt()) @ right, tau).item() == expected


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.floats(0.05, 0.99))
def test_batches_agree_with_a_plain_reference(seed, share):
    maps = causal_maps(seed)
    assert mass(maps, share).tolist() == [reference_mass(one, share) for one in maps]
    ranks = approximate_rank(maps, share)
    assert ranks.tolist() == [reference_rank(one, share) for one in maps]
    assert (ranks >= 1).all()
    assert (approximate_rank(maps, min(1.0, share + 0.05)) >= ranks).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(1e-3, 0.2))
def test_a_collapsed_head_obeys_the_bound(seed, leak):
    """sigma_2 <= leak sqrt(2 T), and the softmax passes at most 2 leak of a row's gradient."""
    length = 48
    generator = torch.Generator().manual_seed(seed)
    rest = torch.rand(length, length - 1, generator=generator, dtype=torch.float64)
    rest = leak * rest / rest.sum(dim=-1, keepdim=True)
    maps = torch.cat([1 - rest.sum(dim=-1, keepdim=True), rest], dim=-1)
    assert torch.linalg.svdvals(maps)[1] <= leak * math.sqrt(2 * length) + 1e-12
    logits = maps[0].log().requires_grad_()
    upstream = torch.randn(length, generator=generator, dtype=torch.float64)
    torch.softmax(logits, dim=-1).backward(upstream)
    assert logits.grad.norm() <= 2 * leak * upstream.norm() + 1e-12
