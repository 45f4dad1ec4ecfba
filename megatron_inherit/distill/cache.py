"""Cached targets of a teacher: for each token of each sample the k most probable next tokens, in hashed shards.

The rest of the probability is not stored; the loss holds it as one ghost token. A cache belongs to one teacher, one
data order and one temperature, and the manifest says which.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megatron_inherit.base import atomic
from megatron_inherit.base.errors import DataError
from megatron_inherit.base.temporary import lock, refuse_second_writer

if TYPE_CHECKING:
    import torch
    import xxhash

    from megatron_inherit.checkpoint.stream import Source
    from megatron_inherit.data.loader import Batch, Loader

Method = Literal["top", "draw"]
MANIFEST = "manifest.json"
VERSION = 3
UNDRAWN = -30.0
"""Log-probability stored for a place that no draw filled: too little to matter, and finite."""
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
        shards: xxh3 of each finished shard.
    """

    key: CacheKey
    method: Method
    entries: int
    num_samples: int
    shard_samples: int
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


Targets = tuple[np.ndarray, np.ndarray]
"""ids int and log-probabilities float, both [samples, sequence, entries]."""


def top_targets(logits: torch.Tensor, entries: int, *, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the most probable tokens, most probable first.

    Args:
        logits: [..., V] of the teacher.
        entries: How many.
        temperature: Divides the logits.

    Returns:
        ids int64 and log-probabilities, both [..., entries].
    """
    import torch

    wide = logits if logits.dtype == torch.float64 else logits.float()
    found = torch.log_softmax(wide / temperature, dim=-1).topk(entries, dim=-1)
    return found.indices, found.values


def draw_targets(
    logits: torch.Tensor, entries: int, *, temperature: float, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws tokens with replacement; those that come up twice share one place, so that some places stay empty.

    The gradient of the divergence from the draws' shares is that of the full forward KL on average, which the most
    probable tokens alone, renormalised, would not give.

    Args:
        logits: [rows, V] of the teacher.
        entries: Draws a row.
        temperature: Divides the logits.
        generator: Where the randomness comes from.

    Returns:
        ids int64, no id twice in a row, and the logarithms of their shares, both [rows, entries].
    """
    import torch

    wide = logits if logits.dtype == torch.float64 else logits.float()
    p = torch.softmax(wide / temperature, dim=-1)
    draws = torch.multinomial(p, entries, replacement=True, generator=generator)
    counts = torch.zeros_like(p).scatter_add_(-1, draws, torch.ones_like(draws, dtype=p.dtype))
    found = counts.topk(entries, dim=-1)
    shares = (found.values / entries).log()
    return found.indices, shares.clamp(min=UNDRAWN)


def ghost_of(log_probs: torch.Tensor) -> torch.Tensor:
    """Gives the logarithm of the probability outside the stored tokens, [...] for [..., entries]."""
    import torch

    inside = log_probs.exp().sum(dim=-1)
    return torch.log1p(-inside.clamp(max=1.0))


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
            if index in own and _read_whole(shard_path(folder, index), own[index]):
                continue
            own[index] = _write_shard(shard_path(folder, index), predict(batch(start, count)), wanted.key.vocab_size)
            dataclasses.replace(wanted, shards=own).save(folder / share.manifest)
            yield done
        dataclasses.replace(wanted, shards=dict(sorted(own.items()))).save(folder / share.manifest)
        if share.of == 1:
            for path in _manifests(folder):
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


def _manifests(folder: Path) -> list[Path]:
    return sorted(folder.glob("manifest*.json"))


def _begun(folder: Path, wanted: Manifest) -> dict[int, str]:
    """Gives the hashes of all shards that any writer has made, and refuses a folder of another cache."""
    found: dict[int, str] = {}
    for path in _manifests(folder):
        manifest = Manifest.load(path)
        _require_equal(dataclasses.replace(manifest, shards={}), dataclasses.replace(wanted, shards={}), folder)
        found |= manifest.shards
    return found


def _read_whole(path: Path, digest: str) -> bytes:
    """Reads a shard; gives nothing where it is not there or not what was written."""
    import xxhash

    data = path.read_bytes() if path.is_file() else b""
    return data if xxhash.xxh3_64_hexdigest(data) == digest else b""


def _write_shard(path: Path, targets: Targets, vocab_size: int) -> str:
    import xxhash
    from safetensors.numpy import save

    ids, log_probs = targets
    narrow = np.uint16 if vocab_size <= 1 << 16 else np.int32
    data = save({"ids": ids.astype(narrow), "log_probs": log_probs.astype(np.float16)})
    atomic.write_bytes(path, data)
    return xxhash.xxh3_64_hexdigest(data)


def _require_equal(got: Manifest, wanted: Manifest, folder: Path) -> None:
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
            shares = len(_manifests(self.folder))
            raise DataError(
                f"{folder} holds no cached targets{f', but {shares} shares of some' if shares else ''}.",
                fix="Make them with 'minherit share cache'; without --share it joins shares.",
            )
        self.manifest = Manifest.load(self.folder / MANIFEST)
        _require_equal(self.manifest, dataclasses.replace(self.manifest, key=key), self.folder)
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
            data = _read_whole(path, self.manifest.shards[index])
            if not data:
                raise _damaged(path)
            while len(self._open) >= 2:
                self._open.pop(next(iter(self._open)))
            self._open[index] = load(data)
        return self._open[index]


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is missing or damaged.", fix="Run the same 'minherit share cache' again.")
