"""Lays out the zip archive that ``torch.save`` would write, byte for byte but for the tensors, which are filled later.

Every size is known beforehand, so the headers are exact and the elements of a tensor start at a fixed, 64-byte aligned
offset. The check sums of the filled records are patched in at the end (``patch_checksums``); ``torch.load`` with
``weights_only`` and ``mmap``, and Python's ``zipfile``, accept the result.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_inherit.checkpoint.extents import ITEM_SIZES, Extent, dense_strides
from megatron_inherit.checkpoint.formats.pickle_machine import Global
from megatron_inherit.checkpoint.formats.pickle_reader import DTYPES, STORAGES
from megatron_inherit.checkpoint.formats.pickle_writer import Pickler

ALIGNMENT = 64
_TILE = 1 << 20
_FULL32 = 0xFFFFFFFF
_DOS_DATE = 0x0021
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}
_DTYPE_NAMES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Blank:
    """A tensor whose elements come later.

    Attributes:
        dtype: safetensors name.
        shape: Elements along each axis.
        data: Its elements where they are known already.
        zeros: It stays all zeros, as the file is created.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | None = None
    zeros: bool = False


@dataclass(frozen=True)
class Record:
    """Where a filled record and the two copies of its check sum lie in the file."""

    offset: int
    size: int
    checksum_at: tuple[int, int]


@dataclass(frozen=True)
class Archive:
    """The layout of one archive inside a file.

    Attributes:
        length: Bytes of the archive.
        segments: Bytes that are known now, by offset in the file.
        extents: Where each ``Blank`` without data goes, in the order of their appearance in the value.
        records: Those to patch once they are filled.
    """

    length: int
    segments: tuple[tuple[int, bytes], ...]
    extents: tuple[Extent, ...]
    records: tuple[Record, ...]


def dtype_global(dtype: str) -> Global:
    """Gives the pickled name of a dtype (``torch.bfloat16`` for ``BF16``)."""
    return Global("torch", _DTYPE_NAMES[dtype])


def lay_out(file: str, value: Any, *, start: int = 0) -> Archive:
    """Lays out the archive of a value.

    Args:
        file: The file's path as the extents shall name it.
        value: Plain data, ``Global``, ``Opaque`` and ``Blank``.
        start: Where the archive begins in the file.
    """
    blanks: list[Blank] = []

    def storage(tensor: Any) -> tuple[tuple[Any, ...], Any, Any] | None:
        if not isinstance(tensor, Blank):
            return None
        kind = Global("torch", _STORAGE_NAMES[tensor.dtype])
        blanks.append(tensor)
        storage_id = ("storage", kind, str(len(blanks) - 1), "cpu", math.prod(tensor.shape))
        return storage_id, tensor.shape, dense_strides(tensor.shape)

    program = Pickler(storage).dumps(value)
    archive = _Layout(file, start)
    archive.add_bytes("data.pkl", program)
    archive.add_bytes("byteorder", b"little")
    for index, blank in enumerate(blanks):
        if blank.data is None:
            archive.add_blank(f"data/{index}", blank)
        else:
            archive.add_bytes(f"data/{index}", blank.data)
    archive.add_bytes("version", b"3\n")
    return archive.finish()


def create_archives(path: Path, archives: Iterable[Archive]) -> None:
    """Creates a file of archives laid out one after another; the tensors read as zeros until they are filled.

    Args:
        path: The file, which must not exist.
        archives: All archives of the file, in order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        for archive in archives:
            for offset, data in archive.segments:
                file.seek(offset)
                file.write(data)


def patch_checksums(path: Path, records: Iterable[Record]) -> None:
    """Computes the check sums of filled records, several at once, and writes them into the headers.

    Args:
        path: The filled file.
        records: Of all archives in it.
    """
    wanted = list(records)
    descriptor = os.open(path, os.O_RDWR)
    try:
        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
            sums = pool.map(lambda record: _checksum(descriptor, record), wanted)
            for record, checksum in zip(wanted, sums, strict=True):
                for offset in record.checksum_at:
                    os.pwrite(descriptor, struct.pack("<I", checksum), offset)
    finally:
        os.close(descriptor)


def _checksum(descriptor: int, record: Record) -> int:
    """Gives the CRC-32 of a record, read in tiles."""
    buffer = bytearray(min(_TILE, record.size))
    checksum, done = 0, 0
    while done < record.size:
        view = memoryview(buffer)[: record.size - done]
        count = os.preadv(descriptor, [view], record.offset + done)
        if not count:
            raise EOFError("the file is shorter than planned")
        checksum = zlib.crc32(view[:count], checksum)
        done += count
    return checksum


def checksum_of_zeros(size: int) -> int:
    """Gives the CRC-32 of zero bytes without looking at them: a zero byte is a linear map of the register's 32 bits."""
    register = _FULL32
    step = [zlib.crc32(b"\0", (1 << bit) ^ _FULL32) ^ _FULL32 for bit in range(32)]
    while size:
        if size & 1:
            register = _times(step, register)
        step = [_times(step, column) for column in step]
        size >>= 1
    return register ^ _FULL32


def _times(columns: list[int], vector: int) -> int:
    """Multiplies a matrix over GF(2), given by its columns, with a vector of bits."""
    product = 0
    for column in columns:
        if vector & 1:
            product ^= column
        vector >>= 1
    return product


class _Layout:
    """Places records one after another."""

    def __init__(self, file: str, start: int) -> None:
        self._file, self._start, self._at = file, start, start
        self._segments: list[tuple[int, bytes]] = []
        self._central = bytearray()
        self._extents: list[Extent] = []
        self._blanks: list[tuple[int, int, int, int]] = []
        self._count = 0

    def add_bytes(self, name: str, data: bytes) -> None:
        """Adds a record whose bytes are known."""
        offset = self._header(name, len(data), zlib.crc32(data))[1]
        self._segments.append((offset, data))

    def add_blank(self, name: str, blank: Blank) -> None:
        """Adds a record that is filled later, or stays zeros."""
        size = ITEM_SIZES[blank.dtype] * math.prod(blank.shape)
        header, offset, central = self._header(name, size, checksum_of_zeros(size) if blank.zeros else 0)
        self._extents.append(Extent.dense(self._file, offset, blank.dtype, blank.shape))
        if not blank.zeros:
            self._blanks.append((offset, size, header + 14, central + 16))

    def _header(self, name: str, size: int, checksum: int) -> tuple[int, int, int]:
        """Writes both headers of a record; gives the offsets of the local one, the data, and the central one."""
        encoded = f"archive/{name}".encode()
        header, relative = self._at, self._at - self._start
        large = size >= _FULL32
        sizes = (_FULL32, _FULL32) if large else (size, size)
        extra = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
        unpadded = header + 30 + len(encoded) + len(extra) + 4
        padding = -unpadded % ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        fixed = (0, 0x0800, 0, 0, _DOS_DATE, checksum, *sizes, len(encoded), len(extra))
        local = struct.pack("<4s5H3I2H", b"PK\x03\x04", *fixed) + encoded + extra
        offset = header + len(local)
        self._segments.append((header, local))
        wide = [size, size] if large else []
        far = relative >= _FULL32
        wide += [relative] if far else []
        more = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        central = len(self._central)
        entry = (0, 0, 0x0800, 0, 0, _DOS_DATE, checksum, *sizes, len(encoded), len(more), 0, 0, 0, 0)
        self._central += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *entry, _FULL32 if far else relative)
        self._central += encoded + more
        self._count += 1
        self._at = offset + size
        return header, offset, central

    def finish(self) -> Archive:
        """Adds the directory; it always has the 64-bit form too, as torch writes it."""
        at, relative, size = self._at, self._at - self._start, len(self._central)
        records = tuple(
            Record(offset, length, (local, at + central)) for offset, length, local, central in self._blanks
        )
        end = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, self._count, self._count, size, relative)
        end += struct.pack("<4sIQI", b"PK\x06\x07", 0, relative + size, 1)
        count = min(self._count, 0xFFFF)
        end += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, min(size, _FULL32), min(relative, _FULL32), 0)
        self._segments.append((at, bytes(self._central) + end))
        length = relative + size + len(end)
        return Archive(length, _joined(self._segments), tuple(self._extents), records)


def _joined(segments: list[tuple[int, bytes]]) -> tuple[tuple[int, bytes], ...]:
    """Joins segments that follow one another without a gap."""
    joined: list[tuple[int, bytearray]] = []
    for offset, data in segments:
        if joined and joined[-1][0] + len(joined[-1][1]) == offset:
            joined[-1][1].extend(data)
        else:
            joined.append((offset, bytearray(data)))
    return tuple((offset, bytes(data)) for offset, data in joined)
