"""Divergence of two linear heads in plain torch: the whole computation, and the row passes that CPU runs use.

p is the teacher's distribution, q the student's, both at the given temperature; every divergence is multiplied by the
square of the temperature (Hinton et al. 2015), so that its gradient keeps its size.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch

from megatron_inherit.kernels.head import Shard
from megatron_inherit.kernels.linear_kl.function import fused, fused_topk

Kind = Literal["forward", "reverse", "jsd"]
KINDS: tuple[Kind, ...] = ("forward", "reverse", "jsd")
SMALLEST_GHOST = 1e-8
"""Least probability of the student's ghost token; below it the ghost term has no gradient."""


def naive(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float,
    kind: Kind,
) -> torch.Tensor:
    """Gives KL(p, q), KL(q, p) or the Jensen-Shannon divergence of each row, times temperature squared.

    The truth that the others are tested against: it builds all logits and lets autograd differentiate.
    """
    wide = torch.promote_types(student_hidden.dtype, torch.float32)
    student = (student_hidden @ student_weight[:vocab_size].t()).to(wide) / temperature
    teacher = (teacher_hidden @ teacher_weight[:vocab_size].t()).to(wide) / temperature
    log_q, log_p = student.log_softmax(-1), teacher.detach().log_softmax(-1)
    if kind == "forward":
        value = _kl(log_p, log_q)
    elif kind == "reverse":
        value = _kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        value = (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
    return value * temperature**2


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def naive_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    ghost_log_prob: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float,
) -> torch.Tensor:
    """Gives KL(p, q) of each row where p is known for k tokens and one ghost token holds the rest of both.

    The truth that the others are tested against.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ weight[:vocab_size].t()).to(wide) / temperature
    log_q = logits.log_softmax(-1).gather(-1, ids)
    rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - logits.logsumexp(-1)
    ghost = ghost_log_prob.exp()
    floor = math.log(SMALLEST_GHOST)
    entropy = torch.where(ghost > 0, ghost * (ghost_log_prob - rest.clamp(min=floor)), 0.0)
    return ((log_probs.exp() * (log_probs - log_q)).sum(-1) + entropy) * temperature**2


def rows(
    student: torch.Tensor,
    teacher: torch.Tensor,
    columns: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    shard: Shard,
    kind: Kind,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """Gives ``alpha * divergence + (1 - alpha) * cross-entropy`` of a chunk and leaves its gradient in ``student``.

    Args:
        student: Logits [n, V] of this shard; overwritten.
        teacher: Logits [n, V] of this shard; overwritten.
        columns: int64 [n], the label's column, -1 where it is held elsewhere; None without cross-entropy.
        scale: [n], factor on each row's gradient, or None if no gradient is wanted.
        shard: Which columns these are.
        kind: Which divergence.
        temperature: Divides both logits in the divergence, not in the cross-entropy.
        alpha: Share of the divergence.

    Returns:
        [n] losses in float32 or wider.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    raw = student[:, : shard.valid].to(wide)
    log_q = _log_softmax(raw / temperature, shard)
    log_p = _log_softmax(teacher[:, : shard.valid].to(wide) / temperature, shard)
    value, gradient = _divergence(log_p, log_q, kind, shard)
    loss = value * (alpha * temperature**2)
    if columns is not None:
        plain = log_q if temperature == 1 else _log_softmax(raw, shard)
        at = (columns >= 0).nonzero()[:, 0]
        target = torch.zeros_like(loss).index_put((at,), plain[at, columns[at]])
        loss = loss - (1 - alpha) * shard.gather(target).sum(0)
    if scale is not None:
        gradient *= alpha * temperature
        if columns is not None:
            gradient.add_(plain.exp(), alpha=1 - alpha)
            gradient[at, columns[at]] -= 1 - alpha
        student[:, : shard.valid] = gradient.mul_(scale[:, None])
        student[:, shard.valid :] = 0
    return loss


def _log_softmax(logits: torch.Tensor, shard: Shard) -> torch.Tensor:
    if shard.group is None:
        return torch.log_softmax(logits, 1)
    normaliser = torch.logsumexp(shard.gather(torch.logsumexp(logits, 1)), 0)
    return logits.sub_(normaliser[:, None])


def _divergence(
    log_p: torch.Tensor, log_q: torch.Tensor, kind: Kind, shard: Shard
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the divergence of each row and its gradient in the student's softened logits."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward":
        return shard.gather((p * (log_p - log_q)).sum(1)).sum(0), q.sub_(p)
    if kind == "reverse":
        ratio = log_q - log_p
        value = shard.gather((q * ratio).sum(1)).sum(0)
        return value, q.mul_(ratio.sub_(value[:, None]))
    log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2))
    ratio = log_q - log_m
    from_p, from_q = shard.gather(torch.stack([(p * (log_p - log_m)).sum(1), (q * ratio).sum(1)])).sum(0)
    return (from_p + from_q) / 2, q.mul_(ratio.sub_(from_q[:, None])).div_(2)


def topk_rows(
    logits: torch.Tensor,
    columns: torch.Tensor,
    log_probs: torch.Tensor,
    ghost_log_prob: torch.Tensor,
    scale: torch.Tensor | None,
    *,
    shard: Shard,
    temperature: float,
) -> torch.Tensor:
    """Gives the divergence from a teacher of k tokens and a ghost, and leaves its gradient in ``logits``.

    Args:
        logits: [n, V] of this shard; overwritten.
        columns: int64 [n, k], columns of the teacher's tokens, -1 where held elsewhere.
        log_probs: [n, k], their log-probabilities.
        ghost_log_prob: [n], log-probability of all other tokens together.
        scale: [n], factor on each row's gradient, or None if no gradient is wanted.
        shard: Which columns these are.
        temperature: Divides the logits.

    Returns:
        [n] losses in float32 or wider.
    """
    here = logits[:, : shard.valid].to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    row, slot = (columns >= 0).nonzero(as_tuple=True)
    column = columns[row, slot]
    kept = here.new_full(columns.shape, -torch.inf)
    kept[row, slot] = here[row, column]
    here[row, column] = -torch.inf
    terms = topk_terms(kept, torch.logsumexp(here, 1), log_probs, ghost_log_prob, shard)
    if scale is not None:
        factor = scale * temperature
        inside = (here - terms.normaliser[:, None]).exp_().mul_((factor * terms.mass)[:, None])
        rest = terms.rest[:, None].clamp(min=torch.finfo(here.dtype).min)
        inside.addcmul_((here - rest).exp_(), (factor * terms.ghost)[:, None], value=-1)
        inside[row, column] = (terms.kept_gradient * factor[:, None])[row, slot]
        logits[:, : shard.valid] = inside
        logits[:, shard.valid :] = 0
    return terms.value * temperature**2


class TopkTerms:
    """What the row pass over a truncated teacher needs from a row's statistics.

    Attributes:
        value: Divergence [n], without the temperature's square.
        normaliser: logsumexp of the student's softened logits [n].
        rest: The same over the tokens outside the teacher's k.
        mass: The teacher's total probability that has a gradient [n].
        ghost: The ghost's part of it.
        kept_gradient: Gradient at the k tokens [n, k].
    """

    def __init__(
        self,
        kept: torch.Tensor,
        rest: torch.Tensor,
        log_probs: torch.Tensor,
        ghost_log_prob: torch.Tensor,
        normaliser: torch.Tensor,
    ) -> None:
        log_q = kept - normaliser[:, None]
        log_rest = rest - normaliser
        floor = math.log(SMALLEST_GHOST)
        p, ghost = log_probs.exp(), ghost_log_prob.exp()
        ghost_term = torch.where(ghost > 0, ghost * (ghost_log_prob - log_rest.clamp(min=floor)), 0.0)
        self.value = torch.where(p > 0, p * (log_probs - log_q), 0.0).sum(1) + ghost_term
        self.normaliser, self.rest = normaliser, rest
        self.ghost = torch.where(log_rest > floor, ghost, 0.0)
        self.mass = p.sum(1) + self.ghost
        self.kept_gradient = self.mass[:, None] * log_q.exp() - p


def topk_terms(
    kept: torch.Tensor, rest: torch.Tensor, log_probs: torch.Tensor, ghost_log_prob: torch.Tensor, shard: Shard
) -> TopkTerms:
    """Puts the shards' statistics of a row together.

    Args:
        kept: [n, k], the student's softened logits of the teacher's tokens, -inf where held elsewhere.
        rest: [n], logsumexp of this shard's other columns.
        log_probs: [n, k].
        ghost_log_prob: [n].
        shard: Which columns these are.
    """
    parts = shard.gather(torch.cat([kept, rest[:, None]], 1))
    kept, rest = parts[..., :-1].amax(0), torch.logsumexp(parts[..., -1], 0)
    normaliser = torch.logaddexp(rest, torch.logsumexp(kept, 1))
    return TopkTerms(kept, rest, log_probs.to(kept.dtype), ghost_log_prob.to(kept.dtype), normaliser)


linear_kl = functools.partial(fused, rows=rows, padding=1)
linear_topk_kl = functools.partial(fused_topk, rows=topk_rows, padding=1)
