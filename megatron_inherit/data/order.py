"""Which windows each step and replica reads, for a look at the order without reading the data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_inherit.base.errors import DataError
from megatron_inherit.data.loader import Loader
from megatron_inherit.data.manifests import ManifestModel


class OrderRow(ManifestModel):
    """What one replica reads in one step: global sample indices, their epochs and their windows of the stream."""

    step: int
    replica: int
    samples: list[int]
    epochs: list[int]
    windows: list[int]


def replica_samples(step: int, *, global_batch: int, replica: int, world: int) -> range:
    """Gives the global sample indices of a replica: a contiguous part of the step's ``global_batch`` samples.

    Raises:
        DataError: The global batch does not divide by the number of replicas.
    """
    if global_batch % world:
        raise DataError(f"A global batch of {global_batch} does not divide among {world} replicas.")
    share = global_batch // world
    start = step * global_batch + replica * share
    return range(start, start + share)


def steps_of_order(loader: Loader, steps: range, *, global_batch: int, world: int) -> Iterator[OrderRow]:
    """Yields a row for each step and replica.

    Raises:
        DataError: The steps lie beyond the epochs, or the batch does not divide.
    """
    for step in steps:
        for replica in range(world):
            samples = replica_samples(step, global_batch=global_batch, replica=replica, world=world)
            loader.require(samples.stop)
            ids = np.arange(samples.start, samples.stop)
            yield OrderRow(
                step=step,
                replica=replica,
                samples=ids.tolist(),
                epochs=(ids // loader.samples_per_epoch).tolist(),
                windows=loader.windows(ids).tolist(),
            )
