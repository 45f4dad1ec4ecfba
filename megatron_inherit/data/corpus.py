"""What a subset is drawn from: folders of tokens and bare ``.bin/.idx`` prefixes, seen as one source with domains."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

from megatron_inherit.base.errors import DataError
from megatron_inherit.data.indexed import IndexedFile, bin_path, idx_path, map_array, strip_suffix
from megatron_inherit.data.manifests import MANIFEST, FileRecord, ShardRecord, TokenizerRecord, TokensManifest
from megatron_inherit.data.opening import check_files, check_shards, require_kind
from megatron_inherit.data.tokenize import DOCUMENT_DTYPE

DocumentColumns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class CorpusShard:
    """A ``.bin/.idx`` pair at a place in the source.

    Attributes:
        folder: What the record's name is relative to.
        base: Source position of its first token.
    """

    folder: Path
    record: ShardRecord
    base: int

    @property
    def prefix(self) -> Path:
        """Path without suffix."""
        return self.folder / self.record.name

    def documents(self, chunk: int) -> Iterator[DocumentColumns]:
        """Yields, for ``chunk`` documents at a time, both halves of the hash, the source position and the tokens."""
        file = IndexedFile(self.prefix)
        hashed = "docs" in self.record.files
        docs = self.prefix.with_name(self.prefix.name + ".docs")
        table = map_array(docs, DOCUMENT_DTYPE, file.num_documents) if hashed else None
        for begin in range(0, file.num_documents, chunk):
            bounds = file.bounds(begin, begin + chunk)
            part = hash_tokens(file, bounds) if table is None else table[begin : begin + chunk]
            yield part["low"].copy(), part["high"].copy(), bounds[:-1] + self.base, np.diff(bounds)


def hash_tokens(file: IndexedFile, bounds: np.ndarray) -> np.ndarray:
    """Hashes the ids of documents, for pairs that came without the hashes of their texts."""
    out = np.zeros(len(bounds) - 1, DOCUMENT_DTYPE)
    for number, (start, stop) in enumerate(pairwise(bounds.tolist())):
        digest = xxhash.xxh3_128_intdigest(file.tokens[start:stop].astype("<i4").tobytes())
        out[number]["low"], out[number]["high"] = digest & (2**64 - 1), digest >> 64
    return out


@dataclass(frozen=True)
class Corpus:
    """Shards end to end, with their domains in order of name."""

    shards: tuple[CorpusShard, ...]
    domains: tuple[str, ...]
    tokenizer: TokenizerRecord | None

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(shard.record.documents for shard in self.shards)

    def tokens_of_domains(self) -> dict[str, int]:
        """Domain to its tokens."""
        totals = dict.fromkeys(self.domains, 0)
        for shard in self.shards:
            totals[shard.record.domain] += shard.record.tokens
        return totals

    def shards_in_order(self) -> Iterator[tuple[int, CorpusShard]]:
        """Yields the number of the domain and the shard."""
        numbers = {name: number for number, name in enumerate(self.domains)}
        return ((numbers[shard.record.domain], shard) for shard in self.shards)

    def records(self, folder: Path) -> tuple[ShardRecord, ...]:
        """Gives the shards' records with names relative to another folder."""
        names = (os.path.relpath(shard.prefix.resolve(), folder.resolve()) for shard in self.shards)
        return tuple(
            shard.record.model_copy(update={"name": name}) for shard, name in zip(self.shards, names, strict=True)
        )


def open_corpus(sources: Sequence[str]) -> Corpus:
    """Opens folders of tokens and prefixes, each ``PATH`` or ``DOMAIN=PATH``.

    Raises:
        DataError: One is missing or damaged, or they were made with different tokenizers or rules.
    """
    found: list[tuple[Path, ShardRecord]] = []
    tokenizers: dict[str, TokenizerRecord | None] = {}
    for source in sources:
        name, mark, path = source.partition("=")
        name, path = (name, path) if mark and "/" not in name else ("", source)
        if require_kind(Path(path), "tokens"):
            tokens = TokensManifest.load(Path(path) / MANIFEST)
            check_shards(Path(path), tokens.shards, None, "quick")
            docs = {Path(path) / f"{s.name}.docs": s.files["docs"] for s in tokens.shards if "docs" in s.files}
            check_files(Path(path), docs, "quick")
            tokenizers[path] = tokens.tokenizer
            found += [(Path(path), s.model_copy(update={"domain": name or s.domain})) for s in tokens.shards]
        else:
            prefix = strip_suffix(path)
            tokenizers[path] = None
            found.append((prefix.parent, _describe(prefix, name or prefix.name)))
    return Corpus(_lay_out(found), tuple(sorted({record.domain for _, record in found})), _same(tokenizers))


def _lay_out(found: list[tuple[Path, ShardRecord]]) -> tuple[CorpusShard, ...]:
    shards, base = [], 0
    for folder, record in sorted(found, key=lambda item: (item[1].domain, str(item[0]), item[1].name)):
        shards.append(CorpusShard(folder, record, base))
        base += record.tokens
    return tuple(shards)


def _same(tokenizers: dict[str, TokenizerRecord | None]) -> TokenizerRecord | None:
    kinds = {record and record.model_dump_json(exclude={"path"}) for record in tokenizers.values()}
    if len(kinds) > 1:
        raise DataError(
            "The sources were made with different tokenizers or rules for BOS and EOS.",
            got="; ".join(f"{path}: {record and record.path}" for path, record in tokenizers.items()),
            fix="Tokenize them alike.",
        )
    return next(iter(tokenizers.values()))


def _describe(prefix: Path, domain: str) -> ShardRecord:
    """Makes the record of a pair that has none; reads all its tokens once."""
    file = IndexedFile(prefix)
    highest = max((int(file.tokens[at : at + (1 << 24)].max()) for at in range(0, file.num_tokens, 1 << 24)), default=0)
    return ShardRecord(
        name=prefix.name,
        domain=domain,
        dtype=file.dtype.str,
        documents=file.num_documents,
        tokens=file.num_tokens,
        text_bytes=None,
        max_token=highest,
        files={"bin": FileRecord.of(bin_path(prefix)), "idx": FileRecord.of(idx_path(prefix))},
    )
