"""The contract between the training loop and an engine: what a step takes and gives, and how state leaves and enters.

The loop knows no engine; an engine knows no recipe, no file and no schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from megatron_inherit.arch.model_config import ModelConfig
    from megatron_inherit.data.loader import Batch


@dataclass(frozen=True)
class Topology:
    """Where this process stands.

    Attributes:
        rank, world_size: Of all processes.
        data_rank, data_size: Of the replicas that get different samples; equal on all ranks of one model replica.
    """

    rank: int
    world_size: int
    data_rank: int
    data_size: int


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, the same on every rank.

    Attributes:
        loss: Mean next-token loss in nats over the unmasked tokens of the global batch, before the update.
        grad_norm: L2 norm of the whole gradient before clipping.
        tokens: Unmasked tokens of the global batch.
        skipped: The gradient was not finite, no rank changed a weight or an optimizer state.
    """

    loss: float
    grad_norm: float
    tokens: int
    skipped: bool = False


@dataclass(frozen=True)
class Part:
    """A piece of one tensor of the training state that this rank alone writes.

    A part is the box ``[start, start + shape)`` of the canonical tensor of ``global_shape``, or, where ``flat`` is set,
    the elements ``[flat[0], flat[1])`` of that box in row-major order (ZeRO and the distributed optimizer cut so).

    Attributes:
        name: Canonical tensor name.
        kind: ``weight`` (training dtype), ``fp32`` (master weight), ``exp_avg`` or ``exp_avg_sq``.
        tensor: The values on any device, shaped ``shape``, or one-dimensional where ``flat`` is set.
    """

    name: str
    kind: str
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    tensor: torch.Tensor
    flat: tuple[int, int] | None = None


ReadPart = Callable[[str, str, "tuple[slice, ...]"], "torch.Tensor"]
"""Reads a box of a stored tensor: canonical name, kind, a slice a dimension; raises CheckpointError if absent."""


class Engine(Protocol):
    """A model with its optimizer on this process's device."""

    topology: Topology
    config: ModelConfig

    def train_step(self, micro_batches: Sequence[Batch], *, lr: float) -> StepResult:
        """Runs one optimizer step on this replica's micro-batches of the global batch."""
        ...

    def sequence_losses(self, batch: Batch) -> tuple[list[float], list[int]]:
        """Sums the loss and counts the unmasked tokens of each sequence, without gradient, in evaluation mode.

        Every replica passes its own sequences and gets the figures of those.
        """
        ...

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Gives fp32 logits [batch, sequence, vocab_size] of int64 tokens [batch, sequence]; no padding columns."""
        ...

    def parts(self) -> Iterator[Part]:
        """Yields this rank's share of the weights and optimizer state; all ranks together cover each element once."""
        ...

    def step_count(self) -> int:
        """Tells how many updates the optimizer has applied."""
        ...

    def restore(self, read: ReadPart, *, step_count: int) -> None:
        """Sets weights and optimizer state from a stored state, whatever layout wrote it."""
        ...

    def reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Adds values over the replicas, in float64, the same bits on every rank."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Tells whether the flag is set on any rank."""
        ...

    def weight_hash(self) -> str:
        """Hashes this rank's weights; equal on replicas that must hold equal weights."""
        ...

    def barrier(self) -> None:
        """Waits for all ranks."""
        ...

    def close(self) -> None:
        """Leaves the process groups, after a barrier."""
        ...
