import math

import pytest
import torch

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.distill.losses import (
    Mix,
    cross_entropy,
    divergence,
    hidden_distance,
    masked_mean,
    sampled_divergence,
    stage_ends,
    top_k_divergence,
)

VOCAB = 37


def logits(seed, shape=(3, 5, VOCAB), dtype=torch.float64):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2).to(dtype)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_distribution_is_no_distance_from_itself(kind):
    values = logits(1, dtype=torch.float32)
    assert float(divergence(values, values + 3.0, kind=kind).abs().max()) <= 1e-6
    assert float(divergence(values, logits(2, dtype=torch.float32), kind=kind).min()) > 0


def test_divergences_equal_their_definitions():
    student, teacher = logits(1), logits(2)
    p, q = torch.softmax(teacher / 2, -1), torch.softmax(student / 2, -1)
    m = (p + q) / 2
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    expected = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}
    for kind, value in expected.items():
        torch.testing.assert_close(divergence(student, teacher, kind=kind, temperature=2.0), value * 4)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradient_is_tau_times_the_difference_of_probabilities(temperature):
    student, teacher = logits(1).requires_grad_(), logits(2)
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    masked_mean(divergence(student, teacher, temperature=temperature), mask).backward()
    q, p = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    expected = temperature * (q - p) * mask[..., None] / mask.sum()
    assert float((student.grad - expected.detach()).abs().max()) <= 1e-12


def test_chunks_change_neither_value_nor_gradient():
    student, teacher = logits(1).requires_grad_(), logits(2)
    whole = divergence(student, teacher)
    (expected,) = torch.autograd.grad(whole.sum(), student)
    pieces = divergence(student, teacher, chunk=4)
    (found,) = torch.autograd.grad(pieces.sum(), student)
    assert torch.equal(whole, pieces)
    assert torch.equal(expected, found)


def top_k(teacher, k):
    values = torch.log_softmax(teacher, -1).topk(k, dim=-1)
    return values.indices, values.values


def test_all_entries_with_a_ghost_are_the_full_divergence():
    student, teacher = logits(1), logits(2)
    full = divergence(student, teacher)
    assert float((top_k_divergence(student, *top_k(teacher, VOCAB)) - full).abs().max()) <= 1e-6


def test_a_ghost_never_raises_the_divergence():
    student, teacher = logits(1), logits(2)
    full = divergence(student, teacher)
    previous = torch.zeros_like(full)
    for k in (1, 4, 16, VOCAB):
        value = top_k_divergence(student, *top_k(teacher, k))
        assert torch.all(value <= full + 1e-6)
        assert torch.all(value >= previous - 1e-6)
        previous = value


def test_sampled_targets_have_the_gradient_of_forward_kl_on_average():
    student, teacher = logits(1, (VOCAB,)).requires_grad_(), logits(2, (VOCAB,))
    p = torch.softmax(teacher, -1)
    draws = torch.multinomial(p, 2000 * 8, replacement=True, generator=torch.Generator().manual_seed(7)).view(2000, 8)
    weights = torch.full((8,), 1 / 8, dtype=torch.float64)
    found = []
    for ids in draws:
        (gradient,) = torch.autograd.grad(sampled_divergence(student, ids, weights), student)
        found.append(gradient)
    sample = torch.stack(found)
    (expected,) = torch.autograd.grad(divergence(student, teacher), student)
    error = sample.std(dim=0) / math.sqrt(len(sample))
    chi = (((sample.mean(dim=0) - expected) / error) ** 2).mean()
    assert torch.all((sample.mean(dim=0) - expected).abs() <= 4 * error + 1e-12)
    assert float(chi) < 2


def test_cross_entropy_and_masked_mean():
    values = logits(1)
    labels = torch.randint(0, VOCAB, (3, 5), generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(values.view(-1, VOCAB), labels.view(-1), reduction="none").view(3, 5)
    torch.testing.assert_close(cross_entropy(values, labels), expected)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 1] = mask[2, 2] = True
    torch.testing.assert_close(masked_mean(expected, mask), (expected[0, 1] + expected[2, 2]) / 2)
    torch.testing.assert_close(masked_mean(expected, None, count=7), expected.sum() / 7)


def test_hidden_distance():
    a, b = logits(1, (2, 3, 8)), logits(2, (2, 3, 8))
    torch.testing.assert_close(hidden_distance(a, b), (a - b).float().square().mean(-1))
    assert float(hidden_distance(a, 2 * a, kind="cosine").abs().max()) < 1e-6
    with pytest.raises(ConfigError, match="differ in shape"):
        hidden_distance(a, b[..., :4])


def test_mix_is_the_papers_by_default_and_moves_in_a_line():
    assert Mix().alpha_at(10**6) == 1.0
    assert Mix().temperature == 1.0
    mix = Mix(alpha=1.0, alpha_end=0.2, alpha_steps=10)
    assert [mix.alpha_at(step) for step in (0, 5, 10, 99)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


@pytest.mark.parametrize("values", [{"alpha": 1.5}, {"temperature": 0.0}, {"alpha_end": 0.5}])
def test_impossible_mixes_are_refused(values):
    with pytest.raises(ConfigError, match=r"distill\."):
        Mix(**values)


def test_stage_ends_follow_the_depth():
    assert stage_ends((3, 3, 4, 3, 3), 32) == (6, 12, 20, 26, 32)
    assert stage_ends((2, 2), 1) == (1, 1)
