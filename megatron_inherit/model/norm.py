"""The norm of a model as a module: RMSNorm or LayerNorm by the configuration, aware of sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_inherit.kernels.dispatch import add_layer_norm, add_rms_norm, layer_norm, rms_norm


class Norm(torch.nn.Module):
    """Normalises the last dimension.

    Args:
        config: Says RMSNorm or LayerNorm, dtype and device.
        hidden_size: Width of the last dimension.
        eps: Added to the variance.
        over_heads: The norm sees this rank's heads and not its share of the sequence.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, over_heads: bool = False
    ) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
        self.eps, self.rms = eps, config.normalization == "RMSNorm"
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.bias = None
        if config.norm_bias and not over_heads:
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device))
        for parameter in self.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel and not over_heads)  # noqa: B010

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gives a tensor of the same shape."""
        if self.rms:
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives the norm of ``x + residual`` and the sum itself."""
        if self.rms:
            return add_rms_norm(x, residual, self.weight, self.eps)
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)
