"""Smaller learngenes: weight-only quantisation, 2:4 pruning and low-rank factors, each of one weight matrix at a time.

Every function acts on one [out, in] matrix with statistics of that matrix alone, so that compressing a learngene and
expanding it gives the bits of expanding it and compressing every copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_inherit.base.errors import ConfigError

if TYPE_CHECKING:
    import torch

Method = Literal["int8", "int4", "2:4"]
LEVELS = {"int8": 127, "int4": 7}
GROUP = 4
KEPT = 2


@dataclass(frozen=True)
class Quantised:
    """A matrix as small integers.

    Attributes:
        codes: int8 [out, in], within [-127, 127] or [-7, 7].
        scales: fp32 [out, groups]; a value is its code times the scale of its row and group.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """Gives the values [out, in] that the codes stand for."""
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, self.scales.shape[1], -1).float() * self.scales[:, :, None]
        return grouped.view(rows, columns).to(dtype)

    @property
    def num_bytes(self) -> float:
        """Stored size: int4 codes are counted as half a byte each."""
        bits = 8 if int(self.codes.abs().max()) > LEVELS["int4"] else 4
        return self.codes.numel() * bits / 8 + self.scales.numel() * 4


def quantise(weight: torch.Tensor, method: Method, *, group: int = 0) -> Quantised:
    """Rounds a matrix to symmetric integers with one scale a row, or a group of columns of a row.

    Args:
        weight: [out, in], any floating dtype.
        method: ``int8`` or ``int4``.
        group: Columns that share a scale; 0 takes the whole row.

    Raises:
        ConfigError: The group does not divide the columns.
    """
    import torch

    rows, columns = weight.shape
    width = group or columns
    if columns % width:
        raise ConfigError("The quantisation group does not divide the columns.", got=f"{group} for {columns} columns")
    values = weight.detach().float().view(rows, columns // width, width)
    levels = LEVELS[method]
    scales = values.abs().amax(dim=2) / levels
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (values / safe[:, :, None]).round().clamp(-levels, levels).to(torch.int8)
    return Quantised(codes.view(rows, columns), scales)


def prune_mask(weight: torch.Tensor) -> torch.Tensor:
    """Marks the two largest magnitudes of every four neighbours of a row: the 2:4 pattern of sparse tensor cores.

    Args:
        weight: [out, in] with ``in`` a multiple of four.

    Returns:
        bool [out, in]; of equal magnitudes the first is kept.
    """
    import torch

    rows, columns = weight.shape
    if columns % GROUP:
        raise ConfigError("2:4 pruning needs a number of columns that is a multiple of four.", got=columns)
    groups = weight.detach().abs().float().view(rows, columns // GROUP, GROUP)
    order = torch.sort(groups, dim=2, descending=True, stable=True).indices[:, :, :KEPT]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True)
    return mask.view(rows, columns)


def compress(weight: torch.Tensor, method: Method) -> torch.Tensor:
    """Gives the matrix that the compressed form stands for, in the weight's own dtype.

    Applying it twice changes nothing more; matrices only (norms and biases are left alone by the callers).
    """
    if method == "2:4":
        return weight * prune_mask(weight)
    return quantise(weight, method).dequantise(weight.dtype)


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
