"""Batches of the loader as the tensors that the model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_inherit.data.loader import Batch
from megatron_inherit.model.language_model import IGNORED


def model_inputs(batch: Batch, device: torch.device) -> dict[str, torch.Tensor | None]:
    """Gives the keyword arguments of ``LanguageModel.forward`` for a batch, uncounted labels marked."""

    def move(array: np.ndarray | None) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    return {
        "tokens": move(batch.tokens),
        "labels": move(np.where(batch.loss_mask, batch.labels, IGNORED)),
        "position_ids": move(batch.position_ids),
        "segment_ids": move(batch.segment_ids),
    }


def count_tokens(micro_batches: Sequence[Batch]) -> int:
    """Counts the tokens whose loss counts."""
    return sum(int(np.count_nonzero(batch.loss_mask)) for batch in micro_batches)


def equal_micro_batches(batch: Batch, size: int, multiple: int) -> list[Batch]:
    """Cuts a batch into equal micro-batches, a multiple of ``multiple`` of them, repeating sequences at the end.

    A pipeline sends messages of one shape, so that the last micro-batch may not be smaller.
    """
    size = min(size, len(batch))
    count = -(-len(batch) // size)
    count = -(-count // multiple) * multiple
    whole = _take(batch, np.arange(count * size) % len(batch))
    return [whole.select(start, start + size) for start in range(0, count * size, size)]


def _take(batch: Batch, order: np.ndarray) -> Batch:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    taken: dict[str, Any] = {name: None if value is None else value[order] for name, value in fields.items()}
    return Batch(**taken)
