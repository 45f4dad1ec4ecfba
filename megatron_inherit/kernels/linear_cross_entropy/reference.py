"""Cross-entropy of a linear head in plain torch: the whole computation, and the row pass that CPU runs use."""

from __future__ import annotations

import functools

import torch

from megatron_inherit.kernels.head import Shard
from megatron_inherit.kernels.linear_cross_entropy.function import fused


def naive(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, vocab_size: int, z_loss: float = 0.0
) -> torch.Tensor:
    """Gives -log softmax(hidden @ weight.t())[label] + z_loss * logsumexp^2 a row, 0 where the label is negative.

    The truth that the others are tested against: it builds all logits and lets autograd differentiate.
    """
    logits = (hidden @ weight[:vocab_size].t()).to(torch.promote_types(hidden.dtype, torch.float32))
    normaliser = torch.logsumexp(logits, dim=-1)
    target = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels >= 0, normaliser - target + z_loss * normaliser.square(), 0.0)


def rows(
    logits: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor | None, *, shard: Shard, z_loss: float
) -> torch.Tensor:
    """Gives the losses of a chunk and leaves the logits' gradient in their place.

    Args:
        logits: [n, V] of this shard; overwritten.
        columns: int64 [n], the label's column, -1 where it is held elsewhere.
        scale: [n], factor on each row's gradient, or None if no gradient is wanted.
        shard: Which columns these are.
        z_loss: Factor on the squared logsumexp.

    Returns:
        [n] losses in float32 or wider.
    """
    here = logits[:, : shard.valid]
    wide = here.to(torch.promote_types(logits.dtype, torch.float32))
    index = columns.clamp(min=0)[:, None]
    if shard.group is None:
        target = wide.gather(1, index)[:, 0]
        log_p = torch.log_softmax(wide, 1, out=wide)
        loss = -log_p.gather(1, index)[:, 0]
        normaliser = target + loss
    else:
        target = (
            torch.where(columns >= 0, wide.gather(1, index)[:, 0], 0.0) if shard.valid else wide.new_zeros(len(wide))
        )
        parts = shard.gather(torch.stack([torch.logsumexp(wide, 1), target]))
        normaliser = torch.logsumexp(parts[:, 0], 0)
        loss = normaliser - parts[:, 1].sum(0)
        log_p = wide.sub_(normaliser[:, None])
    if z_loss:
        loss = loss + z_loss * normaliser.square()
    if scale is not None:
        factor = scale * (1 + 2 * z_loss * normaliser) if z_loss else scale
        _write_gradient(logits, log_p.exp_(), columns, factor, scale, shard)
    return loss


def _write_gradient(
    logits: torch.Tensor,
    p: torch.Tensor,
    columns: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    shard: Shard,
) -> None:
    if not bool((factor == 1).all()):
        p.mul_(factor[:, None])
    at = (columns >= 0).nonzero()[:, 0]
    p[at, columns[at]] -= scale[at]
    here = logits[:, : shard.valid]
    if here.data_ptr() != p.data_ptr():
        here.copy_(p)
    logits[:, shard.valid :] = 0


linear_cross_entropy = functools.partial(fused, rows=rows, padding=1)
