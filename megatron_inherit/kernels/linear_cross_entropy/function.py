"""Linear head and cross-entropy as one differentiable operation, for any row pass."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_inherit.kernels import head as chunked
from megatron_inherit.kernels.head import Head, Shard


def fused(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    counted: torch.Tensor,
    shard: Shard,
    z_loss: float,
    per_token_grad: bool,
    reduce_hidden_grad: bool,
    rows: Callable[..., torch.Tensor],
    padding: int,
) -> torch.Tensor:
    """Gives the loss of each row; arguments as for ``dispatch.linear_cross_entropy``, checked there.

    Args:
        hidden: [N, H].
        weight: [V, H].
        labels: int64 [N], valid wherever ``counted``.
        counted: bool [N]; other rows give zero and no gradient.
        shard: The rows of ``weight``.
        z_loss: Factor on the squared logsumexp.
        per_token_grad: See ``head.Head``.
        reduce_hidden_grad: See ``head.Head``.
        rows: The implementation's row pass over a chunk of logits.
        padding: See ``head.Head``.
    """
    columns = torch.where(counted, shard.local(labels), -1)

    def row_pass(logits: torch.Tensor, part: slice, scale: torch.Tensor | None) -> torch.Tensor:
        kept = counted[part]
        scale = None if scale is None else torch.where(kept, scale, 0.0)
        values = rows(logits, columns[part], scale, shard=shard, z_loss=z_loss)
        return torch.where(kept, values, 0.0)

    head = Head(row_pass, counted, padding, per_token_grad, reduce_hidden_grad, shard.group)
    return chunked.losses(hidden, weight, head)
