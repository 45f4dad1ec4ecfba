"""Two linear heads and their divergence as one differentiable operation, for any row pass."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_inherit.kernels import head as chunked
from megatron_inherit.kernels.head import Head, Shard


def fused(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    labels: torch.Tensor | None,
    counted: torch.Tensor,
    shard: Shard,
    temperature: float,
    kind: str,
    alpha: float,
    per_token_grad: bool,
    reduce_hidden_grad: bool,
    rows: Callable[..., torch.Tensor],
    padding: int,
) -> torch.Tensor:
    """Gives the loss of each row; arguments as for ``dispatch.linear_kl``, checked there, rows flattened."""
    columns = None if labels is None else torch.where(counted, shard.local(labels), -1)
    teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
    buffers: list[torch.Tensor] = []

    def teacher_logits(part: slice) -> torch.Tensor:
        if not buffers:
            buffers.append(chunked.row_buffer(hidden, weight, padding).to(teacher_hidden.dtype))
        logits = buffers[0][: part.stop - part.start]
        torch.mm(teacher_hidden[part], teacher_weight.t(), out=logits[:, : teacher_weight.shape[0]])
        return logits

    def row_pass(logits: torch.Tensor, part: slice, scale: torch.Tensor | None) -> torch.Tensor:
        kept = counted[part]
        values = rows(
            logits,
            teacher_logits(part),
            None if columns is None else columns[part],
            None if scale is None else torch.where(kept, scale, 0.0),
            shard=shard,
            kind=kind,
            temperature=temperature,
            alpha=alpha,
        )
        if part.stop == hidden.shape[0]:
            buffers.clear()
        return torch.where(kept, values, 0.0)

    head = Head(row_pass, counted, padding, per_token_grad, reduce_hidden_grad, shard.group)
    return chunked.losses(hidden, weight, head)


def fused_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    ghost_log_prob: torch.Tensor,
    *,
    counted: torch.Tensor,
    shard: Shard,
    temperature: float,
    per_token_grad: bool,
    reduce_hidden_grad: bool,
    rows: Callable[..., torch.Tensor],
    padding: int,
) -> torch.Tensor:
    """Gives the loss of each row; arguments as for ``dispatch.linear_topk_kl``, checked there, rows flattened."""
    columns = shard.local(ids)

    def row_pass(logits: torch.Tensor, part: slice, scale: torch.Tensor | None) -> torch.Tensor:
        kept = counted[part]
        scale = None if scale is None else torch.where(kept, scale, 0.0)
        values = rows(
            logits,
            columns[part],
            log_probs[part],
            ghost_log_prob[part],
            scale,
            shard=shard,
            temperature=temperature,
        )
        return torch.where(kept, values, 0.0)

    head = Head(row_pass, counted, padding, per_token_grad, reduce_hidden_grad, shard.group)
    return chunked.losses(hidden, weight, head)
