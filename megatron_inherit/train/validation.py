"""The loss over fixed windows, shared out over the replicas; the same bits whatever their number."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from megatron_inherit.data.loader import Batch

if TYPE_CHECKING:
    from megatron_inherit.data.windows import EvalWindows
    from megatron_inherit.engines.base import Engine


def window_losses(
    engine: Engine, windows: EvalWindows, *, micro_batch: int, beat: Callable[[], None] | None = None
) -> tuple[list[float], list[int]]:
    """Gives every window's summed loss in nats and its predicted tokens, on every rank.

    Each replica scores every ``data_size``-th batch; a replica without a batch of its own runs along on a masked one,
    since the ranks of some engines must run forward passes together.
    """
    total, place = len(windows), engine.topology
    sums = np.zeros((2, total))
    for first in range(0, total, micro_batch * place.data_size):
        if beat is not None:
            beat()
        start = first + micro_batch * place.data_rank
        count = max(0, min(micro_batch, total - start))
        batch = _filled(windows.batch(start if count else 0, count or 1), micro_batch, masked=not count)
        losses, counts = engine.sequence_losses(batch)
        sums[0, start : start + count] = losses[:count]
        sums[1, start : start + count] = counts[:count]
    added = engine.reduce_sum(sums.reshape(-1).tolist())
    return added[:total], [int(count) for count in added[total:]]


def _filled(batch: Batch, size: int, *, masked: bool) -> Batch:
    """Brings a batch to its full size by repeating its last window without loss."""
    index = np.minimum(np.arange(size), len(batch) - 1)
    mask = batch.loss_mask[index].copy()
    mask[0 if masked else len(batch) :] = False
    return Batch(batch.tokens[index], batch.labels[index], mask, batch.sample_ids[index])
