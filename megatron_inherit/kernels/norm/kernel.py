"""RMSNorm and LayerNorm in Triton, the residual addition fused in: one pass over memory each way.

The weight's gradient is a sum over rows: every program keeps the sum of its rows in registers and writes it once, and
the few partial sums are added in a fixed order, so that two runs agree bit for bit. Rows that one block cannot hold go
to ``long_rows``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron_inherit.kernels import launch
from megatron_inherit.kernels.norm import long_rows

Tensors = tuple[torch.Tensor | None, ...]


@triton.jit
def norm_forward(
    X, RESIDUAL, WEIGHT, BIAS, Y, SUM, MEAN, RSTD,
    x_stride, residual_stride, num_rows, width, eps,
    LAYER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norm of x, or of the sum of x and the residual, which is written too; LAYER subtracts the mean first."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    there = row < num_rows
    inside = there & (column < width)
    x = tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(RESIDUAL + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(SUM.dtype.element_ty)
        tl.store(SUM + row * width + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if LAYER:
        mean = tl.sum(x, 1, keep_dims=True) / width
        x = tl.where(inside, x - mean, 0.0)
        tl.store(MEAN + row, mean, mask=there)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / width + eps)
    tl.store(RSTD + row, rstd, mask=there)
    y = x * rstd * tl.load(WEIGHT + column, mask=column < width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(BIAS + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(Y + row * width + column, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    DY, DSUM, X, WEIGHT, MEAN, RSTD, DX, DWEIGHT, DBIAS,
    dy_stride, dsum_stride, x_stride, num_rows, width, steps,
    LAYER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DSUM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the norm's input plus that of the sum; one partial sum a program for weight and bias."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(WEIGHT + column, mask=column < width, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(0, steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS)[:, None]
        there = row < num_rows
        inside = there & (column < width)
        x = tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, mask=there, other=0.0)
        if LAYER:
            x = tl.where(inside, x - tl.load(MEAN + row, mask=there, other=0.0), 0.0)
        x *= rstd
        weight_sum += dy * x
        if HAS_BIAS:
            bias_sum += dy
        dy *= weight
        dx = dy - x * (tl.sum(dy * x, 1, keep_dims=True) / width)
        if LAYER:
            dx -= tl.sum(dy, 1, keep_dims=True) / width
        dx *= rstd
        if HAS_DSUM:
            dx += tl.load(DSUM + row * dsum_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + row * width + column, dx.to(DX.dtype.element_ty), mask=inside)
    at = program * width + tl.arange(0, BLOCK)
    kept = tl.arange(0, BLOCK) < width
    tl.store(DWEIGHT + at, tl.sum(weight_sum, 0), mask=kept)
    if HAS_BIAS:
        tl.store(DBIAS + at, tl.sum(bias_sum, 0), mask=kept)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        layer: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        flat = launch.as_rows(x)
        added = None if residual is None else launch.as_rows(residual)
        num_rows, width = flat.shape
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        summed = flat if added is None else torch.empty_like(y)
        rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        mean = torch.empty_like(rstd) if layer else rstd
        rows, block = launch.tile(width, widest=launch.MAX_WIDTH)
        if num_rows and width > launch.MAX_WIDTH:
            long_rows.forward(flat, added, weight, bias, (y, summed, mean, rstd), eps, layer=layer)
        elif num_rows:
            norm_forward[(triton.cdiv(num_rows, rows),)](
                flat, flat if added is None else added, weight, weight if bias is None else bias, y, summed, mean, rstd,
                flat.stride(0), 0 if added is None else added.stride(0), num_rows, width, eps,
                LAYER=layer, HAS_BIAS=bias is not None, HAS_RESIDUAL=added is not None, ROWS=rows, BLOCK=block,
                num_warps=launch.warps(rows * block),
            )  # fmt: skip
        ctx.save_for_backward(summed, weight, mean, rstd)
        ctx.layer, ctx.bias_dtype, ctx.has_residual = layer, None if bias is None else bias.dtype, added is not None
        ctx.set_materialize_grads(False)
        return y if added is None else (y, summed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, dsum: torch.Tensor | None = None) -> Tensors:
        x, weight, mean, rstd = ctx.saved_tensors
        if dy is None and dsum is None:
            return None, None, None, None, None, None
        shape = (dsum if dy is None else dy).shape  # type: ignore[union-attr]
        dy = torch.zeros(shape, dtype=x.dtype, device=x.device) if dy is None else dy
        dx, dweight, dbias = _backward(
            x, weight, mean, rstd, dy, dsum, layer=ctx.layer, bias=ctx.bias_dtype is not None
        )
        return (
            dx,
            dx if ctx.has_residual else None,
            dweight.to(weight.dtype),
            None if dbias is None else dbias.to(ctx.bias_dtype),
            None,
            None,
        )


def _backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    *,
    layer: bool,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    rows_in, grad = launch.as_rows(x), launch.as_rows(dy)
    extra = None if dsum is None else launch.as_rows(dsum)
    num_rows, width = rows_in.shape
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
    if num_rows and width > launch.MAX_WIDTH:
        parts = long_rows.backward(grad, extra, rows_in, weight, mean, rstd, dx, layer=layer, bias=bias)
        return dx, parts[0].sum(0), None if parts[1] is None else parts[1].sum(0)
    rows, block = launch.tile(width, widest=launch.MAX_WIDTH)
    num_warps = launch.warps(rows * block, per_thread=8)
    tiles = triton.cdiv(num_rows, rows)
    steps = max(1, triton.cdiv(tiles, launch.resident_programs(x.device, num_warps)))
    programs = triton.cdiv(tiles, steps)
    dweight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    dbias = torch.empty_like(dweight) if bias else None
    if programs:
        norm_backward[(programs,)](
            grad, grad if extra is None else extra, rows_in, weight, mean, rstd, dx, dweight,
            dweight if dbias is None else dbias,
            grad.stride(0), 0 if extra is None else extra.stride(0), rows_in.stride(0), num_rows, width, steps,
            LAYER=layer, HAS_BIAS=bias, HAS_DSUM=extra is not None, ROWS=rows, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return dx, dweight.sum(0), None if dbias is None else dbias.sum(0)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``dispatch.rms_norm``."""
    result: torch.Tensor = _Norm.apply(x, None, weight, None, eps, False)
    return result


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """See ``dispatch.layer_norm``."""
    result: torch.Tensor = _Norm.apply(x, None, weight, bias, eps, True)
    return result


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dispatch.add_rms_norm``."""
    result: tuple[torch.Tensor, torch.Tensor] = _Norm.apply(x, residual, weight, None, eps, False)
    return result


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``dispatch.add_layer_norm``."""
    result: tuple[torch.Tensor, torch.Tensor] = _Norm.apply(x, residual, weight, bias, eps, True)
    return result
