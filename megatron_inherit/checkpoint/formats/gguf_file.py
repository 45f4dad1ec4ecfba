"""The GGUF container: typed metadata, tensor table, aligned data.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.files import FilePool

MAX_HEADER = 1 << 28
"""The metadata of a file may not be longer than this, in bytes; vocabularies take a few million."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FIRST_READ = 1 << 22


@dataclass(frozen=True)
class GgufTensor:
    """An entry of the tensor table.

    Attributes:
        name: As stored.
        shape: Outermost dimension first (the file has them reversed).
        kind: Number of the ggml type.
        offset: Byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key, tensors by name, and the number of bytes before the data."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    length: int


def read_gguf(pool: FilePool, file: str) -> GgufHeader:
    """Reads the metadata and the tensor table.

    Raises:
        CheckpointError: The file is no GGUF file, is truncated or has counts that cannot be.
    """
    size = pool.size(file)
    length = min(size, _FIRST_READ)
    while True:
        try:
            return _parse(pool.read(file, 0, length), file)
        except (struct.error, IndexError) as error:
            if length >= min(size, MAX_HEADER):
                raise CheckpointError(
                    f"{file} is truncated or its metadata is damaged.", fix="Download the file again."
                ) from error
            length = min(size, MAX_HEADER, 4 * length)


def _parse(data: bytes, file: str) -> GgufHeader:
    magic, version, tensor_count, key_count = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version not in (2, 3):
        raise CheckpointError(f"{file} is no GGUF file of version 2 or 3.", got=f"{magic!r}, version {version}")
    if tensor_count > 1 << 20 or key_count > 1 << 16:
        raise CheckpointError(f"{file} has impossible counts.", got=f"{tensor_count} tensors, {key_count} keys")
    reader = _Reader(data, 24)
    metadata = {}
    for _ in range(key_count):
        key = reader.string()
        metadata[key] = reader.value(reader.number("I"), file)
    table = [_tensor(reader, file) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{file} has an impossible alignment.", got=alignment)
    base = -(-reader.at // alignment) * alignment
    tensors = {name: GgufTensor(name, shape, kind, base + offset) for name, shape, kind, offset in table}
    return GgufHeader(metadata, tensors, base)


def _tensor(reader: _Reader, file: str) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = reader.string(), reader.number("I")
    if dimensions > 4:
        raise CheckpointError(f"{file}: tensor {name} has an impossible shape.", got=f"{dimensions} dimensions")
    shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
    if math.prod(shape) >= 1 << 60:
        raise CheckpointError(f"{file}: tensor {name} has an impossible shape.", got=shape)
    return name, shape, reader.number("I"), reader.number("Q")


class _Reader:
    """A cursor over the header; running over its end raises ``struct.error`` or ``IndexError``."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def number(self, code: str) -> Any:
        form = struct.Struct("<" + code)
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def string(self) -> str:
        length = self.number("Q")
        if length > len(self.data) - self.at:
            raise IndexError
        text = self.data[self.at : self.at + length].decode(errors="surrogateescape")
        self.at += length
        return text

    def value(self, kind: int, file: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise CheckpointError(f"{file} has metadata of an unknown type.", got=kind)
        kind, count = self.number("I"), self.number("Q")
        if count > len(self.data) - self.at:
            raise IndexError
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{file} has a nested array in its metadata.")
        form = struct.Struct(f"<{count}{_SCALARS[kind]}")
        values = list(form.unpack_from(self.data, self.at))
        self.at += form.size
        return values
