"""Rotary position embedding (Su et al. 2021) of halves, as Hugging Face and Megatron-Core lay heads out."""

from __future__ import annotations

import torch
from torch.nn import functional


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first ``2 * cos.shape[-1]`` dimensions of each head and passes the rest through.

    Args:
        x: [s, b, heads, head_dim].
        cos: Cosines, [s, rotated / 2] or [s, b, rotated / 2], with any scaling factor already in them.
        sin: Sines of the same shape.

    Returns:
        A tensor of ``x``'s shape and dtype; the rotation is done in float32 or wider.
    """
    half = cos.shape[-1]
    lead = cos.shape if cos.ndim == 3 else (cos.shape[0], 1, half)
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(wide).reshape(*lead[:2], 1, half) for table in (cos, sin))
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)
    return torch.cat(turned if rest.shape[-1] == 0 else (*turned, rest), dim=-1)


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
    length, batch, _ = qkv.shape
    queries = num_heads // num_kv_heads
    grouped = qkv.view(length, batch, num_kv_heads, queries + 2, head_dim)
    q = grouped[..., :queries, :].reshape(length, batch, num_heads, head_dim)
    k, v = grouped[..., queries, :], grouped[..., queries + 1, :]
    parts = rope(q, cos, sin), rope(k, cos, sin), v
    if pad_to > head_dim:
        return tuple(functional.pad(part, (0, pad_to - head_dim)) for part in parts)  # type: ignore[return-value]
    return parts
