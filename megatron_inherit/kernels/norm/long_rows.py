"""RMSNorm and LayerNorm in Triton of rows that one block cannot hold: a program walks along its row in blocks.

Every walk after the first finds the row in the cache, so that memory is still passed once forward. Backward the sums
over rows that weight and bias need are taken by columns, in a kernel of their own that reads the rows again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_inherit.kernels import launch

BLOCK = 4096
"""Columns of a step along a row."""
SUM_BLOCK = 1024
"""Columns of a tile of the sums over rows."""
SUM_WARPS = 4


@triton.jit
def load_sum(X, RESIDUAL, SUM, column, inside, HAS_RESIDUAL: tl.constexpr):
    """Loads a block of x, or of the sum of x and the residual as it is stored."""
    x = tl.load(X + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(RESIDUAL + column, mask=inside, other=0.0).to(tl.float32)
        x = x.to(SUM.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def long_norm_forward(
    X, RESIDUAL, WEIGHT, BIAS, Y, SUM, MEAN, RSTD,
    x_stride, residual_stride, width, eps,
    LAYER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its mean (LAYER), its deviation, its norm."""
    row = tl.program_id(0).to(tl.int64)
    x_row, residual_row = X + row * x_stride, RESIDUAL + row * residual_stride
    lane = tl.arange(0, BLOCK)
    mean = tl.zeros((), tl.float32)
    if LAYER:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            column = start + lane
            total += load_sum(x_row, residual_row, SUM, column, column < width, HAS_RESIDUAL)
        mean = tl.sum(total, 0) / width
        tl.store(MEAN + row, mean)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + lane
        inside = column < width
        x = load_sum(x_row, residual_row, SUM, column, inside, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(SUM + row * width + column, x.to(SUM.dtype.element_ty), mask=inside)
        x = tl.where(inside, x - mean, 0.0)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, 0) / width + eps)
    tl.store(RSTD + row, rstd)
    for start in range(0, width, BLOCK):
        column = start + lane
        inside = column < width
        x = load_sum(x_row, residual_row, SUM, column, inside, HAS_RESIDUAL) - mean
        y = x * rstd * tl.load(WEIGHT + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(BIAS + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(Y + row * width + column, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def long_norm_backward(
    DY, DSUM, X, WEIGHT, MEAN, RSTD, DX,
    dy_stride, dsum_stride, x_stride, width,
    LAYER: tl.constexpr, HAS_DSUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row's gradient: its two means, then the gradient itself plus that of the sum."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    rstd = tl.load(RSTD + row)
    mean = tl.zeros((), tl.float32)
    if LAYER:
        mean = tl.load(MEAN + row)
    along = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + lane
        inside = column < width
        x = (tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        dy *= tl.load(WEIGHT + column, mask=inside, other=0.0).to(tl.float32)
        along += dy * x
        if LAYER:
            plain += dy
    slope = tl.sum(along, 0) / width
    level = tl.sum(plain, 0) / width
    for start in range(0, width, BLOCK):
        column = start + lane
        inside = column < width
        x = (tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        dy *= tl.load(WEIGHT + column, mask=inside, other=0.0).to(tl.float32)
        dx = (dy - x * slope - level) * rstd
        if HAS_DSUM:
            dx += tl.load(DSUM + row * dsum_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + row * width + column, dx.to(DX.dtype.element_ty), mask=inside)


@triton.jit
def long_norm_sums(
    DY, X, MEAN, RSTD, DWEIGHT, DBIAS,
    dy_stride, x_stride, num_rows, width, steps,
    LAYER: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of some rows: one partial sum for the weight and one for the bias."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(0, steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS)[:, None]
        there = row < num_rows
        inside = there & (column < width)
        x = tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        if LAYER:
            x -= tl.load(MEAN + row, mask=there, other=0.0)
        weight_sum += dy * x * tl.load(RSTD + row, mask=there, other=0.0)
        if HAS_BIAS:
            bias_sum += dy
    flat = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(DWEIGHT + program * width + flat, tl.sum(weight_sum, 0), mask=flat < width)
    if HAS_BIAS:
        tl.store(DBIAS + program * width + flat, tl.sum(bias_sum, 0), mask=flat < width)


def forward(
    flat: torch.Tensor,
    added: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    eps: float,
    *,
    layer: bool,
) -> None:
    """Fills ``outputs``, which are y, the sum, mean and rstd, from rows ``flat`` and the residual's rows ``added``."""
    num_rows, width = flat.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    long_norm_forward[(num_rows,)](
        flat, flat if added is None else added, weight, weight if bias is None else bias, *outputs,
        flat.stride(0), 0 if added is None else added.stride(0), width, eps,
        LAYER=layer, HAS_BIAS=bias is not None, HAS_RESIDUAL=added is not None, BLOCK=block,
        num_warps=launch.warps(block),
    )  # fmt: skip


def backward(
    grad: torch.Tensor,
    extra: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor,
    *,
    layer: bool,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fills ``dx`` and gives the partial sums [programs, width] of the weight's and the bias's gradient."""
    num_rows, width = x.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    long_norm_backward[(num_rows,)](
        grad, grad if extra is None else extra, x, weight, mean, rstd, dx,
        grad.stride(0), 0 if extra is None else extra.stride(0), x.stride(0), width,
        LAYER=layer, HAS_DSUM=extra is not None, BLOCK=block, num_warps=launch.warps(block),
    )  # fmt: skip
    rows, columns = launch.tile(width, widest=SUM_BLOCK)
    tiles, blocks = triton.cdiv(num_rows, rows), triton.cdiv(width, columns)
    steps = max(1, triton.cdiv(tiles * blocks, launch.resident_programs(x.device, SUM_WARPS)))
    programs = triton.cdiv(tiles, steps)
    dweight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    dbias = torch.empty_like(dweight) if bias else None
    long_norm_sums[(programs, blocks)](
        grad, x, mean, rstd, dweight, dweight if dbias is None else dbias,
        grad.stride(0), x.stride(0), num_rows, width, steps,
        LAYER=layer, HAS_BIAS=bias, ROWS=rows, BLOCK=columns, num_warps=SUM_WARPS,
    )  # fmt: skip
    return dweight, dbias
