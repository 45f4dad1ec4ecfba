"""Distillation losses of decoder language models, each a mean over the unmasked tokens.

The temperature softens both distributions and the loss is scaled by its square (Hinton et al. 2015), so that the
gradient of the logits is tau (q - p) / n. Values outside a cached top k are held by one ghost token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.distill.shards import Group, log_softmax, over_shards, pick

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
SMALLEST = 1e-8
"""Least probability of the ghost token, teacher's and student's."""


def _forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return log_p.exp() * (log_p - log_q)


def _reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return log_q.exp() * (log_q - log_p)


def _jsd(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (_forward_kl(log_p, log_m) + _forward_kl(log_q, log_m)) / 2


DIVERGENCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None, count: float | None = None) -> torch.Tensor:
    """Averages per-token values over the unmasked tokens.

    Args:
        values: [...], one a token.
        mask: bool, of the same shape; None counts all.
        count: Divides by this instead of the number of unmasked tokens (those of the whole global batch).
    """
    if mask is not None:
        values = values * mask
    divisor = count if count is not None else (values.numel() if mask is None else mask.sum().clamp(min=1))
    return values.sum() / divisor


def divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    kind: Divergence = "forward_kl",
    temperature: float = 1.0,
    group: Group = None,
    chunk: int = 0,
) -> torch.Tensor:
    """Measures how far the student's distribution is from the teacher's, a value a token.

    Args:
        student: Logits [..., V], or this rank's columns of them.
        teacher: Logits of the same shape; no gradient flows into them.
        kind: ``forward_kl`` is KL(teacher, student), ``reverse_kl`` KL(student, teacher), ``jsd`` the Jensen-Shannon
            divergence with equal weights.
        temperature: Divides both logits; the result is scaled by its square.
        group: Tensor-parallel group whose ranks hold the columns.
        chunk: Tokens at a time, recomputed in the backward pass, so that fp32 copies of the logits stay small; 0: all.

    Returns:
        [...] in nats times temperature squared.
    """
    if chunk and student.shape[:-1].numel() > chunk:
        flat = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
        pieces = [
            checkpoint(_divergence, s, t, kind, temperature, group, use_reentrant=False)
            for s, t in zip(flat[0].split(chunk), flat[1].split(chunk), strict=True)
        ]
        return torch.cat(pieces).view(student.shape[:-1])
    return _divergence(student, teacher, kind, temperature, group)


def _divergence(
    student: torch.Tensor, teacher: torch.Tensor, kind: Divergence, temperature: float, group: Group
) -> torch.Tensor:
    with torch.no_grad():
        log_p = log_softmax(teacher / temperature, group)
    log_q = log_softmax(student / temperature, group)
    return over_shards(DIVERGENCES[kind](log_p, log_q).sum(dim=-1), group) * temperature**2


def top_k_divergence(
    student: torch.Tensor,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: Group = None,
) -> torch.Tensor:
    """Forward KL to a cached teacher of k entries, the rest of both distributions held by one ghost token.

    Merging outcomes never raises a divergence, so this is at most the full one, and equal to it for k = V. Dropping the
    rest and renormalising instead would be biased.

    Args:
        student: Logits [..., V], or this rank's columns of them.
        ids: int64 [..., k], the teacher's most probable tokens.
        log_probs: [..., k], their log-probabilities at this temperature.
        temperature: The one the cache was made with.
        group: Tensor-parallel group.

    Returns:
        [...] in nats times temperature squared.
    """
    log_p = log_probs.to(torch.float64 if student.dtype == torch.float64 else torch.float32)
    log_q = pick(log_softmax(student / temperature, group), ids, group)
    kept = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    rest_p = (1 - log_p.exp().sum(dim=-1)).clamp(min=SMALLEST)
    rest_q = (1 - log_q.exp().sum(dim=-1)).clamp(min=SMALLEST)
    return (kept + rest_p * (rest_p.log() - rest_q.log())) * temperature**2


def sampled_divergence(
    student: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *, temperature: float = 1.0, group: Group = None
) -> torch.Tensor:
    """Cross-entropy to tokens drawn from the teacher: its gradient is that of forward KL on average.

    Args:
        student: Logits [..., V], or this rank's columns of them.
        ids: int64 [..., k], tokens drawn with replacement from the teacher's distribution at this temperature.
        weights: [..., k], each token's share of the draws; they add up to 1.
        temperature: Divides the logits.
        group: Tensor-parallel group.
    """
    log_q = pick(log_softmax(student / temperature, group), ids, group)
    return -(weights * log_q).sum(dim=-1) * temperature**2


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, group: Group = None) -> torch.Tensor:
    """Gives -log q(label) a token, over tensor-parallel columns too."""
    return -pick(log_softmax(logits, group), labels[..., None], group)[..., 0]


def hidden_distance(
    student: torch.Tensor, teacher: torch.Tensor, *, kind: Literal["mse", "cosine"] = "mse"
) -> torch.Tensor:
    """Compares hidden states: mean squared difference over the width, or one minus the cosine, a value a token.

    Args:
        student: [..., width].
        teacher: [..., width], without gradient.
        kind: Which distance.
    """
    if student.shape != teacher.shape:
        raise ConfigError(
            "Hidden states of student and teacher differ in shape.",
            got=f"{tuple(student.shape)} and {tuple(teacher.shape)}",
            fix="Match hidden states only between models of equal width, or set distill.hidden_weight to 0.",
        )
    wide, fixed = student.float(), teacher.detach().float()
    if kind == "cosine":
        return 1 - torch.cosine_similarity(wide, fixed, dim=-1)
    return (wide - fixed).square().mean(dim=-1)


@dataclass(frozen=True)
class Mix:
    """Weights of the terms: (1 - alpha) CE + alpha divergence + hidden_weight hidden.

    The defaults are the paper's: alpha 1 (no cross-entropy at all), temperature 1.

    Attributes:
        alpha: Share of the divergence at the start.
        alpha_end: Share at the end; reached in a straight line, or equal to ``alpha`` if None.
        alpha_steps: Steps of the line.
        temperature: Of the divergence.
        kind: Which divergence.
        hidden_weight: Of the hidden states at the ends of the stages.
    """

    alpha: float = 1.0
    alpha_end: float | None = None
    alpha_steps: int = 0
    temperature: float = 1.0
    kind: Divergence = "forward_kl"
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("alpha_end", self.alpha_end)):
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"distill.{name} must lie between 0 and 1.", got=value)
        if self.temperature <= 0:
            raise ConfigError("distill.temperature must be positive.", got=self.temperature)
        if self.alpha_end is not None and self.alpha_steps < 1:
            raise ConfigError(
                "distill.alpha_end needs the number of steps to reach it.", fix="Set distill.alpha_steps."
            )

    def alpha_at(self, step: int) -> float:
        """Gives the divergence's share at an optimizer step."""
        if self.alpha_end is None:
            return self.alpha
        return self.alpha + (self.alpha_end - self.alpha) * min(1.0, step / self.alpha_steps)


def stage_ends(counts: tuple[int, ...], teacher_layers: int) -> tuple[int, ...]:
    """Gives the teacher's layer that each stage's end is compared with: the same share of the depth, rounded.

    Args:
        counts: Repeats of each stage.
        teacher_layers: Depth of the teacher.

    Returns:
        For each stage the number of teacher layers passed, from 1 to ``teacher_layers``.
    """
    depth, passed, ends = sum(counts), 0, []
    for count in counts:
        passed += count
        ends.append(max(1, round(teacher_layers * passed / depth)))
    return tuple(ends)
