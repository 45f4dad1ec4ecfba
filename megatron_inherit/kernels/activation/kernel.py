"""SwiGLU on the packed projection and GELU(tanh) with its bias, in Triton, one pass over memory each way."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron_inherit.kernels import launch

WIDEST = 1024
"""Columns of a tile; a row is cut, since nothing is reduced along it."""


@triton.jit
def swiglu_forward(PACKED, Y, stride, num_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Gate and up at [row, column] and [row, width + column] -> y."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (column < width)
    at = PACKED + row * stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * width + column, (gate * tl.sigmoid(gate) * up).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(
    DY, PACKED, DPACKED, dy_stride, stride, num_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradient of both halves; the sigmoid is computed again."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (column < width)
    at = PACKED + row * stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    out = DPACKED + row * 2 * width + column
    tl.store(out, dgate.to(DPACKED.dtype.element_ty), mask=inside)
    tl.store(out + width, (dy * gate * sigmoid).to(DPACKED.dtype.element_ty), mask=inside)


@triton.jit
def gelu_sigmoid(x):
    """GELU(tanh) is x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)): this is the sigmoid."""
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gelu_forward(
    X, BIAS, Y, stride, num_rows, width, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """GELU of x + bias."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (column < width)
    x = tl.load(X + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(BIAS + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(Y + row * width + column, (x * gelu_sigmoid(x)).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward(
    DY, X, BIAS, DX, DBIAS, dy_stride, stride, num_rows, width, steps,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of x and, one partial sum a program, of the bias."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(0, steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < num_rows) & (column < width)
        x = tl.load(X + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(BIAS + column, mask=column < width, other=0.0).to(tl.float32)
        sigmoid = gelu_sigmoid(x)
        slope = 1.5957691216057308 * (x + 0.134145 * x * x * x)
        dx = dy * sigmoid * (1 + slope * (1 - sigmoid))
        total += dx
        tl.store(DX + row * width + column, dx.to(DX.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        flat = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tl.store(DBIAS + program * width + flat, tl.sum(total, 0), mask=flat < width)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(packed)
        flat = launch.as_rows(packed)
        width = packed.shape[-1] // 2
        y = packed.new_empty(*packed.shape[:-1], width)
        if y.numel():
            grid, rows, block = _grid(flat.shape[0], width)
            swiglu_forward[grid](flat, y, flat.stride(0), flat.shape[0], width, ROWS=rows, BLOCK=block)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (packed,) = ctx.saved_tensors
        flat, grad = launch.as_rows(packed), launch.as_rows(dy)
        width = dy.shape[-1]
        dpacked = torch.empty_like(packed, memory_format=torch.contiguous_format)
        if dpacked.numel():
            grid, rows, block = _grid(flat.shape[0], width)
            swiglu_backward[grid](
                grad, flat, dpacked, grad.stride(0), flat.stride(0), flat.shape[0], width, ROWS=rows, BLOCK=block
            )
        return dpacked


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        bias = None if bias is None else bias.contiguous()
        ctx.save_for_backward(x, bias)
        flat = launch.as_rows(x)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        if y.numel():
            grid, rows, block = _grid(*flat.shape)
            gelu_forward[grid](
                flat, flat if bias is None else bias, y, flat.stride(0), *flat.shape,
                HAS_BIAS=bias is not None, ROWS=rows, BLOCK=block,
            )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, bias = ctx.saved_tensors
        flat, grad = launch.as_rows(x), launch.as_rows(dy)
        num_rows, width = flat.shape
        (tiles, blocks), rows, block = _grid(num_rows, width)
        steps = 1
        if bias is not None:
            steps = max(1, triton.cdiv(tiles * blocks, launch.resident_programs(x.device, 4)))
        programs = triton.cdiv(tiles, steps)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        partial = None if bias is None else torch.empty(programs, width, dtype=torch.float32, device=x.device)
        if dx.numel():
            gelu_backward[(programs, blocks)](
                grad, flat, flat if bias is None else bias, dx, dx if partial is None else partial,
                grad.stride(0), flat.stride(0), num_rows, width, steps,
                HAS_BIAS=bias is not None, ROWS=rows, BLOCK=block,
            )  # fmt: skip
        return dx, None if partial is None else partial.sum(0).to(bias.dtype)


def _grid(num_rows: int, width: int) -> tuple[tuple[int, int], int, int]:
    rows, block = launch.tile(max(1, width), widest=WIDEST)
    return (triton.cdiv(num_rows, rows), triton.cdiv(width, block)), rows, block


def swiglu(packed: torch.Tensor) -> torch.Tensor:
    """See ``dispatch.swiglu``."""
    result: torch.Tensor = _Swiglu.apply(packed)
    return result


def gelu_tanh(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See ``dispatch.gelu_tanh``."""
    result: torch.Tensor = _Gelu.apply(x, bias)
    return result
