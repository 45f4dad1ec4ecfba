"""Where each record of an uncompressed zip archive lies, from its central directory alone.

The archives are those torch writes: every record stored as it is. Anything else (compression, encryption, several
disks, a directory that points outside the file) is refused, so a small file can never become a large one.
Format: APPNOTE.TXT 6.3.10, sections 4.3.7 to 4.3.16, with the ZIP64 fields.
"""

from __future__ import annotations

import struct
from typing import Any

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s4B4HL2L5H2L")
_LOCAL = struct.Struct("<4s2B4HL2L2H")
_FULL32 = 0xFFFFFFFF
_MAX_COMMENT = 0xFFFF
_MAX_RECORDS = 1 << 20


class ZipRefusedError(Exception):
    """The archive is damaged or is not one torch wrote."""


def zip_entries(data: Any, start: int, length: int) -> dict[str, tuple[int, int]]:
    """Lists the records of an archive.

    Args:
        data: Buffer or memory map that holds it.
        start: Its first byte.
        length: Its number of bytes.

    Returns:
        Name of each record -> (offset of its first byte in ``data``, number of bytes).

    Raises:
        ZipRefusedError: See there.
    """
    try:
        count, size, offset = _directory(data, start, length)
        if offset + size > length:
            raise ZipRefusedError("its directory lies outside the file")
        return _read_directory(data, start, length, count=count, at=start + offset, end=start + offset + size)
    except struct.error as error:
        raise ZipRefusedError("its zip directory is truncated") from error


def _directory(data: Any, start: int, length: int) -> tuple[int, int, int]:
    tail_start = max(start, start + length - _END.size)
    if bytes(data[tail_start : tail_start + 4]) != b"PK\x05\x06":  # a comment follows, which torch never writes
        tail_start = max(start, start + length - _END.size - _MAX_COMMENT)
    tail = bytes(data[tail_start : start + length])
    found = tail.rfind(b"PK\x05\x06")
    if found < 0:
        raise ZipRefusedError("it has no zip directory: the file is truncated")
    _, disk, first_disk, _, count, size, offset, _ = _END.unpack_from(tail, found)
    if (disk or first_disk) and (disk, first_disk) != (0xFFFF, 0xFFFF):
        raise ZipRefusedError("it is a part of a split archive")
    if _FULL32 in (size, offset) or count == 0xFFFF:
        locator = tail_start + found - _END64_LOCATOR.size
        if locator >= start and bytes(data[locator : locator + 4]) == b"PK\x06\x07":
            end64 = start + _END64_LOCATOR.unpack_from(data, locator)[2]
            if end64 + _END64.size > start + length:
                raise ZipRefusedError("its directory lies outside the file")
            fields = _END64.unpack_from(data, end64)
            return fields[7], fields[8], fields[9]
    return count, size, offset


def _read_directory(data: Any, start: int, length: int, *, count: int, at: int, end: int) -> dict[str, tuple[int, int]]:
    if count > _MAX_RECORDS or count * _ENTRY.size > end - at:
        raise ZipRefusedError(f"its directory is shorter than its {count} records or names too many")
    records: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        fields = _ENTRY.unpack_from(data, at)
        flags, method = fields[5], fields[6]
        packed, size = fields[10], fields[11]
        name_length, extra_length, comment_length = fields[12:15]
        header = fields[18]
        name = bytes(data[at + _ENTRY.size : at + _ENTRY.size + name_length]).decode("utf-8", "replace")
        extra_at = at + _ENTRY.size + name_length
        if fields[0] != b"PK\x01\x02" or extra_at + extra_length > end:
            raise ZipRefusedError("its directory is damaged")
        size, packed, header = _zip64(bytes(data[extra_at : extra_at + extra_length]), size, packed, header)
        if method or flags & 1 or size != packed:
            raise ZipRefusedError(f"its record {name} is compressed or encrypted, which torch never writes")
        offset = _data_offset(data, start, length, header)
        if offset + size > start + length:
            raise ZipRefusedError(f"its record {name} reaches beyond the end of the file")
        if name in records:
            raise ZipRefusedError(f"it holds the record {name} twice")
        records[name] = (offset, size)
        at = extra_at + extra_length + comment_length
    return records


def _zip64(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        at += 4
        if tag == 1:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, at))
            size = next(numbers, size) if size == _FULL32 else size
            packed = next(numbers, packed) if packed == _FULL32 else packed
            header = next(numbers, header) if header == _FULL32 else header
        at += length
    return size, packed, header


def _data_offset(data: Any, start: int, length: int, header: int) -> int:
    if header + _LOCAL.size > length:
        raise ZipRefusedError("a record lies outside the file")
    fields = _LOCAL.unpack_from(data, start + header)
    if fields[0] != b"PK\x03\x04":
        raise ZipRefusedError("a record has no header where the directory says")
    return start + header + _LOCAL.size + int(fields[-2]) + int(fields[-1])
