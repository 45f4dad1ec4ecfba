"""Reads documents out of one source file; what is no document comes out as a reject with its reason and place."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_inherit.base.errors import DataError
from megatron_inherit.base.optional import require
from megatron_inherit.data.layouts import Layout, domain_of_record
from megatron_inherit.data.sources import SourceFile, load_streamed, open_binary

_SAMPLE_CHARACTERS = 200


@dataclass(frozen=True)
class ReadOptions:
    """How records become documents.

    Attributes:
        layout: Tells the domain of a record where the file does not.
        text_field: Field of the text.
        max_bytes: Longest document, UTF-8.
        lines: Each line of a plain text is a document, not each file.
    """

    layout: Layout
    text_field: str = "text"
    max_bytes: int = 64 * 2**20
    lines: bool = False


@dataclass(frozen=True)
class Document:
    """A text with its domain."""

    text: str
    size: int
    domain: str


@dataclass(frozen=True)
class Reject:
    """A record that is no document: why, where (byte offset or record number) and how it begins."""

    reason: str
    place: str
    sample: str


def read_documents(file: SourceFile, options: ReadOptions) -> Iterator[Document | Reject]:
    """Yields the documents and rejects of a file in order.

    Raises:
        DataError: The file cannot be read at all: missing, damaged compression, not of its format.
    """
    try:
        yield from _READERS[file.format](file, options)
    except DataError:
        raise
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise DataError(f"{file.path} cannot be read as {file.format}: {error}.") from error
    except Exception as error:
        library = type(error).__module__.split(".")[0]
        if "://" in file.path or library in ("zstandard", "zstd", "pyarrow", "lzma", "zlib", "_lzma"):
            raise DataError(f"{file.path} cannot be read as {file.format}: {error or library}.") from error
        raise


def _from_text(data: bytes, place: str, file: SourceFile, options: ReadOptions) -> Document | Reject:
    if len(data) > options.max_bytes:
        return Reject("too long", place, _sample(data))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return Reject("invalid UTF-8", f"{place}, byte {error.start}", _sample(data))
    return _checked(text, len(data), file.domain, place)


def _from_record(record: Any, place: str, file: SourceFile, options: ReadOptions) -> Document | Reject:
    text = record.get(options.text_field) if isinstance(record, Mapping) else None
    if not isinstance(text, str):
        return Reject("no text field", place, str(record)[:_SAMPLE_CHARACTERS])
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return Reject("invalid Unicode", place, repr(text[:_SAMPLE_CHARACTERS]))
    if size > options.max_bytes:
        return Reject("too long", place, text[:_SAMPLE_CHARACTERS])
    domain = file.domain or (domain_of_record(record) if options.layout.by_record else None)
    return _checked(text, size, domain, place)


def _checked(text: str, size: int, domain: str | None, place: str) -> Document | Reject:
    if not text or text.isspace():
        return Reject("empty text", place, "")
    if domain is None:
        return Reject("no domain", place, text[:_SAMPLE_CHARACTERS])
    return Document(text, size, domain)


def _sample(data: bytes) -> str:
    return data[:_SAMPLE_CHARACTERS].decode(errors="backslashreplace")


def _lines(file: SourceFile, options: ReadOptions) -> Iterator[tuple[int, bytes | None]]:
    """Yields offset and bytes of each line, None for one longer than six times the limit of its text.

    JSON may write a byte of text in six characters, so only a longer line is surely too long.
    """
    limit, offset = 6 * options.max_bytes + 1024, 0
    with open_binary(file.path) as stream:
        while line := stream.readline(limit):
            begin, whole = offset, line.endswith(b"\n") or len(line) < limit
            offset += len(line)
            while not whole and (rest := stream.readline(limit)):
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield begin, line if whole else None


def _read_txt(file: SourceFile, options: ReadOptions) -> Iterator[Document | Reject]:
    if not options.lines:
        with open_binary(file.path) as stream:
            yield _from_text(stream.read(options.max_bytes + 1), "offset 0", file, options)
        return
    for offset, line in _lines(file, options):
        place = f"offset {offset}"
        if line is None:
            yield Reject("too long", place, "")
        elif line.strip():
            yield _from_text(line.rstrip(b"\r\n"), place, file, options)


def _read_jsonl(file: SourceFile, options: ReadOptions) -> Iterator[Document | Reject]:
    for offset, line in _lines(file, options):
        place = f"offset {offset}"
        if line is None:
            yield Reject("too long", place, "")
        elif line.strip():
            yield _from_json(line, place, file, options)


def _from_json(line: bytes, place: str, file: SourceFile, options: ReadOptions) -> Document | Reject:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Reject("invalid UTF-8", f"{place}, byte {error.start}", _sample(line))
    except (ValueError, RecursionError):
        return Reject("not JSON", place, _sample(line))
    return _from_record(record, place, file, options)


def _read_parquet(file: SourceFile, options: ReadOptions) -> Iterator[Document | Reject]:
    parquet = require("pyarrow.parquet", "parquet files")
    with open_binary(file.path) as stream:
        table = parquet.ParquetFile(stream)
        names = set(table.schema_arrow.names)
        if options.text_field not in names:
            raise DataError(
                f"{file.path} has no column {options.text_field!r}.",
                got=", ".join(sorted(names)),
                fix="Name the column with --text-field.",
            )
        columns = [options.text_field, *(["meta"] if options.layout.by_record and "meta" in names else [])]
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for record in batch.to_pylist():
                yield _from_record(record, f"row {number}", file, options)
                number += 1


def _read_tar(file: SourceFile, options: ReadOptions) -> Iterator[Document | Reject]:
    """Each member is a text, or an archive of texts (OpenWebText nests them); nothing is written to disk."""
    with open_binary(file.path) as stream:
        yield from _members(stream, file, options, "")


def _members(stream: Any, file: SourceFile, options: ReadOptions, above: str) -> Iterator[Document | Reject]:
    import lzma

    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            data = archive.extractfile(member) if member.isfile() else None
            if data is None:
                continue
            place = f"{above}{member.name}"
            if member.name.endswith(".xz"):
                with lzma.open(data, "rb") as inner:
                    yield from _members(inner, file, options, f"{place}/")
            else:
                yield _from_text(data.read(options.max_bytes + 1), place, file, options)


def _read_saved(file: SourceFile, options: ReadOptions) -> Iterator[Document | Reject]:
    yield from _from_rows(require("datasets", "saved data sets").Dataset.from_file(file.path), file, options)


def _read_streamed(file: SourceFile, options: ReadOptions) -> Iterator[Document | Reject]:
    data = load_streamed(file.path, file.config, file.split or "train")
    yield from _from_rows(data.shard(num_shards=file.parts, index=file.part), file, options)


def _from_rows(rows: Any, file: SourceFile, options: ReadOptions) -> Iterator[Document | Reject]:
    for number, record in enumerate(rows):
        yield _from_record(record, f"part {file.part}, row {number}", file, options)


_READERS: dict[str, Callable[[SourceFile, ReadOptions], Iterator[Document | Reject]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "tar": _read_tar,
    "saved-dataset": _read_saved,
    "streamed-dataset": _read_streamed,
}
