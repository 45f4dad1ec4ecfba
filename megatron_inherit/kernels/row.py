"""What the Triton kernels of both heads do along one row of logits."""

from __future__ import annotations

import triton
import triton.language as tl

PADDING = 64
"""Rows of logits are padded to a multiple of this many columns, so that every load is a whole aligned vector."""


@triton.jit
def grow(top, total, values):
    """Takes a block into a running maximum and a running sum of exponentials below it.

    A block may hold -inf throughout: then nothing is added and nothing becomes NaN.
    """
    higher = tl.maximum(top, tl.max(values, 0))
    safe = tl.where(higher == -float("inf"), 0.0, higher)
    return higher, safe, total * tl.exp(top - safe) + tl.sum(tl.exp(values - safe), 0)


@triton.jit
def load(base, start, stride, valid, factor, BLOCK: tl.constexpr):
    """Loads a block of logits times ``factor``; -inf beyond the vocabulary."""
    column = start + tl.arange(0, BLOCK)
    values = tl.load(base + column, mask=column < stride, other=0.0).to(tl.float32) * factor
    return tl.where(column < valid, values, -float("inf"))


@triton.jit
def logsumexp(base, stride, valid, factor, BLOCK: tl.constexpr):
    """Gives log(sum(exp(factor * row))), -inf of an empty row."""
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, valid, BLOCK):
        top, _, total = grow(top, total, load(base, start, stride, valid, factor, BLOCK))
    return top + tl.log(total)
