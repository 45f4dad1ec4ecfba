"""Finds text on local disks, remote stores and in Hugging Face data sets, and says which file is of which domain."""

from __future__ import annotations

import fnmatch
import io
import json
import lzma
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from megatron_inherit.base.errors import DataError, MinheritError
from megatron_inherit.base.log import get_logger
from megatron_inherit.base.optional import require
from megatron_inherit.data.layouts import Layout, domain_of_path
from megatron_inherit.data.manifests import ManifestModel

Format = Literal["txt", "jsonl", "parquet", "tar", "saved-dataset", "streamed-dataset"]
DATASETS_PREFIX = "datasets:"
_COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_FORMATS: dict[str, Format] = {
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".rst": "txt",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tar": "tar",
    ".tgz": "tar",
}
_VERSIONS = ("ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified")
_SAVED = ("state.json", "dataset_dict.json")
_DOMAIN_NAME = re.compile(r"\w[\w.-]*")
_log = get_logger(__name__)


class SourceFile(ManifestModel):
    """A file of a corpus, or one part of a data set.

    Attributes:
        path: Local path or URL; folder or name of a data set.
        format: How to read it.
        size: Bytes; 0 where it is not known.
        mtime_ns: Time of the last change of a local file.
        version: What a store says of the state of a remote file: its ETag, hash or time.
        domain: None where each record tells it.
        part, parts: Which part of how many, of a data set.
        config, split: Of a streamed data set.
    """

    path: str
    format: Format
    size: int
    mtime_ns: int | None
    domain: str | None
    version: str | None = None
    part: int = 0
    parts: int = 1
    config: str | None = None
    split: str | None = None


def find_sources(sources: list[str], layout: Layout, *, pattern: str = "*", as_text: bool = False) -> list[SourceFile]:
    """Lists the files below paths, URLs and data sets, in a fixed order.

    Args:
        sources: Each ``PATH`` or ``DOMAIN=PATH``; a path is a file, a folder, an fsspec URL, or
            ``datasets:NAME_OR_FOLDER[:CONFIG[:SPLIT]]`` for a streamed Hugging Face data set.
        layout: Tells the domain where the source does not.
        pattern: Shell pattern that file names inside folders must match.
        as_text: Reads every file as plain text whatever its suffix.

    Raises:
        DataError: A source is missing, holds no readable file, or a file belongs to no domain.
    """
    found: list[SourceFile] = []
    for source in sources:
        domain, path = _split_name(source)
        if path.startswith(DATASETS_PREFIX):
            files = list(_streamed(path.removeprefix(DATASETS_PREFIX), domain or _fallback(layout)))
        elif "://" not in path and any((Path(path) / name).is_file() for name in _SAVED):
            files = list(_saved(Path(path), domain or _fallback(layout)))
        else:
            listed = _list_remote(path) if "://" in path else _list_local(Path(path))
            files = list(_choose(listed, domain, layout, pattern, as_text))
        if not files:
            raise DataError(f"{path} holds no file that can be read.", expected=f"files ending in {_known_suffixes()}")
        found += files
    return sorted(found, key=lambda file: (file.domain or "", file.path, file.part))


def _split_name(source: str) -> tuple[str | None, str]:
    name, mark, path = source.partition("=")
    if not mark or "/" in name or ":" in name:
        return None, source
    if not _DOMAIN_NAME.fullmatch(name):
        raise DataError(f"{name!r} is no name for a domain.", expected="letters, digits, '_', '-' and '.'")
    return name, path


@dataclass(frozen=True)
class _Listed:
    """A file that was found: its place below the source (or its name, if it was named itself)."""

    relative: str
    path: str
    size: int
    mtime_ns: int | None
    named: bool
    version: str | None = None


def _list_local(root: Path) -> Iterator[_Listed]:
    if not root.exists():
        raise DataError(f"{root} does not exist.")
    named = root.is_file()
    for file in [root] if named else sorted(file for file in root.rglob("*") if file.is_file()):
        status = file.stat()
        relative = file.name if named else file.relative_to(root).as_posix()
        yield _Listed(relative, str(file.absolute()), status.st_size, status.st_mtime_ns, named)


def _list_remote(url: str) -> Iterator[_Listed]:
    fsspec = require("fsspec", "remote paths")
    try:
        system, root = fsspec.core.url_to_fs(url)
        named = system.isfile(root)
        entries = {root: system.info(root)} if named else system.find(root, detail=True)
    except MinheritError:
        raise
    except Exception as error:  # every store has errors of its own
        reason = str(error) or type(error).__name__
        raise DataError(f"{url} cannot be listed: {reason}.", fix="Check the address and the access to it.") from error
    if not entries:
        raise DataError(f"{url} does not exist, or holds no file.", fix="Check the address and the access to it.")
    for path, info in sorted(entries.items()):
        relative = path.rpartition("/")[2] if named else path.removeprefix(root).lstrip("/")
        version = next((str(info[name]) for name in _VERSIONS if info.get(name)), None)
        yield _Listed(relative, system.unstrip_protocol(path), int(info.get("size") or 0), None, named, version)


def _choose(
    listed: Iterable[_Listed], domain: str | None, layout: Layout, pattern: str, as_text: bool
) -> Iterator[SourceFile]:
    """Keeps the files that match and can be read; says once which of the others were left out."""
    unknown: list[str] = []
    for file in listed:
        if not (file.named or fnmatch.fnmatch(file.relative.rpartition("/")[2], pattern)):
            continue
        kind: Format | None = "txt" if as_text else _format(file.relative)
        if kind is None and file.named:
            fix = "Use --as-text for plain text."
            raise DataError(f"{file.path} has no known suffix.", expected=_known_suffixes(), fix=fix)
        if kind is None:
            unknown.append(file.relative)
            continue
        place = domain or (domain_of_path(file.relative) if layout.by_path else _fallback(layout))
        yield SourceFile(
            path=file.path, format=kind, size=file.size, mtime_ns=file.mtime_ns, version=file.version, domain=place
        )
    if unknown:
        shown = ", ".join(unknown[:3])
        _log.warning("%d files of unknown suffix are left out: %s%s", len(unknown), shown, "..." * (len(unknown) > 3))


def _saved(root: Path, domain: str | None) -> Iterator[SourceFile]:
    """A folder that ``save_to_disk`` wrote, or the training split of one with several: a part for each Arrow file."""
    if (root / _SAVED[1]).is_file():
        root = root / "train"
    state = root / _SAVED[0]
    try:
        names = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state} does not list the files of a saved data set: {error!r}.") from error
    for name in names:
        file = root / name
        status = file.stat()
        yield SourceFile(
            path=str(file.absolute()),
            format="saved-dataset",
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            domain=domain,
        )


def _streamed(spec: str, domain: str | None) -> Iterator[SourceFile]:
    path, config, split = [*spec.split(":"), "", ""][:3]
    data = load_streamed(path, config or None, split or "train")
    for part in range(data.num_shards):
        yield SourceFile(
            path=path,
            format="streamed-dataset",
            size=0,
            mtime_ns=None,
            domain=domain,
            part=part,
            parts=data.num_shards,
            config=config or None,
            split=split or "train",
        )


def load_streamed(path: str, config: str | None, split: str) -> Any:
    """Opens a Hugging Face data set for streaming; nothing is downloaded as a whole, no code of it is run."""
    try:
        return require("datasets", "Hugging Face data sets").load_dataset(path, config, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise DataError(f"The data set {path} (config {config}, split {split}) cannot be streamed: {error}.") from error


def _fallback(layout: Layout) -> str | None:
    return None if layout.by_record else layout.fixed or "text"


def _format(name: str) -> Format | None:
    """Tells the format from the suffix, None if it is unknown."""
    stem = name
    for suffix in _COMPRESSIONS:
        stem = stem.removesuffix(suffix)
    if stem.endswith("_data") and name.endswith(".xz"):  # OpenWebText's urlsf_subsetNN-MMM_data.xz are tar archives
        return "tar"
    return _FORMATS.get(Path(stem).suffix)


def _known_suffixes() -> str:
    return ", ".join(_FORMATS) + f" (also with {', '.join(_COMPRESSIONS)})"


def open_binary(path: str) -> IO[bytes]:
    """Opens a local or remote file for reading and decompresses it by its suffix."""
    raw = _open_raw(path)
    if path.endswith((".gz", ".tgz")):
        import gzip

        return cast("IO[bytes]", gzip.open(raw, "rb"))
    if path.endswith(".zst"):
        return cast("IO[bytes]", io.BufferedReader(_ZstdReader(raw), 1 << 20))
    if path.endswith(".xz"):
        return cast("IO[bytes]", lzma.open(raw, "rb"))
    if path.endswith(".bz2"):
        import bz2

        return cast("IO[bytes]", bz2.open(raw, "rb"))
    return raw


def _open_raw(path: str) -> IO[bytes]:
    if "://" in path:
        raw = require("fsspec", "remote paths").open(path, "rb").open()
        return cast("IO[bytes]", io.BufferedReader(raw, 1 << 20))  # theirs reads no line up to a length
    return open(path, "rb", buffering=1 << 20)


class _ZstdReader(io.RawIOBase):
    """Reads frames of Zstandard one after the other; the library's own reader takes a cut file for a whole one."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._module = raw, require("zstandard", "files ending in .zst")
        self._frame: Any = None
        self._input, self._output = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output and self._advance():
            pass
        part, self._output = self._output[: len(buffer)], self._output[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def _advance(self) -> bool:
        """Decompresses a little more; False at the end of the file."""
        if not self._input:
            self._input = self._raw.read(1 << 17)
        if not self._input:
            if self._frame is not None:
                raise EOFError("the file ends inside a Zstandard frame")
            return False
        self._frame = self._frame or self._module.ZstdDecompressor().decompressobj()
        self._output, self._input = self._frame.decompress(self._input), b""
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()
