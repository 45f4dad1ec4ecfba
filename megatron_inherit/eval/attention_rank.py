"""Attention collapse: rank, mass and sink of every head, as defined by Sanyal et al. (arXiv 2404.08634, version 4).

For a head's causal attention A [T, T] after the softmax, with singular values s_1 >= s_2 >= ...:
rank k* = min {k : sum_{i<=k} s_i^2 >= tau sum s_i^2}; mass m* = number of columns, largest first, whose squared norms
make eta of the whole; sink = mean attention to the first token. A head's figure is the mean over sequences;
MaxRank of a block is the maximum over its heads, AvgMass the mean. A block is lazy where its MaxRank is 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_inherit.base.errors import UsageError
from megatron_inherit.eval.blocks import watch_attention
from megatron_inherit.eval.calibration import sample_windows
from megatron_inherit.eval.hf_folder import as_hf_folder, load_model, load_tokenizer

if TYPE_CHECKING:
    import torch

TAU = ETA = 0.9
NEAR_ONE = 1.5


@dataclass(frozen=True)
class AttentionReport:
    """Figures of every head, outermost list by block.

    Attributes:
        rank, mass, sink: [blocks][heads], means over the sequences.
        max_rank, avg_mass: [blocks].
        lazy: Blocks whose MaxRank is 1.
        near_rank_one: Share of all heads with rank below 1.5.
    """

    checkpoint: str
    sequences: int
    tokens: int
    tau: float
    eta: float
    rank: list[list[float]]
    mass: list[list[float]]
    sink: list[list[float]]

    @property
    def max_rank(self) -> list[float]:
        """Largest rank of a head, a block."""
        return [max(heads) for heads in self.rank]

    @property
    def avg_mass(self) -> list[float]:
        """Mean mass of the heads, a block."""
        return [sum(heads) / len(heads) for heads in self.mass]

    def to_json(self) -> dict[str, Any]:
        """Gives plain values, the derived figures included."""
        heads = [rank for block in self.rank for rank in block]
        return {
            "kind": "attention",
            **asdict(self),
            "max_rank": self.max_rank,
            "avg_mass": self.avg_mass,
            "lazy": [block for block, rank in enumerate(self.max_rank) if rank == 1],
            "near_rank_one": sum(rank < NEAR_ONE for rank in heads) / len(heads),
        }


def approximate_rank(maps: torch.Tensor, tau: float = TAU) -> torch.Tensor:
    """Counts the singular values that hold ``tau`` of the energy.

    Args:
        maps: [..., T, T].
        tau: Share, in (0, 1].

    Returns:
        int64 [...], each at least 1.
    """
    import torch

    energy = torch.linalg.svdvals(maps.float()).double() ** 2
    return _smallest_share(energy, tau)


def mass(maps: torch.Tensor, eta: float = ETA) -> torch.Tensor:
    """Counts the columns, those with the largest norms first, that hold ``eta`` of the squared Frobenius norm.

    Args:
        maps: [..., T, T].
        eta: Share, in (0, 1].

    Returns:
        int64 [...], each at least 1.
    """
    import torch

    columns = (maps.double() ** 2).sum(dim=-2)
    return _smallest_share(torch.sort(columns, dim=-1, descending=True).values, eta)


def sink(maps: torch.Tensor) -> torch.Tensor:
    """Gives the mean attention paid to the first token, [...]."""
    return maps[..., 0].double().mean(dim=-1)


def _smallest_share(parts: torch.Tensor, share: float) -> torch.Tensor:
    """Counts the first parts [..., n], descending, that make a share of their sum."""
    import torch

    reached = parts.cumsum(dim=-1) >= share * parts.sum(dim=-1, keepdim=True) * (1 - 1e-12)
    return torch.where(reached.any(dim=-1), reached.int().argmax(dim=-1), parts.shape[-1] - 1) + 1


def measure_attention(
    checkpoint: Path | str,
    *,
    text: Path | str | None = None,
    sequences: int = 100,
    tokens: int = 100,
    tau: float = TAU,
    eta: float = ETA,
    batch: int = 10,
    device: str = "cpu",
) -> AttentionReport:
    """Measures every head; at any time the maps of one block and one batch are in memory.

    Args:
        checkpoint: Of any format, or a run folder.
        text: Where the sequences come from; see ``sample_windows``.
        sequences: Number of sequences; the paper takes 100.
        tokens: Length of each; the paper takes 100. Fewer where the model takes fewer.
        tau: Share of energy that defines the rank.
        eta: Share of energy that defines the mass.
        batch: Sequences at a time.
        device: ``cpu`` or ``cuda``.

    Raises:
        UsageError: A number is out of range.
        CheckpointError: The model gives no attention maps.
        DataError: The text is too short.
    """
    import torch

    if not (0 < tau <= 1 and 0 < eta <= 1):
        raise UsageError("Shares of energy lie in (0, 1].", got=f"tau {tau}, eta {eta}")
    with as_hf_folder(checkpoint) as folder:
        model = load_model(folder, device=device, attn_implementation="eager")
        tokens = min(tokens, model.config.max_position_embeddings)
        windows = sample_windows(load_tokenizer(folder), text, sequences=sequences, tokens=tokens)
    depth, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    sums = torch.zeros(3, depth, heads, dtype=torch.float64)

    def see(block: int, maps: torch.Tensor) -> None:
        figures = (approximate_rank(maps, tau), mass(maps, eta), sink(maps))
        sums[:, block] += torch.stack([figure.double().sum(dim=0).cpu() for figure in figures])

    with torch.no_grad(), watch_attention(model, see):
        for chunk in windows.split(batch):
            model(chunk.to(device), use_cache=False, logits_to_keep=1)
    rank, width, share = (sums / len(windows)).tolist()
    return AttentionReport(str(checkpoint), sequences, tokens, tau, eta, rank, width, share)
