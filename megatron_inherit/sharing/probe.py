"""Zero-shot losses of candidate placements: which stages to repeat, measured instead of guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from megatron_inherit.arch.tensors import TensorSpec
from megatron_inherit.model.build import build_single
from megatron_inherit.model.load import load_chunk, to_torch
from megatron_inherit.sharing.expand import use_layers
from megatron_inherit.sharing.learngene import require_plan

if TYPE_CHECKING:
    import numpy

    from megatron_inherit.checkpoint.stream import Source

Placement = tuple[int, ...]


def probe_placements(
    learngene: Source,
    placements: Iterable[Placement],
    tokens: numpy.ndarray,
    *,
    batch: int = 8,
    progress: Callable[[Placement, float], None] | None = None,
) -> dict[Placement, float]:
    """Scores descendants that were never trained on a few fixed windows.

    Args:
        learngene: A learngene, or the training checkpoint of an auxiliary.
        placements: The stage of each layer; all of one depth.
        tokens: int64 [windows, sequence + 1]; all but the first of each are predicted.
        batch: Windows of one forward pass.
        progress: Told each result.

    Returns:
        Mean next-token loss in nats by placement.
    """
    plan = require_plan(learngene)
    losses: dict[Placement, float] = {}
    model = None
    for placement in placements:
        if model is None:
            model = build_single(learngene.config.with_layers(len(placement))).eval()
        load_chunk(model, _reader(learngene, use_layers(plan, placement)))
        losses[placement] = _mean_loss(model, tokens, batch)
        if progress is not None:
            progress(placement, losses[placement])
    return losses


def _reader(source: Source, layers: list[int]) -> Callable[[TensorSpec, tuple[slice, ...]], torch.Tensor]:
    def read(spec: TensorSpec, box: tuple[slice, ...]) -> torch.Tensor:
        name = spec.name
        if spec.layer is not None:
            name = name.replace(f"layers.{spec.layer}.", f"layers.{layers[spec.layer]}.", 1)
        return to_torch(source.read(name, box))

    return read


@torch.no_grad()
def _mean_loss(model: torch.nn.Module, tokens: numpy.ndarray, batch: int) -> float:
    device = next(model.parameters()).device
    windows = torch.from_numpy(tokens).to(device)
    total = sum(float(model(rows[:, :-1], labels=rows[:, 1:]).double()) for rows in windows.split(batch))
    return total / (windows.size(0) * (windows.size(1) - 1))
