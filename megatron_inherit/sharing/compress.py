"""Parts of weight matrices: the low-rank factors of a difference, the mask of a pruned matrix.

Quantising and pruning themselves are operations of a plan (``sharing.expand.compressed``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from megatron_inherit.base.errors import ConfigError

if TYPE_CHECKING:
    import torch

Method = Literal["int8", "int4", "2:4"]
METHODS: tuple[Method, ...] = ("int8", "int4", "2:4")


def kept_mask(weight: torch.Tensor) -> torch.Tensor:
    """Marks what a pruned matrix keeps: a bool tensor of its shape, False where it is zero."""
    return weight.detach() != 0


def low_rank(residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the best rank-r factors of a matrix, the singular values split evenly between them.

    Args:
        residual: [out, in].
        rank: From 0 (empty factors) to min(out, in).

    Returns:
        ``up`` [out, rank] and ``down`` [rank, in] in the matrix's dtype; ``up @ down`` has the smallest Frobenius
        error of that rank (Eckart and Young 1936).
    """
    import torch

    most = min(residual.shape)
    if not 0 <= rank <= most:
        raise ConfigError("The rank does not fit the matrix.", got=rank, expected=f"0 to {most}")
    left, values, right = torch.linalg.svd(residual.detach().double(), full_matrices=False)
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    return up.to(residual.dtype).contiguous(), down.to(residual.dtype).contiguous()
