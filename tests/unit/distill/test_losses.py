"""The divergences as distillation uses them: a head of the identity turns hidden states into logits."""

import math

import pytest
import torch

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.distill.losses import Mix, hidden_distance, hidden_pairs, require_pairs_on_one_rank, stage_ends
from megatron_inherit.distill.targets import draw_targets, ghost_of, top_targets
from megatron_inherit.kernels.dispatch import linear_kl, linear_topk_kl
from megatron_inherit.sharing.partition import Partition, partition
from megatron_inherit.sharing.stage_plan import contiguous, cycle, unshared

VOCAB = 37
HEAD = torch.eye(VOCAB, dtype=torch.float64)


def logits(seed, rows=15):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_distribution_is_no_distance_from_itself(kind):
    values = logits(1)
    assert float(linear_kl(values, HEAD, values + 3.0, HEAD, kind=kind).abs().max()) <= 1e-7
    assert float(linear_kl(values, HEAD, logits(2), HEAD, kind=kind).min()) > 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradient_is_tau_times_the_difference_of_probabilities(temperature):
    student, teacher = logits(1).requires_grad_(), logits(2)
    linear_kl(student, HEAD, teacher, HEAD, temperature=temperature).mean().backward()
    q, p = torch.softmax(student.detach() / temperature, -1), torch.softmax(teacher / temperature, -1)
    assert float((student.grad - temperature * (q - p) / len(student)).abs().max()) <= 1e-6


def cached(student, teacher, k):
    ids, values = top_targets(teacher, k, temperature=1.0)
    return linear_topk_kl(student, HEAD, ids, values, ghost_of(values))


def test_all_entries_with_a_ghost_are_the_full_divergence():
    full = linear_kl(logits(1), HEAD, logits(2), HEAD)
    assert float((cached(logits(1), logits(2), VOCAB) - full).abs().max()) <= 1e-6


def test_a_ghost_never_raises_the_divergence():
    full = linear_kl(logits(1), HEAD, logits(2), HEAD)
    previous = torch.zeros_like(full)
    for k in (1, 4, 16, VOCAB):
        value = cached(logits(1), logits(2), k)
        assert torch.all(value <= full + 1e-6)
        assert torch.all(value >= previous - 1e-6)
        previous = value


def test_drawn_targets_have_the_gradient_of_forward_kl_on_average():
    student, teacher = logits(1, rows=1), logits(2, rows=1)
    generator = torch.Generator().manual_seed(7)
    ids, values = draw_targets(teacher.expand(2000, VOCAB), 8, temperature=1.0, generator=generator)
    rows = student.expand(2000, VOCAB).clone().requires_grad_()
    linear_topk_kl(rows, HEAD, ids, values, torch.full((2000,), -math.inf, dtype=torch.float64)).sum().backward()
    alone = student.clone().requires_grad_()
    linear_kl(alone, HEAD, teacher, HEAD).sum().backward()
    error = rows.grad.std(dim=0) / math.sqrt(2000)
    deviation = (rows.grad.mean(dim=0) - alone.grad[0]) / error.clamp(min=1e-12)
    assert float(deviation.square().mean().sqrt()) < 1.5
    assert float(deviation.abs().max()) < 4


def test_hidden_distance():
    a, b = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(hidden_distance(a, b), (a - b).square().mean(-1))
    assert float(hidden_distance(a, 2 * a, "cosine").abs().max()) < 1e-6
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


def test_hidden_states_are_compared_on_one_rank_or_not_at_all():
    """A shallow teacher's layer 2 of 4 is the counterpart of two ends, one of them on the next rank."""
    assert hidden_pairs(contiguous((4, 1, 3)), 4) == ((4, 2), (5, 2), (8, 4))
    assert hidden_pairs(cycle(2, 2), 8) == ((1, 2), (2, 4), (3, 6), (4, 8))
    for plan, depth, ranks in (((4, 1, 3), 4, 1), ((4, 4), 4, 2), ((4, 1, 3), 32, 2), ((3, 3, 4, 3, 3), 32, 5)):
        split = partition(contiguous(plan), ranks)
        require_pairs_on_one_rank(split, cut(split, depth))
    split = partition(contiguous((4, 1, 3)), 2)
    with pytest.raises(ConfigError, match=r"hidden_weight.*layer 5 .*layer 2.*ranks 1 and 0.*parallel.pp lower"):
        require_pairs_on_one_rank(split, cut(split, 4))


def cut(split, depth):
    bounds = tuple(round(depth * bound / split.plan.num_layers) for bound in split.bounds)
    return Partition(unshared(depth), split.pipeline, split.chunks, bounds)


def test_a_uniform_student_is_ln_v_from_a_certain_teacher():
    certain = torch.full((4, VOCAB), -1e4, dtype=torch.float64)
    certain[range(4), [0, 5, 9, VOCAB - 1]] = 0.0
    found = linear_kl(torch.zeros(4, VOCAB, dtype=torch.float64), HEAD, certain, HEAD)
    assert found.tolist() == pytest.approx([math.log(VOCAB)] * 4, abs=1e-5)


def test_twice_as_long_a_text_is_no_further_away():
    student, teacher = logits(1), logits(2)
    once = linear_kl(student, HEAD, teacher, HEAD)
    twice = linear_kl(torch.cat([student, student]), HEAD, torch.cat([teacher, teacher]), HEAD)
    assert once.shape == (len(student),), "one value a token, whatever is divided by what later"
    assert float(twice.mean()) == pytest.approx(float(once.mean()), abs=1e-9)
    assert torch.equal(twice[: len(once)], once)
