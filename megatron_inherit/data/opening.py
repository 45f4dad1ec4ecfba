"""Opens what a run reads (a subset, a folder of tokens, a Megatron prefix) and refuses damage before the first step."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from megatron_inherit.base.atomic import write_json
from megatron_inherit.base.errors import DataError
from megatron_inherit.base.log import get_logger
from megatron_inherit.data.indexed import IndexedFile, bin_path, first_token_beyond, idx_path, strip_suffix
from megatron_inherit.data.integrity import check_hashes, check_size
from megatron_inherit.data.manifests import (
    MANIFEST,
    DomainRecord,
    FileRecord,
    ShardRecord,
    SubsetManifest,
    TokenizerRecord,
    TokensManifest,
    kind_of,
)
from megatron_inherit.data.spans import ShardFile, Source, Spans

Verify = Literal["quick", "full", "none"]
_STAMPS = ".verified.json"
_SAMPLES, _SAMPLE = 64, 1 << 15
_log = get_logger(__name__)


@dataclass(frozen=True)
class Stream:
    """One split, ready to be cut into samples.

    Attributes:
        source, spans: Token files, and the documents in stream order.
        domains: Each domain's part of the stream, in order.
        tokenizer: What made the ids; None for a bare prefix.
        fingerprint: Hash of the content of all files.
    """

    source: Source
    spans: Spans
    domains: tuple[DomainRecord, ...]
    tokenizer: TokenizerRecord | None
    fingerprint: str


def open_stream(path: str | Path, split: str, *, vocab_size: int | None = None, verify: Verify = "quick") -> Stream:
    """Opens one split of a subset, or all documents of a folder of tokens or of a ``.bin/.idx`` prefix.

    Args:
        path: The folder or the prefix.
        split: ``train``, ``valid`` or ``test`` of a subset, else ``all``.
        vocab_size: Refuses ids from here on.
        verify: See :class:`megatron_inherit.data.loader.LoaderOptions`.

    Raises:
        DataError: Something is missing, damaged, changed or beyond the vocabulary; names file and offset.
    """
    path = Path(path)
    kind = require_kind(path, "tokens", "subset")
    if kind is None:
        if not path.exists() and not bin_path(path).exists():
            raise DataError(
                f"{path} does not exist.", fix="Give a folder of tokens, a subset, or a prefix of .bin/.idx."
            )
        _only_all(path, split)
        return _open_prefix(path, None if verify == "none" else vocab_size)
    if kind == "subset":
        return _open_subset(path, split, vocab_size, verify)
    _only_all(path, split)
    return _open_tokens(path, vocab_size, verify)


def require_kind(path: Path, *wanted: str) -> str | None:
    """Tells what a folder holds, None for a prefix or another folder.

    Raises:
        DataError: The folder holds none of the kinds that are wanted.
    """
    kind = kind_of(path)
    if kind in (None, *wanted):
        return kind
    fixes = {
        "documents": "Run `minherit data tokenize` on it first.",
        "subset": "Name the folders of tokens that it was drawn from.",
    }
    raise DataError(f"{path / MANIFEST} describes {kind}, not {' or '.join(wanted)}.", fix=fixes.get(str(kind), ""))


def _only_all(path: Path, split: str) -> None:
    if split != "all":
        raise DataError(
            f"{path} has no split {split!r}.",
            fix="Make one with `minherit data subset`, or use split 'all'.",
        )


def _open_subset(folder: Path, split: str, vocab_size: int | None, verify: Verify) -> Stream:
    manifest = SubsetManifest.load(folder / MANIFEST)
    if split not in manifest.splits:
        raise DataError(
            f"{folder} has no split {split!r}.",
            expected=f"one of {', '.join(manifest.splits)}",
            fix="Draw the subset again with a larger --valid or --test share." if split in ("valid", "test") else "",
        )
    record = manifest.splits[split]
    index = {folder / f"{split}.{suffix}": file for suffix, file in record.files.items()}
    check_files(folder, index, verify)
    check_shards(folder, manifest.shards, vocab_size, verify)
    spans = Spans.open(folder / split, record.documents)
    if spans.num_tokens != record.tokens:
        raise DataError(
            f"{folder / split}.ends (offset {8 * max(0, record.documents - 1)}) does not end where the manifest says.",
            got=spans.num_tokens,
            expected=record.tokens,
        )
    files = [*record.files.values(), *(shard.files["bin"] for shard in manifest.shards)]
    return Stream(_source(folder, manifest.shards), spans, record.domains, manifest.tokenizer, _digest(files))


def _open_tokens(folder: Path, vocab_size: int | None, verify: Verify) -> Stream:
    manifest = TokensManifest.load(folder / MANIFEST)
    check_shards(folder, manifest.shards, vocab_size, verify)
    source = _source(folder, manifest.shards)
    starts, lengths, domains, place = [], [], [], 0
    for base, shard in zip(source.bases.tolist(), manifest.shards, strict=False):
        bounds = IndexedFile(folder / shard.name).bounds()
        starts.append(bounds[:-1] + base)
        lengths.append(np.diff(bounds))
        domains.append(_whole_domain(shard.domain, place, shard.tokens, shard.documents))
        place += shard.tokens
    spans = Spans(np.concatenate(starts), np.cumsum(np.concatenate(lengths)))
    return Stream(source, spans, tuple(domains), manifest.tokenizer, _digest([s.files["bin"] for s in manifest.shards]))


def _whole_domain(name: str, start: int, tokens: int, documents: int) -> DomainRecord:
    return DomainRecord(
        name=name, start=start, stop=start + tokens, weight=0.0, documents=documents, unique_tokens=tokens
    )


def _open_prefix(path: Path, vocab_size: int | None) -> Stream:
    file = IndexedFile(path)
    if vocab_size is not None and (place := first_token_beyond(file.tokens, vocab_size)) is not None:
        raise beyond_vocabulary(file.bin, place * file.dtype.itemsize, int(file.tokens[place]), vocab_size)
    bounds = file.bounds()
    domain = _whole_domain(strip_suffix(path).name, 0, file.num_tokens, file.num_documents)
    source = Source([ShardFile(file.bin, file.dtype, file.num_tokens)])
    return Stream(source, Spans(bounds[:-1], bounds[1:]), (domain,), None, _sampled_digest(file))


def _sampled_digest(file: IndexedFile) -> str:
    """Hashes the lengths of all documents and 64 places of the tokens: a prefix carries no hashes of its own."""
    digest = xxhash.xxh3_128(file.sequence_lengths.tobytes())
    for place in np.linspace(0, max(0, file.num_tokens - _SAMPLE), _SAMPLES).astype(np.int64).tolist():
        digest.update(file.tokens[place : place + _SAMPLE].tobytes())
    return digest.hexdigest()


def _source(folder: Path, shards: Sequence[ShardRecord]) -> Source:
    return Source([ShardFile(bin_path(folder / s.name), np.dtype(s.dtype), s.tokens) for s in shards])


def _digest(files: Sequence[FileRecord]) -> str:
    """Hashes what the files hold; not their times, so that a copy is the same data."""
    return xxhash.xxh3_128_hexdigest("\n".join(f"{file.size}:{','.join(file.hashes)}" for file in files).encode())


def check_shards(folder: Path, shards: Sequence[ShardRecord], vocab_size: int | None, verify: Verify) -> None:
    """Raises DataError if a token file is truncated, was changed, or holds an id beyond the vocabulary."""
    for shard in shards:
        if vocab_size is not None and shard.max_token >= vocab_size:
            file = IndexedFile(folder / shard.name)
            place = first_token_beyond(file.tokens, vocab_size) or 0
            raise beyond_vocabulary(file.bin, place * file.dtype.itemsize, int(file.tokens[place]), vocab_size)
    paths = {"bin": bin_path, "idx": idx_path}
    files = {paths[kind](folder / s.name): s.files[kind] for s in shards for kind in paths}
    check_files(folder, files, verify)


def beyond_vocabulary(path: object, offset: int, token: int, vocab_size: int) -> DataError:
    """Says that a token id is none of the model's."""
    return DataError(
        f"{path} holds a token id beyond the vocabulary at offset {offset}.",
        got=token,
        expected=f"an id below {vocab_size}",
        fix="Tokenize with the tokenizer of the model.",
    )


def check_files(folder: Path, files: dict[Path, FileRecord], verify: Verify) -> None:
    """Compares files with their records; a file whose time changed is hashed, once if the folder can keep a stamp."""
    if verify == "none":
        return
    stamps = _read_stamps(folder)

    def check(item: tuple[Path, FileRecord]) -> tuple[str, int] | None:
        path, record = item
        check_size(path, record.size)
        mtime = path.stat().st_mtime_ns
        if verify == "quick" and mtime in (record.mtime_ns, stamps.get(str(path))):
            return None
        check_hashes(path, list(record.hashes))
        return str(path), mtime

    with ThreadPoolExecutor(8) as pool:
        fresh = dict(found for found in pool.map(check, files.items()) if found)
    if fresh:
        with contextlib.suppress(Exception):
            write_json(folder / _STAMPS, stamps | fresh)


def are_untouched(folder: Path, files: dict[Path, FileRecord]) -> bool:
    """Tells whether the files that a job made are still what it wrote; warns of the first that is not."""
    try:
        check_files(folder, files, "quick")
    except DataError as error:
        _log.warning("%s It is made again.", error.what)
        return False
    return True


def _read_stamps(folder: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        stamps = json.loads((folder / _STAMPS).read_bytes())
        return stamps if isinstance(stamps, dict) else {}
    return {}
