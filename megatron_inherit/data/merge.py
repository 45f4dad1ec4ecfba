"""Shards of tokens to one ``.bin/.idx`` pair a domain, as Megatron's own data options name them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_inherit.base.atomic import require_space
from megatron_inherit.base.temporary import sweep
from megatron_inherit.data.indexed import IndexedFile, IndexedWriter, bin_path, idx_path
from megatron_inherit.data.manifests import MANIFEST, TokensManifest


def merge_domains(folder: str | Path, prefixes: dict[str, Path]) -> None:
    """Copies the shards of domains into one pair each, in the order of their names.

    Args:
        folder: Folder of tokens.
        prefixes: Domain to the prefix of its pair.

    Raises:
        DataError: The folder is damaged.
        DiskError: There is no room.
        UsageError: Another job is writing to one of the prefixes.
    """
    folder = Path(folder)
    manifest = TokensManifest.load(folder / MANIFEST)
    for domain, prefix in prefixes.items():
        shards = [shard for shard in manifest.shards if shard.domain == domain]
        sweep(bin_path(prefix))
        sweep(idx_path(prefix))
        require_space(prefix, sum(file.size for shard in shards for file in shard.files.values()))
        with IndexedWriter(prefix, np.dtype(shards[0].dtype)) as writer:
            for shard in shards:
                writer.add_indexed(IndexedFile(folder / shard.name))
