"""The contract between the training loop and an engine: what a step takes and gives, and how state leaves and enters.

The loop knows no engine; an engine knows no recipe, no file and no schedule. ``engines/create.py:create_engine`` makes
one of two kinds from ``EngineOptions``; ``engines/check.py:check_options`` says first whether the options can work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from megatron_inherit.arch.model_config import ModelConfig
    from megatron_inherit.data.loader import Batch
    from megatron_inherit.distill.options import Distill
    from megatron_inherit.model.load import Reader
    from megatron_inherit.sharing.options import Sharing
    from megatron_inherit.sharing.regularise import SoftTie


EngineKind = Literal["deepspeed", "megatron"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a model is spread over processes, stored, stepped and recomputed; the same fields for both engines.

    Attributes:
        tp, pp, vpp, cp: Tensor, pipeline, virtual pipeline (chunks a stage) and context parallel sizes.
        sequence_parallel: Splits activations between the tensor parallel regions along the sequence too.
        first_stage_layers, last_stage_layers: Blocks of the first and last pipeline stage where they are to differ.
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3.
        distributed_optimizer: Megatron's sharding of masters and moments over the replicas.
        micro_batch: Sequences of one forward pass on one replica.
        dtype: Of weights and activations; ``bf16`` keeps fp32 masters and sums gradients in fp32.
        recompute: Activations computed anew in the backward pass: of no block, of the MLPs (``selective``) or of whole
            blocks (``full``).
        betas, eps, weight_decay: Of AdamW; norms, biases and embeddings are not decayed.
        clip: Largest L2 norm of the whole gradient; 0 leaves it as it is.
        overlap_grad_reduce, overlap_param_gather: Hides communication behind computation.
        offload: What DeepSpeed keeps in host memory.
        nvme_path: Folder in which it keeps the optimizer state instead, or empty.
        aio: How it reads and writes there, DeepSpeed's ``aio`` settings.
        deterministic: The same bits in every run, at some cost on a GPU.
        timeout_s: Seconds after which a collective that hangs raises.
        sharing: Which layers apply the same weights, or None; then a pipeline is cut between them.
        soft_tie: Pulls layers that belong together towards their mean, or None.
        keep_zeros: Weights of the blocks' matrices that are zero at the start stay so (a pruned learngene's mask).
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    zero_stage: int = 1
    distributed_optimizer: bool = False
    micro_batch: int = 1
    dtype: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    offload: Literal["none", "optimizer", "all"] = "none"
    nvme_path: str = ""
    aio: Mapping[str, int | bool] = field(default_factory=dict)
    deterministic: bool = False
    timeout_s: float = 600.0
    sharing: Sharing | None = None
    soft_tie: SoftTie | None = None
    keep_zeros: bool = False

    def data_size(self, world_size: int) -> int:
        """Gives the number of model replicas among ``world_size`` processes."""
        return world_size // (self.tp * self.pp * self.cp)


@dataclass(frozen=True)
class Topology:
    """Where this process stands.

    Attributes:
        rank, world_size: Of all processes.
        data_rank, data_size: Of the replicas that get different samples; equal on all ranks of one model replica.
        model_rank: Which part of the model this rank holds; ranks of equal ``model_rank`` must hold equal weights.
    """

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    model_rank: int = 0


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, the same on every rank but for its seconds.

    Attributes:
        loss: Mean next-token loss in nats over the unmasked tokens of the global batch, before the update; with a
            teacher, what the distillation minimises instead, hidden states left out.
        grad_norm: L2 norm of the whole gradient before clipping.
        tokens: Unmasked tokens of the global batch.
        skipped: The gradient was not finite, no rank changed a weight or an optimizer state.
        forward_seconds: What this rank's own passes through the model took on its host, backward passes left out.
    """

    loss: float
    grad_norm: float
    tokens: int
    skipped: bool = False
    forward_seconds: float = field(default=0.0, compare=False)


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
"""Reads a box of a stored tensor: canonical name, kind, a slice a dimension; raises AbsentError if there is none."""


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
        """Yields this rank's share of the weights and optimizer state; all ranks together cover each element once.

        Kinds: ``weight`` always; ``fp32`` in bf16 training only; the moments once an update was applied.
        """
        ...

    def step_count(self) -> int:
        """Tells how many updates the optimizer has applied."""
        ...

    def restore(self, read: ReadPart, *, step_count: int) -> None:
        """Sets weights and optimizer state from a stored state, whatever layout or engine wrote it.

        Reads ``fp32`` where it is stored, else ``weight``; reads the moments unless ``step_count`` is 0.
        """
        ...

    def reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Adds values over the replicas, in float64, the same bits on every rank."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Tells whether the flag is set on any rank."""
        ...

    def gather_text(self, text: str) -> list[str]:
        """Gives every rank's text on every rank, in order of ranks."""
        ...

    def weight_hash(self) -> str:
        """Hashes this rank's weights; equal on ranks of equal ``topology.model_rank``.

        Under ZeRO-3 no rank holds whole weights, so that there is nothing to compare: a constant comes back.
        """
        ...

    def rebuild(self, options: EngineOptions, read: Reader, distill: Distill | None = None) -> None:
        """Makes the engine anew in its place, with other options, from values that ``read`` gives."""
        ...

    def barrier(self) -> None:
        """Waits for all ranks."""
        ...

    def close(self) -> None:
        """Leaves the process groups, after a barrier."""
        ...
