"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016), with the residual addition before them."""

from __future__ import annotations

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Gives ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in ``x``'s dtype."""
    if weight.dtype != x.dtype:
        return functional.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)
    return functional.rms_norm(x, weight.shape, weight, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Gives ``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dimension, in ``x``'s dtype."""
    if weight.dtype != x.dtype:
        wide = bias if bias is None else bias.to(weight.dtype)
        return functional.layer_norm(x.to(weight.dtype), weight.shape, weight, wide, eps).to(x.dtype)
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the norm of ``x + residual`` and that sum, the next residual stream."""
    summed = x + residual
    return rms_norm(summed, weight, eps), summed


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the norm of ``x + residual`` and that sum, the next residual stream."""
    summed = x + residual
    return layer_norm(summed, weight, bias, eps), summed
