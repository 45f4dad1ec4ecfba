"""RoPE on Megatron's packed projection in Triton: split, rotation, padding and their reverse, one pass each way."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron_inherit.kernels import launch
from megatron_inherit.kernels.errors import KernelValueError


@triton.jit
def _section(base, stride_s, stride_b, stride_h, s, b, head):
    return base + s * stride_s + b * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def _move(packed, q, k, v, mask, is_q, is_k, is_v, zero_from, column, BACKWARD: tl.constexpr):
    """Loads a tile from the packed side or, backward, from whichever of the three holds it."""
    inside = mask & (column < zero_from)
    if BACKWARD:
        value = tl.load(q + column, mask=inside & is_q, other=0.0).to(tl.float32)
        value += tl.load(k + column, mask=inside & is_k, other=0.0).to(tl.float32)
        return value + tl.load(v + column, mask=inside & is_v, other=0.0).to(tl.float32)
    return tl.load(packed + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(packed, q, k, v, mask, is_q, is_k, is_v, column, value, BACKWARD: tl.constexpr):
    """Stores a tile to where ``_move`` does not load from."""
    value = value.to(packed.dtype.element_ty)
    if BACKWARD:
        tl.store(packed + column, value, mask=mask)
    else:
        tl.store(q + column, value, mask=mask & is_q)
        tl.store(k + column, value, mask=mask & is_k)
        tl.store(v + column, value, mask=mask & is_v)


@triton.jit
def rotate(
    PACKED, COS, SIN, Q, K, V, batch,
    packed_s, packed_b, packed_h, table_s, table_b, q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    PAD: tl.constexpr, BACKWARD: tl.constexpr, HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
):  # fmt: skip
    """One token and some heads: PACKED -> Q, K, V, or backward the gradients' way with the angle reversed.

    Head ``h`` of the packed side is slot ``h % SLOTS`` of group ``h // SLOTS``: first QUERIES queries, then key, value.
    """
    s = (tl.program_id(0) // batch).to(tl.int64)
    b = (tl.program_id(0) % batch).to(tl.int64)
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None]
    there = head < HEADS
    group, slot = head // SLOTS, head % SLOTS
    is_q, is_k, is_v = slot < QUERIES, slot == QUERIES, slot == QUERIES + 1
    packed = _section(PACKED, packed_s, packed_b, packed_h, s, b, head)
    q = _section(Q, q_s, q_b, q_h, s, b, group * QUERIES + slot)
    k = _section(K, k_s, k_b, k_h, s, b, group)
    v = _section(V, v_s, v_b, v_h, s, b, group)

    column = tl.arange(0, HALF_BLOCK)[None, :]
    turned = column < HALF
    mask = there & turned
    first = _move(packed, q, k, v, mask, is_q, is_k, is_v, HALF, column, BACKWARD)
    second = _move(packed, q, k, v, mask, is_q, is_k, is_v, 2 * HALF, column + HALF, BACKWARD)
    cos = tl.load(COS + s * table_s + b * table_b + column, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(SIN + s * table_s + b * table_b + column, mask=turned, other=0.0).to(tl.float32)
    cos = tl.where(is_v, 1.0, cos)
    sin = tl.where(is_v, 0.0, -sin if BACKWARD else sin)
    _put(packed, q, k, v, mask, is_q, is_k, is_v, column, first * cos - second * sin, BACKWARD)
    _put(packed, q, k, v, mask, is_q, is_k, is_v, column + HALF, second * cos + first * sin, BACKWARD)

    if TAIL_BLOCK > 0:
        column = 2 * HALF + tl.arange(0, TAIL_BLOCK)[None, :]
        rest = _move(packed, q, k, v, there, is_q, is_k, is_v, HEAD_DIM, column, BACKWARD)
        mask = there & (column < (HEAD_DIM if BACKWARD else PAD))
        _put(packed, q, k, v, mask, is_q, is_k, is_v, column, rest, BACKWARD)


def _run(
    packed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    parts: tuple[torch.Tensor, ...],
    *,
    queries: int,
    slots: int,
    backward: bool,
) -> None:
    """Launches ``rotate`` between ``packed`` [s, b, heads, head_dim] and ``parts`` [s, b, heads, pad]."""
    length, batch, heads, head_dim = packed.shape
    if packed.numel() == 0:
        return
    half, pad = cos.shape[-1], parts[0].shape[-1]
    if max(head_dim, pad) > launch.MAX_WIDTH:
        raise KernelValueError(
            "rope: the heads of 'packed' are wider than a block.", got=max(head_dim, pad), expected=launch.MAX_WIDTH
        )
    half_block = triton.next_power_of_2(half)
    tail = (head_dim if backward else pad) - 2 * half
    head_block = min(triton.next_power_of_2(heads), max(1, 2048 // half_block))
    table = cos.stride() if cos.ndim == 3 else (cos.stride(0), 0)
    q, k, v = parts if len(parts) == 3 else (parts[0],) * 3
    rotate[(length * batch, triton.cdiv(heads, head_block))](
        packed, cos, sin, q, k, v, batch, *packed.stride()[:3], *table[:2], *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3],
        HEADS=heads, QUERIES=queries, SLOTS=slots, HEAD_DIM=head_dim, HALF=half, PAD=pad, BACKWARD=backward,
        HEAD_BLOCK=head_block, HALF_BLOCK=half_block, TAIL_BLOCK=triton.next_power_of_2(tail) if tail else 0,
        num_warps=launch.warps(head_block * half_block * 2),
    )  # fmt: skip


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _RopeQkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: int, queries: int, pad: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cos, sin = _dense(cos), _dense(sin)
        ctx.save_for_backward(cos, sin)
        heads = groups * (queries + 2)
        packed = _dense(qkv).unflatten(-1, (heads, -1))
        q, k, v = (packed.new_empty(*qkv.shape[:2], count, pad) for count in (groups * queries, groups, groups))
        _run(packed, cos, sin, (q, k, v), queries=queries, slots=queries + 2, backward=False)
        ctx.heads, ctx.head_dim, ctx.queries = heads, packed.shape[-1], queries
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        parts = tuple(_dense(grad) for grad in grads)
        dqkv = parts[0].new_empty(*parts[0].shape[:2], ctx.heads, ctx.head_dim)
        _run(dqkv, cos, sin, parts, queries=ctx.queries, slots=ctx.queries + 2, backward=True)
        return dqkv.flatten(2), None, None, None, None, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x, cos, sin = _dense(x), _dense(cos), _dense(sin)
        ctx.save_for_backward(cos, sin)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        _run(x, cos, sin, (y,), queries=x.shape[2], slots=x.shape[2], backward=False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
        _run(dx, cos, sin, (_dense(dy),), queries=dy.shape[2], slots=dy.shape[2], backward=True)
        return dx, None, None


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See ``dispatch.rope``."""
    result: torch.Tensor = _Rope.apply(x, cos, sin)
    return result


def rope_qkv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    pad_to: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``dispatch.rope_qkv``; ``head_dim`` follows from the shape here."""
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _RopeQkv.apply(
        qkv, cos, sin, num_kv_heads, num_heads // num_kv_heads, pad_to
    )
    return result
