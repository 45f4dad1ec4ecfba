"""Shards of text: files of JSON lines, each ``{"text": ...}``, written whole or not at all, and read in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from megatron_inherit.base import atomic
from megatron_inherit.base.optional import require
from megatron_inherit.data.manifests import FileRecord, ManifestModel
from megatron_inherit.data.sources import open_binary

_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 4096

Compression = Literal["none", "zst"]


class TextShard(ManifestModel):
    """A file of JSON lines."""

    name: str
    domain: str
    documents: int
    text_bytes: int
    file: FileRecord


class TextShardWriter:
    """Writes the documents of one domain to ``STEM-0000.jsonl``, ``STEM-0001.jsonl``, ...

    Args:
        folder: What the names of the shards are relative to.
        stem: Begins their names.
        domain: Of all documents.
        shard_bytes: Text after which the next shard begins.
        compression: Of the files.

    Attributes:
        done: The finished shards; :meth:`close` finishes the last one.
    """

    def __init__(self, folder: Path, stem: str, domain: str, shard_bytes: int, compression: Compression) -> None:
        self.done: list[TextShard] = []
        self._folder, self._stem, self._domain = folder, stem, domain
        self._shard_bytes, self._compression = shard_bytes, compression
        self._file: IO[bytes] | None = None
        self._documents = self._text_bytes = 0

    def add(self, text: str, size: int) -> None:
        """Appends a document whose UTF-8 form has ``size`` bytes.

        Raises:
            DiskError: The disk is full.
        """
        line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
        try:
            self._file = self._file or self._open()
            self._file.write(line)
        except OSError as error:
            raise atomic.disk_error(error, self._path) from error
        self._documents += 1
        self._text_bytes += size
        if self._text_bytes >= self._shard_bytes:
            self.close()

    @property
    def _name(self) -> str:
        suffix = ".zst" if self._compression == "zst" else ""
        return f"{self._stem}-{len(self.done):04d}.jsonl{suffix}"

    @property
    def _path(self) -> Path:
        return self._folder / self._name

    def _open(self) -> IO[bytes]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        raw: Any = self._path.open("wb", buffering=1 << 20)
        if self._compression == "zst":
            return require("zstandard", "--compression zst").ZstdCompressor(3).stream_writer(raw)
        return raw

    def close(self) -> None:
        """Makes the shard that was begun durable, if there is one.

        Raises:
            DiskError: The disk is full.
        """
        if self._file is None:
            return
        try:
            self._file.close()
            atomic.fsync_path(self._path)
        except OSError as error:
            raise atomic.disk_error(error, self._path) from error
        shard = TextShard(
            name=self._name,
            domain=self._domain,
            documents=self._documents,
            text_bytes=self._text_bytes,
            file=FileRecord.of(self._path),
        )
        self.done.append(shard)
        self._file, self._documents, self._text_bytes = None, 0, 0


def read_batches(path: Path) -> Iterator[list[str]]:
    """Yields the texts of a shard, about a megabyte at a time."""
    texts: list[str] = []
    size = 0
    with open_binary(str(path)) as stream:
        for line in stream:
            texts.append(json.loads(line.decode())["text"])
            size += len(line)
            if size >= _BATCH_BYTES or len(texts) >= _BATCH_DOCUMENTS:
                yield texts
                texts, size = [], 0
    if texts:
        yield texts
