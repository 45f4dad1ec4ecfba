"""Writes cached targets: shard by shard, resumable, by one process or by several that each have a share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_inherit.base import atomic
from megatron_inherit.base.temporary import lock, refuse_second_writer
from megatron_inherit.distill.cache import MANIFEST, Manifest, manifests_of, read_whole, require_equal, shard_path

if TYPE_CHECKING:
    from megatron_inherit.data.loader import Batch
    from megatron_inherit.distill.targets import Targets


@dataclass(frozen=True)
class Share:
    """Which shards one of several writers makes: every ``of``-th, from ``index`` on.

    Attributes:
        index: Of this writer, from 0.
        of: Writers.
    """

    index: int = 0
    of: int = 1

    @property
    def manifest(self) -> str:
        """Name of the file in which this writer keeps what it has made."""
        return MANIFEST if self.of == 1 else f"manifest-{self.index}-of-{self.of}.json"


def write_cache(
    folder: Path,
    wanted: Manifest,
    batch: Callable[[int, int], Batch],
    predict: Callable[[Batch], Targets],
    share: Share = Share(),
) -> Iterator[int]:
    """Writes missing and damaged shards one by one and yields the number of samples of the share done after each.

    Several writers fill one folder side by side, each with its share; a writer of everything then joins what they made.

    Args:
        folder: Output; a cache of the same key that was interrupted is continued.
        wanted: Key and sizes.
        batch: The loader's ``batch(start, count)``.
        predict: Gives the teacher's targets of a batch.
        share: Which shards are this writer's.

    Raises:
        DataError: The folder holds another cache.
        UsageError: Another process writes the same share or everything, or, for a writer of everything, any share.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        _hold(held, folder, share)
        known = _begun(folder, wanted)
        own = {index: digest for index, digest in known.items() if share.of == 1 or index % share.of == share.index}
        done = 0
        for index in range(share.index, wanted.num_shards, share.of):
            start = index * wanted.shard_samples
            count = min(wanted.shard_samples, wanted.num_samples - start)
            done += count
            if index in own and read_whole(shard_path(folder, index), own[index]):
                continue
            own[index] = _write_shard(shard_path(folder, index), predict(batch(start, count)), wanted.key.vocab_size)
            dataclasses.replace(wanted, shards=own).save(folder / share.manifest)
            yield done
        dataclasses.replace(wanted, shards=dict(sorted(own.items()))).save(folder / share.manifest)
        if share.of == 1:
            for path in manifests_of(folder):
                if path.name != MANIFEST:
                    path.unlink()
                    _lock_of(path).unlink(missing_ok=True)


def _hold(held: contextlib.ExitStack, folder: Path, share: Share) -> None:
    """Locks a folder as long as the stack lasts: against all for a writer of everything, else against that one.

    A share is locked besides, against its like.
    """
    several = share.of > 1
    for name, shared in ((MANIFEST, several), *([(share.manifest, False)] if several else [])):
        file = held.enter_context(_lock_of(folder / name).open("a+"))
        if not lock(file, shared=shared):
            raise refuse_second_writer(folder / name)


def _lock_of(manifest: Path) -> Path:
    return manifest.with_name(f".{manifest.stem}.lock")


def _begun(folder: Path, wanted: Manifest) -> dict[int, str]:
    """Gives the hashes of all shards that any writer has made, and refuses a folder of another cache."""
    found: dict[int, str] = {}
    for path in manifests_of(folder):
        manifest = Manifest.load(path)
        require_equal(dataclasses.replace(manifest, shards={}), dataclasses.replace(wanted, shards={}), folder)
        found |= manifest.shards
    return found


def _write_shard(path: Path, targets: Targets, vocab_size: int) -> str:
    import xxhash
    from safetensors.numpy import save

    ids, log_probs = targets
    narrow = np.uint16 if vocab_size <= 1 << 16 else np.int32
    data = save({"ids": ids.astype(narrow), "log_probs": log_probs.astype(np.float16)})
    atomic.write_bytes(path, data)
    return xxhash.xxh3_64_hexdigest(data)
