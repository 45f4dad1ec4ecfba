"""Text shards to Megatron ``.bin/.idx`` pairs, over processes, resumable: a pair counts once its record is written.

Beside each pair lies ``NAME.docs``, 20 bytes a document: the 128-bit xxh3 of its text, by which documents are held out
and duplicates found whatever the tokenizer, and its UTF-8 length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import xxhash

from megatron_inherit.base import atomic
from megatron_inherit.base.errors import DataError
from megatron_inherit.base.log import get_logger
from megatron_inherit.data.giga import Encoder, choose_encoder
from megatron_inherit.data.indexed import IndexedWriter, bin_path, idx_path, token_dtype
from megatron_inherit.data.ingest import DocumentsManifest, open_documents
from megatron_inherit.data.integrity import BlockHasher
from megatron_inherit.data.job_folder import job_folder
from megatron_inherit.data.jobs import Progress, Report, report, run_tasks
from megatron_inherit.data.manifests import (
    MANIFEST,
    FileRecord,
    ManifestModel,
    ShardRecord,
    TokenizerRecord,
    TokensManifest,
)
from megatron_inherit.data.opening import are_untouched, check_files
from megatron_inherit.data.text_shards import TextShard, read_batches
from megatron_inherit.data.tokenizer import Tokenizer, open_tokenizer

DOCUMENT_DTYPE = np.dtype([("low", "<u8"), ("high", "<u8"), ("bytes", "<u4")])
_log = get_logger(__name__)

Backend = Literal["auto", "gigatoken", "own"]


class TokenizeOptions(ManifestModel):
    """How to tokenize.

    Attributes:
        tokenizer: See :func:`megatron_inherit.data.tokenizer.open_tokenizer`.
        append_eos: Ends each document with the EOS id.
        prepend_bos: Begins each document with the BOS id.
        eos, bos: Tokens to take instead of what the tokenizer's folder says.
        backend: ``auto`` takes gigatoken where it is installed and gives the same ids.
    """

    tokenizer: str
    append_eos: bool = True
    prepend_bos: bool = False
    eos: str | None = None
    bos: str | None = None
    backend: Backend = "auto"


class TokenizePlan(ManifestModel):
    """What a folder of tokens is made from; the backend is left out, for it changes nothing."""

    source: str
    tokenizer: TokenizerRecord


@dataclass(frozen=True)
class _Task:
    shard: TextShard
    source: Path
    out: Path
    options: TokenizeOptions
    fingerprint: str


def tokenize(
    source: str | Path,
    out: str | Path,
    options: TokenizeOptions,
    *,
    workers: int = 1,
    on_progress: Report | None = None,
) -> TokensManifest:
    """Tokenizes a folder of text that ``ingest`` wrote.

    Args:
        source: The folder.
        out: Folder of the tokens; an unfinished one is taken up again, a finished one left as it is, but for
            shards whose files are missing or damaged: those are made again.
        options: How.
        workers: Processes.
        on_progress: Gets what is done.

    Raises:
        DataError: The text was changed, the tokenizer cannot be read, or lacks the EOS or BOS that was asked for.
    """
    source, out = Path(source), Path(out)
    documents = open_documents(source)
    record = describe(open_tokenizer(options.tokenizer, eos=options.eos, bos=options.bos), options)
    with job_folder(out, TokenizePlan(source=_fingerprint(documents), tokenizer=record)):
        tasks = [_Task(shard, source, out, options, record.fingerprint) for shard in documents.shards]
        missing = [task for task in tasks if not _is_done(task)]
        if not missing and (out / MANIFEST).is_file():
            _log.info("%s is finished already", out)
            return TokensManifest.load(out / MANIFEST)
        (out / MANIFEST).unlink(missing_ok=True)
        if len(missing) < len(tasks):
            _log.info("%d of %d shards are tokenized already", len(tasks) - len(missing), len(tasks))
        missing.sort(key=lambda task: -task.shard.text_bytes)
        for _ in run_tasks(_run, missing, workers=workers, on_progress=on_progress):
            pass
        shards = tuple(ShardRecord.load(_record_path(task)) for task in tasks)
        manifest = TokensManifest(source=_fingerprint(documents), tokenizer=record, shards=shards)
        manifest.save(out / MANIFEST)
        return manifest


def describe(tokenizer: Tokenizer, options: TokenizeOptions) -> TokenizerRecord:
    """Records a tokenizer with the rules for BOS and EOS.

    Raises:
        DataError: It lacks the one or the other.
    """
    for wanted, number, name in (
        (options.append_eos, tokenizer.eos_id, "eos"),
        (options.prepend_bos, tokenizer.bos_id, "bos"),
    ):
        if wanted and number is None:
            raise DataError(
                f"The tokenizer {tokenizer.path} says no {name.upper()} token.",
                fix=f"Name one of its tokens with --{name}, or leave it out.",
            )
    return TokenizerRecord(
        kind=tokenizer.kind,
        path=tokenizer.path,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        append_eos=options.append_eos,
        prepend_bos=options.prepend_bos,
    )


def _fingerprint(documents: DocumentsManifest) -> str:
    text = "\n".join(f"{shard.name}:{','.join(shard.file.hashes)}" for shard in documents.shards)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _name(task: _Task) -> str:
    return task.shard.name.partition(".jsonl")[0]


def _record_path(task: _Task) -> Path:
    return task.out / f"{_name(task)}.json"


def _is_done(task: _Task) -> bool:
    """Tells whether a shard has its record, and its files are what that says."""
    path = _record_path(task)
    if not path.is_file():
        return False
    files = ShardRecord.load(path).files
    return are_untouched(task.out, {path.with_suffix(f".{suffix}"): file for suffix, file in files.items()})


def _run(task: _Task) -> None:
    """Tokenizes one shard; its record, written last, is what makes it count."""
    text = task.source / task.shard.name
    check_files(task.source, {text: task.shard.file}, "quick")
    tokenizer = _opened(task.options.tokenizer, task.options.eos, task.options.bos, task.fingerprint)
    prefix = task.out / _name(task)
    shard = write_shard(prefix, read_batches(text), tokenizer, task.options)
    record = shard.model_copy(update={"name": _name(task), "domain": task.shard.domain})
    if record.documents != task.shard.documents:
        raise DataError(f"{text} holds {record.documents} documents.", expected=task.shard.documents)
    record.save(_record_path(task))


@functools.lru_cache(maxsize=1)
def _opened(path: str, eos: str | None, bos: str | None, fingerprint: str) -> Tokenizer:
    """Opens the tokenizer once a process; it must be the one the job began with."""
    tokenizer = open_tokenizer(path, eos=eos, bos=bos)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"The tokenizer {path} was changed while it was used.", fix="Run again into another folder.")
    return tokenizer


def write_shard(
    prefix: Path, batches: Iterator[list[str]], tokenizer: Tokenizer, options: TokenizeOptions
) -> ShardRecord:
    """Tokenizes batches of texts into ``prefix.{bin,idx,docs}``.

    Returns:
        The record, named after the prefix and without a domain.
    """
    encoder: Encoder | None = None
    documents = tokens = text_bytes = highest = 0
    hasher, details = BlockHasher(), []
    with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for texts in batches:
            encoder = encoder or choose_encoder(tokenizer, options.backend, texts)
            ids, lengths = with_ends(*encoder(texts), tokenizer, options)
            highest = max(highest, int(ids.max(initial=0)))
            hasher.update(writer.add_documents(ids, lengths))
            table = document_table(texts)
            details.append(table)
            size = int(table["bytes"].sum())
            documents, tokens, text_bytes = documents + len(texts), tokens + len(ids), text_bytes + size
            report(Progress(len(texts), size, len(ids)))
    docs = prefix.with_name(prefix.name + ".docs")
    atomic.write_bytes(docs, b"".join(table.tobytes() for table in details))
    return ShardRecord(
        name=prefix.name,
        domain="",
        dtype=token_dtype(tokenizer.vocab_size).str,
        documents=documents,
        tokens=tokens,
        text_bytes=text_bytes,
        max_token=highest,
        files={
            "bin": FileRecord.of(bin_path(prefix), hasher.digests()),
            "idx": FileRecord.of(idx_path(prefix)),
            "docs": FileRecord.of(docs),
        },
    )


def document_table(texts: Sequence[str]) -> np.ndarray:
    """Gives hash and length of each text, as :data:`DOCUMENT_DTYPE`."""
    encoded = [text.encode() for text in texts]
    hashes = b"".join(map(xxhash.xxh3_128_digest, encoded))
    out = np.empty(len(texts), DOCUMENT_DTYPE)
    halves = np.frombuffer(hashes, ">u8").reshape(-1, 2)
    out["high"], out["low"] = halves[:, 0], halves[:, 1]
    out["bytes"] = list(map(len, encoded))
    return out


def with_ends(
    ids: np.ndarray, lengths: np.ndarray, tokenizer: Tokenizer, options: TokenizeOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Puts BOS before and EOS after each document.

    Args:
        ids: Ids of all documents, one after the other.
        lengths: Ids of each, int64 [n].
        tokenizer: Gives the two ids.
        options: Says which are wanted.
    """
    extra = int(options.append_eos) + int(options.prepend_bos)
    if not extra:
        return ids, lengths
    longer = lengths + extra
    ends = np.cumsum(longer)
    out = np.empty(int(ends[-1]) if len(ends) else 0, np.int32)
    inside = np.ones(len(out), bool)
    for wanted, places, number in (
        (options.prepend_bos, ends - longer, tokenizer.bos_id),
        (options.append_eos, ends - 1, tokenizer.eos_id),
    ):
        if wanted:
            out[places], inside[places] = cast("int", number), False
    out[inside] = ids
    return out, longer
