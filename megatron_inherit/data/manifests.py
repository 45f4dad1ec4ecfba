"""The JSON records beside token files: what a folder holds, from what it came, and how to see that it is untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_inherit.base.atomic import write_text
from megatron_inherit.base.errors import DataError
from megatron_inherit.data.integrity import hash_file

MANIFEST = "manifest.json"
Record = TypeVar("Record", bound="ManifestModel")


class ManifestModel(BaseModel):
    """A frozen record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def save(self, path: Path) -> None:
        """Writes the record in one step."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls: type[Record], path: Path) -> Record:
        """Reads a record.

        Raises:
            DataError: It is missing, damaged or of another kind.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise DataError(
                f"{path} does not exist.", fix="The step that writes it did not finish; run it again."
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"{path} is damaged or of another kind: {where}: {first['msg']}.") from error


def kind_of(folder: Path) -> str | None:
    """Tells what a folder holds: ``documents``, ``tokens`` or ``subset``; None if it has no manifest.

    Raises:
        DataError: The manifest is damaged.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return None
    try:
        return str(json.loads(manifest.read_bytes())["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest} is damaged: it names no kind.") from error


class FileRecord(ManifestModel):
    """A file as it was written: bytes, time, and a hash for each 64 MiB."""

    size: int
    mtime_ns: int
    hashes: tuple[str, ...]

    @classmethod
    def of(cls, path: Path, hashes: list[str] | None = None) -> FileRecord:
        """Records a file, hashing it unless the hashes are given."""
        status = path.stat()
        digests = hash_file(path) if hashes is None else hashes
        return cls(size=status.st_size, mtime_ns=status.st_mtime_ns, hashes=tuple(digests))


class TokenizerRecord(ManifestModel):
    """Which tokenizer made the ids and what was added to each document."""

    kind: str
    path: str
    fingerprint: str
    vocab_size: int
    eos_id: int | None
    bos_id: int | None
    append_eos: bool
    prepend_bos: bool


class ShardRecord(ManifestModel):
    """One ``.bin/.idx`` pair.

    Attributes:
        name: Its prefix, relative to the folder of the manifest.
        text_bytes: UTF-8 bytes of its documents, None where they are unknown.
        max_token: Highest id.
        files: Suffix (``bin``, ``idx``, ``docs``) to the file's record.
    """

    name: str
    domain: str
    dtype: str
    documents: int
    tokens: int
    text_bytes: int | None
    max_token: int
    files: dict[str, FileRecord]


class TokensManifest(ManifestModel):
    """A folder of tokens: what ``minherit data tokenize`` wrote."""

    kind: Literal["tokens"] = "tokens"
    source: str
    tokenizer: TokenizerRecord
    shards: tuple[ShardRecord, ...]


class DomainRecord(ManifestModel):
    """A domain in a split.

    Attributes:
        start, stop: Its tokens of the stream.
        weight: The share that was asked for, 0 to 1.
        documents: Spans.
        unique_tokens: Tokens that are not repeats.
    """

    name: str
    start: int
    stop: int
    weight: float
    documents: int
    unique_tokens: int


class SplitRecord(ManifestModel):
    """A split of a subset: its stream, and its two index files by suffix (``starts``, ``ends``)."""

    tokens: int
    documents: int
    domains: tuple[DomainRecord, ...]
    files: dict[str, FileRecord]


OnShort = Literal["error", "repeat", "take-all"]
"""When a domain has fewer tokens than its share: stop; go round again; or take what there is, off the shares."""


class SubsetOptions(ManifestModel):
    """What to draw.

    Attributes:
        tokens: Budget of the training split; None takes everything.
        seed: Of the order of documents.
        weights: See :func:`megatron_inherit.data.mixture.parse_weights`.
        epochs: Domain to how often its documents pass within one pass over the subset, at least 1.
        on_short: See :data:`OnShort`.
        valid_share: Share of the documents held out for validation.
        test_share: Share held out for tests.
        split_seed: Of what is held out; leave it, so that all subsets of a corpus hold out the same documents.
    """

    tokens: int | None = None
    seed: int = 0
    weights: str = "natural"
    epochs: dict[str, float] = {}
    on_short: OnShort = "error"
    valid_share: float = Field(default=0.005, ge=0, lt=1)
    test_share: float = Field(default=0.005, ge=0, lt=1)
    split_seed: int = 0


class SubsetManifest(ManifestModel):
    """A subset: an index over token files, no copy of them."""

    kind: Literal["subset"] = "subset"
    options: SubsetOptions
    duplicates: dict[str, int]
    tokenizer: TokenizerRecord | None
    shards: tuple[ShardRecord, ...]
    splits: dict[str, SplitRecord]
