"""Loss and gradient of one chunk of logits in Triton, in place: one program a row, two passes that meet in the L2."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from megatron_inherit.kernels import row
from megatron_inherit.kernels.head import Shard
from megatron_inherit.kernels.linear_cross_entropy.function import fused
from megatron_inherit.kernels.row import PADDING

BLOCK = 4096
WARPS = 8


@triton.jit
def cross_entropy(
    LOGITS, COLUMN, SCALE, NORMALISER, TARGET, stride, valid, z_loss,
    STATISTICS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """STATISTICS writes each row's logsumexp and target logit; GRADIENT, alone or after it, replaces the logits."""
    program = tl.program_id(0).to(tl.int64)
    base = LOGITS + program * stride
    label = tl.load(COLUMN + program)
    if STATISTICS:
        # read before the barriers of the reductions: behind them another warp may have put the gradient in its place
        target = tl.load(base + label, mask=label >= 0, other=0.0).to(tl.float32)
        normaliser = row.logsumexp(base, stride, valid, 1.0, BLOCK)
        tl.store(NORMALISER + program, normaliser)
        tl.store(TARGET + program, target)
    else:
        normaliser = tl.load(NORMALISER + program)
    if GRADIENT:
        scale = tl.load(SCALE + program)
        factor = scale * (1 + 2 * z_loss * normaliser)
        for start in range(0, stride, BLOCK):
            column = start + tl.arange(0, BLOCK)
            p = tl.exp(row.load(base, start, stride, valid, 1.0, BLOCK) - normaliser)
            gradient = p * factor - tl.where(column == label, scale, 0.0)
            tl.store(base + column, gradient.to(LOGITS.dtype.element_ty), mask=column < stride)


def rows(
    logits: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor | None, *, shard: Shard, z_loss: float
) -> torch.Tensor:
    """Gives the losses of a chunk and leaves the logits' gradient in their place; as ``reference.rows``."""
    count = logits.shape[0]
    normaliser, target = torch.empty(2, count, dtype=torch.float32, device=logits.device)
    launch = functools.partial(
        cross_entropy[(count,)], logits, columns, normaliser if scale is None else scale, normaliser, target,
        logits.stride(0), shard.valid, z_loss, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    if shard.group is None:
        launch(STATISTICS=True, GRADIENT=scale is not None)
    else:
        launch(STATISTICS=True, GRADIENT=False)
        parts = shard.gather(torch.stack([normaliser, target]))
        torch.logsumexp(parts[:, 0], 0, out=normaliser)
        target = parts[:, 1].sum(0)
        if scale is not None:
            launch(STATISTICS=False, GRADIENT=True)
    return normaliser - target + z_loss * normaliser.square()


linear_cross_entropy = functools.partial(fused, rows=rows, padding=PADDING)
