"""What is in a folder of text, of tokens, in a subset or a ``.bin/.idx`` pair: counts, lengths, duplicates, samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_inherit.base.errors import DataError
from megatron_inherit.data.corpus import open_corpus
from megatron_inherit.data.ingest import DocumentsManifest, open_documents
from megatron_inherit.data.loader import LoaderOptions, open_loader
from megatron_inherit.data.manifests import (
    MANIFEST,
    DomainRecord,
    ManifestModel,
    ShardRecord,
    SubsetManifest,
    TokenizerRecord,
    kind_of,
)
from megatron_inherit.data.opening import open_stream
from megatron_inherit.data.packing import Boundary
from megatron_inherit.data.tokenizer import Tokenizer, open_tokenizer

_CHUNK = 1 << 20
_SORTED_AT_ONCE = 1 << 24


class DomainSummary(ManifestModel):
    """Counts of one domain; ``text_bytes`` and ``share`` are None where they are unknown."""

    name: str
    documents: int
    tokens: int | None
    text_bytes: int | None
    share: float | None
    weight: float | None = None
    unique_tokens: int | None = None


class Summary(ManifestModel):
    """What :func:`inspect_data` found.

    Attributes:
        kind: ``documents``, ``tokens``, ``subset`` or ``prefix``.
        split: Of a subset.
        domains: Counts by domain.
        histogram: Documents by length in tokens, ``[2^k, 2^(k+1))`` under k.
        duplicates: Documents whose text another one has, None where it was not counted.
        bytes_per_token: UTF-8 bytes of text a token; of a subset by the averages of its domains.
        tokenizer: What made the ids.
    """

    kind: str
    split: str | None = None
    domains: tuple[DomainSummary, ...]
    histogram: dict[int, int] = {}
    duplicates: int | None = None
    bytes_per_token: float | None = None
    tokenizer: TokenizerRecord | None = None


class SampleWindow(ManifestModel):
    """A sample as the model will see it.

    Attributes:
        sample: Global index.
        ids: Its input tokens.
        texts: The stretches that attention stays in, decoded; one for ``packed``, without the padding of ``none``.
        predicted: Labels that count.
    """

    sample: int
    ids: list[int]
    texts: list[str]
    predicted: int


def inspect_data(path: str | Path, *, split: str = "train", duplicates: bool = True) -> Summary:
    """Counts what a path holds.

    Args:
        path: A folder of text, of tokens, a subset, or a prefix.
        split: Of a subset.
        duplicates: Counts documents with equal hashes; sorts all hashes, 16 million at a time.

    Raises:
        DataError: The path holds none of these, or is damaged.
    """
    path = Path(path)
    kind = kind_of(path) or "prefix"
    if kind == "documents":
        return _documents(open_documents(path))
    if kind == "subset":
        return _subset(path, SubsetManifest.load(path / MANIFEST), split)
    return _tokens(path, kind, duplicates)


def _documents(manifest: DocumentsManifest) -> Summary:
    names = sorted({shard.domain for shard in manifest.shards})
    total = sum(shard.text_bytes for shard in manifest.shards)
    domains = []
    for name in names:
        shards = [shard for shard in manifest.shards if shard.domain == name]
        size = sum(shard.text_bytes for shard in shards)
        count = sum(shard.documents for shard in shards)
        domains.append(DomainSummary(name=name, documents=count, tokens=None, text_bytes=size, share=size / total))
    return Summary(kind="documents", domains=tuple(domains))


def _tokens(path: Path, kind: str, duplicates: bool) -> Summary:
    corpus = open_corpus([str(path)])
    total = sum(shard.record.tokens for shard in corpus.shards)
    lengths = np.zeros(64, np.int64)
    domains, text_total = [], 0
    for name in corpus.domains:
        shards = [shard for shard in corpus.shards if shard.record.domain == name]
        sizes = [shard.record.text_bytes for shard in shards]
        text = None if None in sizes else sum(size for size in sizes if size is not None)
        text_total += text or 0
        for shard in shards:
            for *_, tokens in shard.documents(_CHUNK):
                lengths += _length_bins(tokens)
        count, tokens_here = sum(s.record.documents for s in shards), sum(s.record.tokens for s in shards)
        domains.append(
            DomainSummary(
                name=name, documents=count, tokens=tokens_here, text_bytes=text, share=tokens_here / max(1, total)
            )
        )
    return Summary(
        kind=kind,
        domains=tuple(domains),
        histogram=_named_bins(lengths),
        duplicates=_count_duplicates(
            lambda: (low for s in corpus.shards for low, *_ in s.documents(_CHUNK)), corpus.documents
        )
        if duplicates
        else None,
        bytes_per_token=text_total / total if text_total and total else None,
        tokenizer=corpus.tokenizer,
    )


def _subset(path: Path, manifest: SubsetManifest, split: str) -> Summary:
    stream = open_stream(path, split)
    lengths = np.zeros(64, np.int64)
    for begin in range(0, len(stream.spans.ends), _CHUNK):
        ends = stream.spans.ends[begin : begin + _CHUNK]
        before = stream.spans.ends[begin - 1] if begin else 0
        lengths += _length_bins(np.diff(ends, prepend=before))
    total = stream.spans.num_tokens
    domains = tuple(
        DomainSummary(
            name=domain.name,
            documents=domain.documents,
            tokens=domain.stop - domain.start,
            text_bytes=None,
            share=(domain.stop - domain.start) / max(1, total),
            weight=domain.weight,
            unique_tokens=domain.unique_tokens,
        )
        for domain in stream.domains
    )
    return Summary(
        kind="subset",
        split=split,
        domains=domains,
        histogram=_named_bins(lengths),
        duplicates=sum(manifest.duplicates.values()),
        bytes_per_token=_mean_bytes(manifest.shards, stream.domains),
        tokenizer=manifest.tokenizer,
    )


def _mean_bytes(shards: Sequence[ShardRecord], domains: Sequence[DomainRecord]) -> float | None:
    """Weighs the bytes a token of each domain with its tokens in a split, whose own bytes no file tells."""
    total = 0.0
    for domain in (one for one in domains if one.stop > one.start):
        sources = [shard for shard in shards if shard.domain == domain.name]
        sizes = [shard.text_bytes for shard in sources if shard.text_bytes is not None]
        if len(sizes) < len(sources):
            return None
        total += (domain.stop - domain.start) * sum(sizes) / sum(shard.tokens for shard in sources)
    return total / max(1, sum(domain.stop - domain.start for domain in domains)) or None


def _length_bins(tokens: np.ndarray) -> np.ndarray:
    exponents = np.frexp(np.maximum(tokens, 1).astype(np.float64))[1] - 1
    return np.bincount(exponents, minlength=64)[:64]


def _named_bins(counts: np.ndarray) -> dict[int, int]:
    used = np.flatnonzero(counts)
    return {int(exponent): int(counts[exponent]) for exponent in used}


def _count_duplicates(hashes: Any, documents: int) -> int:
    """Counts equal 64-bit hashes in passes over ranges of them, so that memory stays bounded."""
    passes = -(-documents // _SORTED_AT_ONCE) or 1
    width, total = -(-(2**64) // passes), 0
    for number in range(passes):
        low, high = number * width, (number + 1) * width - 1
        found = np.concatenate([np.empty(0, np.uint64), *_between(hashes(), low, min(high, 2**64 - 1))])
        found.sort()
        total += int((found[1:] == found[:-1]).sum())
    return total


def _between(parts: Iterator[np.ndarray], low: int, high: int) -> Iterator[np.ndarray]:
    return (part[(part >= np.uint64(low)) & (part <= np.uint64(high))] for part in parts)


def sample_windows(
    path: str | Path,
    *,
    split: str,
    count: int,
    sequence_length: int,
    tokenizer: str | None = None,
    seed: int = 0,
    boundary: Boundary = "packed",
) -> list[SampleWindow]:
    """Decodes the first samples of the order that a run with this seed would take.

    Args:
        path: A folder of tokens, a subset or a prefix.
        split: Of a subset, else ``all``.
        count: How many; fewer if there are fewer.
        sequence_length: Tokens a sample.
        tokenizer: Overrides what the manifest names; needed for a bare prefix.
        seed: Of the order.
        boundary: See :data:`megatron_inherit.data.packing.Boundary`.

    Raises:
        DataError: The tokenizer is unknown or not the one that made the ids, or the data is too small.
    """
    loader = open_loader(LoaderOptions(str(path), sequence_length, seed=seed, split=split, boundary=boundary))
    made_with = loader.stream.tokenizer
    name = tokenizer or (made_with and made_with.path)
    if not name:
        raise DataError(f"{path} does not say which tokenizer made it.", fix="Name it with --tokenizer.")
    decoder: Tokenizer = open_tokenizer(name)
    batch = loader.batch(0, min(count, loader.samples_per_epoch))
    windows = []
    for row, number in enumerate(batch.sample_ids.tolist()):
        ids, counted = batch.tokens[row], batch.loss_mask[row]
        if batch.segment_ids is not None:
            parts = np.split(ids, np.flatnonzero(np.diff(batch.segment_ids[row])) + 1)
        else:  # the label after the last one that counts is still text, what follows it is padding
            parts = [ids if boundary == "packed" else ids[: int(counted.sum()) + 1]]
        texts = [decoder.decode(part) for part in parts]
        windows.append(SampleWindow(sample=number, ids=ids.tolist(), texts=texts, predicted=int(counted.sum())))
    return windows
