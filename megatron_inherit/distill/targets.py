"""What is stored of a teacher's distribution: its most probable tokens, or draws from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Targets = tuple[np.ndarray, np.ndarray]
"""ids int and log-probabilities float, both [samples, sequence, entries]."""

UNDRAWN = -30.0
"""Log-probability stored for a place that no draw filled: too little to matter, and finite."""


def top_targets(logits: torch.Tensor, entries: int, *, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the most probable tokens, most probable first.

    Args:
        logits: [..., V] of the teacher.
        entries: How many.
        temperature: Divides the logits.

    Returns:
        ids int64 and log-probabilities, both [..., entries].
    """
    import torch

    wide = logits if logits.dtype == torch.float64 else logits.float()
    found = torch.log_softmax(wide / temperature, dim=-1).topk(entries, dim=-1)
    return found.indices, found.values


def draw_targets(
    logits: torch.Tensor, entries: int, *, temperature: float, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws tokens with replacement; those that come up twice share one place, so that some places stay empty.

    The gradient of the divergence from the draws' shares is that of the full forward KL on average, which the most
    probable tokens alone, renormalised, would not give.

    Args:
        logits: [rows, V] of the teacher.
        entries: Draws a row.
        temperature: Divides the logits.
        generator: Where the randomness comes from.

    Returns:
        ids int64, no id twice in a row, and the logarithms of their shares, both [rows, entries].
    """
    import torch

    wide = logits if logits.dtype == torch.float64 else logits.float()
    p = torch.softmax(wide / temperature, dim=-1)
    draws = torch.multinomial(p, entries, replacement=True, generator=generator)
    counts = torch.zeros_like(p).scatter_add_(-1, draws, torch.ones_like(draws, dtype=p.dtype))
    found = counts.topk(entries, dim=-1)
    shares = (found.values / entries).log()
    return found.indices, shares.clamp(min=UNDRAWN)


def ghost_of(log_probs: torch.Tensor) -> torch.Tensor:
    """Gives the logarithm of the probability outside the stored tokens, [...] for [..., entries]."""
    import torch

    inside = log_probs.exp().sum(dim=-1)
    return torch.log1p(-inside.clamp(max=1.0))
