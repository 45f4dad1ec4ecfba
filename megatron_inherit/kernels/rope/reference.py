"""Rotary position embedding (Su et al. 2021) of halves, as Hugging Face and Megatron-Core lay heads out."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def _turn(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Writes the rotated heads ``x`` into the first dimensions of ``out``, zeros into those that ``x`` lacks."""
    half, width = cos.shape[-1], min(x.shape[-1], out.shape[-1])
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x[..., :half].to(wide), x[..., half : 2 * half].to(wide)
    out[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    out[..., half : 2 * half] = (second * cos).addcmul_(first, sin)
    out[..., 2 * half : width] = x[..., 2 * half : width]
    out[..., width:] = 0


def _tables(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the tables as [s, b or 1, 1, half] in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (cos.shape[0], cos.shape[1] if cos.ndim == 3 else 1, 1, cos.shape[-1])
    return cos.to(wide).view(shape), sin.to(wide).view(shape)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        _turn(y, x, cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
        _turn(dx, dy, cos, -sin)
        return dx, None, None


class _RopeQkv(torch.autograd.Function):
    """Every head is written once, where it belongs; autograd would go through slices and concatenations."""

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: int, queries: int, pad: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.queries = queries
        grouped = qkv.unflatten(-1, (groups, queries + 2, -1))
        ctx.head_dim = grouped.shape[-1]
        lead = qkv.shape[:2]
        q = qkv.new_empty(*lead, groups, queries, pad)
        k, v = (qkv.new_empty(*lead, groups, 1, pad) for _ in range(2))
        cos, sin = cos[:, :, None], sin[:, :, None]
        _turn(q, grouped[..., :queries, :], cos, sin)
        _turn(k, grouped[..., queries : queries + 1, :], cos, sin)
        v[..., : ctx.head_dim] = grouped[..., queries + 1 :, :]
        v[..., ctx.head_dim :] = 0
        return q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None, None]:
        cos, sin = (table[:, :, None] for table in ctx.saved_tensors)
        groups, queries = dk.shape[2], ctx.queries
        grouped = dq.new_empty(*dq.shape[:2], groups, queries + 2, ctx.head_dim)
        _turn(grouped[..., :queries, :], dq.unflatten(2, (groups, queries)), cos, -sin)
        _turn(grouped[..., queries : queries + 1, :], dk.unsqueeze(3), cos, -sin)
        grouped[..., queries + 1, :] = dv[..., : ctx.head_dim]
        return grouped.flatten(2), None, None, None, None, None


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first ``2 * cos.shape[-1]`` dimensions of each head and passes the rest through.

    Args:
        x: [s, b, heads, head_dim].
        cos: Cosines, [s, rotated / 2] or [s, b, rotated / 2], with any scaling factor already in them.
        sin: Sines of the same shape.

    Returns:
        A tensor of ``x``'s shape and dtype; the rotation is done in float32 or wider.
    """
    result: torch.Tensor = _Rope.apply(x, *_tables(x, cos, sin))
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
    """Splits Megatron's packed projection, rotates queries and keys and pads every head with zeros.

    Args:
        qkv: [s, b, groups * (queries a group + 2) * head_dim]: for each key/value group its queries, key, value.
        cos: As for ``rope``.
        sin: As for ``rope``.
        num_heads: Query heads in ``qkv``.
        num_kv_heads: Groups.
        head_dim: Width of a head.
        pad_to: Width of a head in the result, at least ``head_dim``.

    Returns:
        q [s, b, num_heads, pad_to], k and v [s, b, num_kv_heads, pad_to].
    """
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _RopeQkv.apply(
        qkv, *_tables(qkv, cos, sin), num_kv_heads, num_heads // num_kv_heads, pad_to
    )
    return result
