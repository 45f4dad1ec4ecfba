"""Megatron's indexed files: ``prefix.bin`` holds the tokens of all documents, ``prefix.idx`` where each one lies.

The bytes are those of ``megatron.core.datasets.indexed_dataset``: magic, version 1, one byte for the number type, two
counts, then int32 lengths, int64 byte offsets and int64 document boundaries, all little-endian.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megatron_inherit.base.atomic import disk_error, fsync_path
from megatron_inherit.base.errors import DataError
from megatron_inherit.base.temporary import lock, temporary_beside

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}
_CODE_OF_DTYPE = {np.dtype(name): code for code, name in _DTYPE_OF_CODE.items()}
_UINT16_LIMIT = 65500
_CHUNK = 1 << 22


def token_dtype(vocab_size: int) -> np.dtype:
    """Gives uint16 for vocabularies below 65500 ids, else int32: Megatron's own rule."""
    return np.dtype("u2" if vocab_size < _UINT16_LIMIT else "i4")


def strip_suffix(path: str | Path) -> Path:
    """Gives the prefix of ``prefix``, ``prefix.bin`` or ``prefix.idx``."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def bin_path(prefix: Path) -> Path:
    """Names the file of tokens."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Names the file of boundaries."""
    return prefix.with_name(prefix.name + ".idx")


def map_array(path: Path, dtype: np.dtype | str, count: int, offset: int = 0) -> np.ndarray:
    """Maps ``count`` numbers of a file read-only, as a plain array (slices of ``np.memmap`` are ten times slower)."""
    if count == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)))


class IndexedFile:
    """One ``.bin/.idx`` pair, mapped into memory.

    Args:
        path: The prefix, or either of the two files.

    Attributes:
        tokens: All tokens [num_tokens], mapped.
        sequence_lengths: int32 [num_sequences], mapped.

    Raises:
        DataError: A file is missing, truncated or the two do not belong together.
    """

    def __init__(self, path: str | Path) -> None:
        self.prefix = strip_suffix(path)
        self.bin, self.idx = bin_path(self.prefix), idx_path(self.prefix)
        if self.prefix.is_dir() and not self.idx.is_file():
            fix = "Let the job that writes it finish, run it again if it was killed, or give a prefix of .bin and .idx."
            raise DataError(f"{self.prefix} is a folder without a manifest.", fix=fix)
        for file in (self.idx, self.bin):
            if not file.is_file():
                raise DataError(f"{file} does not exist.", fix="Give the common prefix of a .bin and an .idx file.")
        self.dtype, sequences, boundaries = self._read_header()
        after_lengths = _HEADER.size + 4 * sequences
        self.sequence_lengths = map_array(self.idx, "<i4", sequences, _HEADER.size)
        self._offsets = map_array(self.idx, "<i8", sequences, after_lengths)
        self._boundaries = map_array(self.idx, "<i8", boundaries, after_lengths + 8 * sequences)
        self.num_tokens = self._check()
        self.num_documents = boundaries - 1
        self.tokens = map_array(self.bin, self.dtype, self.num_tokens)

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, number: int) -> np.ndarray:
        start, stop = self.bounds(number, number + 1)
        return self.tokens[start:stop]

    def bounds(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Gives the first token of documents ``first`` to ``last`` - 1 and the end of the last one, int64."""
        last = self.num_documents if last is None else min(last, self.num_documents)
        sequence = self._boundaries[first : last + 1]
        out = np.full(len(sequence), self.num_tokens, np.int64)
        inside = sequence < len(self._offsets)
        out[inside] = self._offsets[sequence[inside]] // self.dtype.itemsize
        return out

    def _read_header(self) -> tuple[np.dtype, int, int]:
        size = self.idx.stat().st_size
        with self.idx.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise DataError(
                f"{self.idx} is not a Megatron index: its first {len(_MAGIC)} bytes (offset 0) are wrong.",
                got=header[: len(_MAGIC)],
                expected=_MAGIC,
            )
        _, version, code, sequences, boundaries = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPE_OF_CODE:
            raise DataError(f"{self.idx} has a bad header at offset 9.", got=f"version {version}, number type {code}")
        need = _HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (need, need + sequences):
            raise DataError(
                f"{self.idx} does not hold what its header (offset 18) announces: {sequences} sequences and "
                f"{boundaries} boundaries.",
                got=f"{size} bytes",
                expected=f"{need} bytes",
                fix="The file is truncated or damaged; tokenize again.",
            )
        return np.dtype("<" + _DTYPE_OF_CODE[code]), sequences, boundaries

    def _check(self) -> int:
        """Checks that lengths, offsets, boundaries and the size of the .bin agree; gives the number of tokens."""
        item, base = self.dtype.itemsize, _HEADER.size + 4 * len(self._offsets)
        total = 0
        for start in range(0, len(self._offsets), _CHUNK):
            lengths = self.sequence_lengths[start : start + _CHUNK].astype(np.int64)
            ends = np.cumsum(lengths) * item + total
            wrong = np.flatnonzero((self._offsets[start : start + _CHUNK] != ends - lengths * item) | (lengths < 0))
            if len(wrong):
                where = start + int(wrong[0])
                raise DataError(
                    f"{self.idx} is inconsistent at offset {base + 8 * where}: sequence {where} does not begin where "
                    f"the one before it ends.",
                    got=int(self._offsets[where]),
                    fix="The file is damaged; tokenize again.",
                )
            total = int(ends[-1])
        bounds, after = self._boundaries, base + 8 * len(self._offsets)
        falling = any((np.diff(bounds[at : at + _CHUNK + 1]) < 0).any() for at in range(0, len(bounds), _CHUNK))
        if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(self._offsets) or falling:
            raise DataError(f"{self.idx} has document boundaries (offset {after}) that do not fit its sequences.")
        size = self.bin.stat().st_size
        if size != total:
            raise DataError(
                f"{self.bin} ends at offset {size}, which is not where {self.idx.name} says.",
                got=f"{size} bytes",
                expected=f"{total} bytes",
                fix="The file is truncated or belongs to another index; copy it again or tokenize again.",
            )
        return total // item


def first_token_beyond(tokens: np.ndarray, vocab_size: int, *, chunk: int = 1 << 24) -> int | None:
    """Finds the position of the first id outside [0, vocab_size), or None."""
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        if int(part.max()) >= vocab_size or int(part.min()) < 0:
            return start + int(np.flatnonzero((part >= vocab_size) | (part < 0))[0])
    return None


class IndexedWriter:
    """Writes a ``.bin/.idx`` pair that appears whole at ``close()`` or not at all.

    Args:
        prefix: Path without suffix.
        dtype: Number type, see :func:`token_dtype`.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = strip_suffix(prefix), np.dtype(dtype)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._finished = [bin_path(self.prefix), idx_path(self.prefix)]
        self._temporary = [temporary_beside(path) for path in self._finished]
        self._file, self._index = (path.open("wb", buffering=1 << 20) for path in self._temporary)
        for file in (self._file, self._index):
            lock(file)
        self._lengths: list[np.ndarray] = []
        self._boundaries: list[np.ndarray] = [np.zeros(1, np.int64)]
        self._sequences = 0

    def add_documents(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray) -> bytes:
        """Appends documents of one sequence each.

        Args:
            tokens: Their ids, one after the other [sum of lengths].
            lengths: Tokens of each document.

        Returns:
            The bytes written.
        """
        data = np.ascontiguousarray(tokens, self.dtype).tobytes()
        self._append(data, np.asarray(lengths, np.int32), np.arange(1, len(lengths) + 1))
        return data

    def add_indexed(self, source: IndexedFile) -> None:
        """Appends all documents of another pair of the same number type."""
        if source.dtype != self.dtype:
            raise DataError(f"{source.bin} holds {source.dtype}, not {self.dtype}: it cannot be appended.")
        lengths, boundaries = np.asarray(source.sequence_lengths), source._boundaries[1:]
        for start in range(0, source.num_tokens, _CHUNK):
            self._write(source.tokens[start : start + _CHUNK].tobytes())
        self._append(b"", lengths, boundaries)

    def _append(self, data: bytes, lengths: np.ndarray, boundaries: np.ndarray) -> None:
        self._write(data)
        self._lengths.append(lengths)
        self._boundaries.append(boundaries.astype(np.int64) + self._sequences)
        self._sequences += len(lengths)

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise disk_error(error, bin_path(self.prefix)) from error

    def close(self) -> None:
        """Writes the index and renames both files into place, the index last."""
        try:
            self._index.writelines(self._index_parts())
            for file in (self._file, self._index):
                file.flush()
                os.fsync(file.fileno())
            for temporary, finished in zip(self._temporary, self._finished, strict=True):
                os.replace(temporary, finished)
            self._file.close()
            self._index.close()
            fsync_path(self.prefix.parent)
        except OSError as error:
            self.abort()
            raise disk_error(error, self.prefix) from error

    def _index_parts(self) -> Iterable[bytes]:
        count = sum(map(len, self._boundaries))
        yield _HEADER.pack(_MAGIC, 1, _CODE_OF_DTYPE[self.dtype], self._sequences, count)
        yield from (part.astype("<i4").tobytes() for part in self._lengths)
        offset = 0
        for part in self._lengths:
            ends = np.cumsum(part, dtype=np.int64) * self.dtype.itemsize + offset
            yield (ends - part.astype(np.int64) * self.dtype.itemsize).astype("<i8").tobytes()
            offset = int(ends[-1]) if len(ends) else offset
        yield from (part.astype("<i8").tobytes() for part in self._boundaries)

    def abort(self) -> None:
        """Removes what was written."""
        for file in (self._file, self._index):
            with contextlib.suppress(OSError):  # a full disk refuses what is still in the buffer
                file.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
