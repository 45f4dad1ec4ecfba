"""SwiGLU (Shazeer 2020) on the packed gate and up projection, and GELU in its tanh form (Hendrycks and Gimpel 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _Swiglu(torch.autograd.Function):
    """Writes both halves of the gradient where they belong, which automatic differentiation does by concatenation."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor) -> torch.Tensor:
        gate, up = packed.chunk(2, dim=-1)
        active = functional.silu(gate)
        ctx.save_for_backward(packed, active)
        return active * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        packed, active = ctx.saved_tensors
        gate, up = packed.chunk(2, dim=-1)
        dpacked = torch.empty_like(packed, memory_format=torch.contiguous_format)
        dgate, dup = dpacked.chunk(2, dim=-1)
        torch.mul(dy, active, out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return dpacked


def swiglu(packed: torch.Tensor) -> torch.Tensor:
    """Gives ``silu(gate) * up`` of [..., 2F], gate first: [..., F]."""
    result: torch.Tensor = _Swiglu.apply(packed)
    return result


def gelu_tanh(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Gives GELU of ``x + bias`` by the tanh approximation (GPT-2)."""
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")
