"""SwiGLU (Shazeer 2020) on the packed gate and up projection, and GELU in its tanh form (Hendrycks and Gimpel 2016)."""

from __future__ import annotations

import torch
from torch.nn import functional


def swiglu(packed: torch.Tensor) -> torch.Tensor:
    """Gives ``silu(gate) * up`` of [..., 2F], gate first: [..., F]."""
    gate, up = packed.chunk(2, dim=-1)
    return functional.silu(gate) * up


def gelu_tanh(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Gives GELU of ``x + bias`` by the tanh approximation (GPT-2)."""
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")
