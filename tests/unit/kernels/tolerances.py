"""Largest error of each operation against float64, relative to the largest magnitude of the tensor compared.

bfloat16 keeps 8 bits: half a unit in the last place is 2^-9 = 0.002. An operation that rounds an intermediate (the sum
of the residual, the chunk of logits) has that on top.
"""

from __future__ import annotations

import torch

TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    "norm": {torch.float32: 2e-6, torch.bfloat16: 4e-3},
    "add_norm": {torch.float32: 2e-6, torch.bfloat16: 1.2e-2},
    "rope": {torch.float32: 1e-6, torch.bfloat16: 4e-3},
    "activation": {torch.float32: 2e-6, torch.bfloat16: 4e-3},
    "linear_cross_entropy": {torch.float32: 5e-6, torch.bfloat16: 1.5e-2},
    "linear_kl": {torch.float32: 2e-5, torch.bfloat16: 3e-2},
}


def check(operation: str, dtype: torch.dtype, errors: dict[str, float]) -> None:
    """Fails with every error that exceeds its row."""
    limit = TOLERANCES[operation][dtype]
    beyond = {name: error for name, error in errors.items() if not error <= limit}
    assert not beyond, f"{operation} in {dtype}: {beyond} exceed {limit}"
