"""Cached targets of a teacher: for each token of each sample the k most probable next tokens, in hashed shards.

The rest of the probability is not stored; the loss holds it as one ghost token. A cache belongs to one teacher, one
data order and one temperature, and the manifest says which.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megatron_inherit.base import atomic
from megatron_inherit.base.errors import DataError
from megatron_inherit.distill.targets import Targets

if TYPE_CHECKING:
    import xxhash

    from megatron_inherit.checkpoint.stream import Source
    from megatron_inherit.data.loader import Loader

Method = Literal["top", "draw"]
MANIFEST = "manifest.json"
VERSION = 3
SAMPLED = 32
"""Largest edge of the boxes whose values identify a teacher's tensor."""


@dataclass(frozen=True)
class CacheKey:
    """What the targets depend on; all of it must be equal when they are used.

    Attributes:
        teacher: Fingerprint of the teacher's checkpoint.
        tokenizer: Fingerprint of the tokenizer, or empty where the data has none.
        data: The loader's fingerprint: data, seed and options, hence the order.
        temperature: Divides the teacher's logits.
        sequence_length: Tokens of a sample.
        vocab_size: Of the teacher.
    """

    teacher: str
    tokenizer: str
    data: str
    temperature: float
    sequence_length: int
    vocab_size: int


def cache_key(teacher: Source, loader: Loader, *, temperature: float) -> CacheKey:
    """Gives what the targets of a teacher on a loader's samples depend on."""
    tokenizer = loader.stream.tokenizer
    return CacheKey(
        teacher=teacher_fingerprint(teacher),
        tokenizer="" if tokenizer is None else tokenizer.fingerprint,
        data=loader.fingerprint,
        temperature=temperature,
        sequence_length=loader.sequence_length,
        vocab_size=teacher.config.vocab_size,
    )


def teacher_fingerprint(source: Source) -> str:
    """Hashes what identifies a teacher: headers, index and configuration, and three boxes of values of each tensor.

    Checkpoints of one shape, as a base model and its tuned ones, or steps of one run, differ in their values alone.
    """
    import xxhash

    state = xxhash.xxh3_128()
    for name in sorted(source.identity):
        state.update(f"{name}={source.identity[name]}\n".encode())
    hash_values(source, state)
    return state.hexdigest()


def hash_values(source: Source, state: xxhash.xxh3_128) -> None:
    """Takes three boxes of values of each tensor of a checkpoint into a hash."""
    for name, stored in source.tensors.items():
        state.update(f"{name}\n".encode())
        for place in range(3):
            box = tuple(_piece(size, place) for size in stored.shape)
            state.update(source.read(name, box).data.tobytes())


def _piece(size: int, place: int) -> slice:
    """Gives the first, the middle or the last elements of a dimension."""
    low = max(0, size - SAMPLED) * place // 2
    return slice(low, min(size, low + SAMPLED))


@dataclass(frozen=True)
class Manifest:
    """A cache folder's manifest.

    Attributes:
        key: What the targets depend on.
        method: ``top`` keeps the most probable tokens, ``draw`` random ones with their share of the draws.
        entries: Stored tokens for each token of a sample.
        num_samples: Samples [0, num_samples) when complete.
        shard_samples: Samples of a shard.
        dtype: In which the teacher ran.
        seed: Of the draws.
        shards: xxh3 of each finished shard.
    """

    key: CacheKey
    method: Method
    entries: int
    num_samples: int
    shard_samples: int
    dtype: str = "fp32"
    seed: int = 0
    shards: Mapping[int, str] = field(default_factory=dict)

    @property
    def num_shards(self) -> int:
        """Shards of the complete cache."""
        return -(-self.num_samples // self.shard_samples)

    @property
    def complete(self) -> bool:
        """Tells whether all shards were written."""
        return len(self.shards) == self.num_shards

    def save(self, path: Path) -> None:
        """Writes the manifest in one step."""
        atomic.write_json(path, {"version": VERSION, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Reads a manifest.

        Raises:
            DataError: It is damaged or of another version.
        """
        try:
            value: dict[str, Any] = json.loads(path.read_text())
            if value.pop("version", None) != VERSION:
                raise DataError(f"{path} is of another version.", fix="Make the cache again.")
            shards = {int(index): digest for index, digest in value["shards"].items()}
            return cls(**(value | {"key": CacheKey(**value["key"]), "shards": shards}))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise DataError(f"{path} is damaged, or of something else.", fix="Make the cache again.") from None


def shard_path(folder: Path, index: int) -> Path:
    """Names a shard's file."""
    return Path(folder) / f"targets-{index:06d}.safetensors"


def manifests_of(folder: Path) -> list[Path]:
    """Lists the manifests of a folder: the whole cache's, and those of shares that nobody has joined."""
    return sorted(folder.glob("manifest*.json"))


def read_whole(path: Path, digest: str) -> bytes:
    """Reads a shard; gives nothing where it is not there or not what was written."""
    import xxhash

    data = path.read_bytes() if path.is_file() else b""
    return data if xxhash.xxh3_64_hexdigest(data) == digest else b""


def require_equal(got: Manifest, wanted: Manifest, folder: Path) -> None:
    """Raises DataError, and names it, where a cache differs from what is wanted of it."""
    pairs = {**dataclasses.asdict(wanted), **dataclasses.asdict(wanted.key)}
    found = {**dataclasses.asdict(got), **dataclasses.asdict(got.key)}
    for name, value in pairs.items():
        if name != "key" and found[name] != value:
            raise DataError(
                f"The cached targets in {folder} belong to another {name.replace('_', ' ')}.",
                got=found[name],
                expected=value,
                fix="Use the teacher, data and temperature they were made with, or make them again.",
            )


class CachedTargets:
    """Reads targets by global sample index; each shard's hash is checked when it is first opened.

    Args:
        folder: A complete cache.
        key: What this run has; must equal the cache's.

    Raises:
        DataError: The cache is incomplete, or is of another teacher, tokenizer, data order or temperature.
    """

    def __init__(self, folder: Path, key: CacheKey) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            shares = len(manifests_of(self.folder))
            raise DataError(
                f"{folder} holds no cached targets{f', but {shares} shares of some' if shares else ''}.",
                fix="Make them with 'minherit share cache'; without --share it joins shares.",
            )
        self.manifest = Manifest.load(self.folder / MANIFEST)
        require_equal(self.manifest, dataclasses.replace(self.manifest, key=key), self.folder)
        if not self.manifest.complete:
            raise DataError(
                f"The cached targets in {folder} are not complete.",
                got=f"{len(self.manifest.shards)} of {self.manifest.num_shards} shards",
                fix="Run the same 'minherit share cache' again: it goes on where it stopped.",
            )
        for index in range(self.manifest.num_shards):
            if not shard_path(self.folder, index).is_file():
                raise _damaged(shard_path(self.folder, index))
        self._open: dict[int, dict[str, np.ndarray]] = {}

    def require(self, samples: int) -> None:
        """Raises DataError unless the first so many samples are in the cache."""
        if samples > self.manifest.num_samples:
            raise DataError(
                f"The cached targets in {self.folder} end at sample {self.manifest.num_samples}.",
                got=f"{samples} samples of this run",
                fix="Cache as many samples as the run takes, or shorten the run.",
            )

    def read(self, sample_ids: np.ndarray) -> Targets:
        """Gives ids int64 and log-probabilities float32, both [samples, sequence, k]."""
        self.require(int(sample_ids.max()) + 1)
        rows = [divmod(int(index), self.manifest.shard_samples) for index in sample_ids]
        ids = np.stack([self._shard(shard)["ids"][row] for shard, row in rows]).astype(np.int64)
        return ids, np.stack([self._shard(shard)["log_probs"][row] for shard, row in rows]).astype(np.float32)

    def _shard(self, index: int) -> dict[str, np.ndarray]:
        if index not in self._open:
            from safetensors.numpy import load

            path = shard_path(self.folder, index)
            data = read_whole(path, self.manifest.shards[index])
            if not data:
                raise _damaged(path)
            while len(self._open) >= 2:
                self._open.pop(next(iter(self._open)))
            self._open[index] = load(data)
        return self._open[index]


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is missing or damaged.", fix="Run the same 'minherit share cache' again.")
