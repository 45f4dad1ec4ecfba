"""Log-probabilities of a vocabulary that is cut over tensor-parallel ranks, with the gradients of the whole one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

Group = Any
"""A torch.distributed process group whose ranks hold consecutive, equally wide columns, or None for one rank."""


class _Sum(torch.autograd.Function):
    """Adds shares over the ranks; each rank's share gets the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: Group) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _LogSoftmax(torch.autograd.Function):
    """fp32 log-softmax over all ranks' columns; two numbers a row cross the ranks each way."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, group: Group) -> torch.Tensor:
        values = logits.float()
        largest = values.amax(dim=-1, keepdim=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        total = (values - largest).exp().sum(dim=-1, keepdim=True)
        dist.all_reduce(total, group=group)
        out = values - largest - total.log()
        ctx.save_for_backward(out)
        ctx.group, ctx.dtype = group, logits.dtype
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (out,) = ctx.saved_tensors
        total = gradient.sum(dim=-1, keepdim=True)
        dist.all_reduce(total, group=ctx.group)
        return (gradient - out.exp() * total).to(ctx.dtype), None


def log_softmax(logits: torch.Tensor, group: Group = None) -> torch.Tensor:
    """Gives log-probabilities of this rank's columns, in fp32 (fp64 stays fp64 on one rank).

    Args:
        logits: [..., columns of this rank].
        group: The tensor-parallel group, or None.
    """
    if group is None:
        return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    return _LogSoftmax.apply(logits, group)


def over_shards(share: torch.Tensor, group: Group = None) -> torch.Tensor:
    """Adds what each rank's columns give to a sum over the vocabulary."""
    return share if group is None else _Sum.apply(share, group)


def pick(values: torch.Tensor, ids: torch.Tensor, group: Group = None) -> torch.Tensor:
    """Gathers columns by global token id.

    Args:
        values: [..., columns of this rank].
        ids: int64 [..., k], global token ids.
        group: The tensor-parallel group, or None.

    Returns:
        [..., k], the same on all ranks.
    """
    if group is None:
        return values.gather(-1, ids)
    width = values.shape[-1]
    local = ids - dist.get_rank(group) * width
    inside = (local >= 0) & (local < width)
    found = values.gather(-1, local.clamp(0, width - 1))
    return over_shards(torch.where(inside, found, torch.zeros_like(found)), group)
