"""Writes plain values, tensors to be filled later and records of named classes as a pickle of protocol 2.

The counterpart of ``pickle_machine``: what that reads as ``Global`` and ``Opaque``, this writes, so the metadata of a
checkpoint can be edited without importing its classes. Equal strings, names and small constant records are written
once and recalled.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from megatron_inherit.checkpoint.formats.pickle_machine import Global, Opaque

_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_HOOKS = Global("collections", "OrderedDict")


class Pickler:
    """Collects the program of one value.

    Args:
        storage: Gives the persistent id of a value that is a tensor as (id, shape, strides), or None for other values.
    """

    def __init__(self, storage: Callable[[Any], tuple[tuple[Any, ...], Any, Any] | None] | None = None) -> None:
        self._storage = storage
        self._out = bytearray(b"\x80\x02")
        self._memo: dict[Any, int] = {}

    def dumps(self, value: Any) -> bytes:
        """Gives the whole pickle of a value made of plain data, ``Global``, ``Opaque`` and tensors.

        Raises:
            TypeError: The value holds something else.
        """
        self._write(value)
        return bytes(self._out + b".")

    def _write(self, value: Any) -> None:
        writer = _WRITERS.get(type(value))
        if writer is not None:
            writer(self, value)
            return
        found = None if self._storage is None else self._storage(value)
        if found is None:
            raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")
        self._tensor(*found)

    def _once(self, key: Any, write: Callable[[], None]) -> None:
        index = self._memo.get(key)
        if index is not None:
            self._out += b"h" + bytes([index]) if index < 256 else b"j" + index.to_bytes(4, "little")
            return
        write()
        index = self._memo[key] = len(self._memo)
        self._out += b"q" + bytes([index]) if index < 256 else b"r" + index.to_bytes(4, "little")

    def _text(self, value: str) -> None:
        data = value.encode("utf-8", "surrogatepass")
        self._once(value, lambda: self._add(b"X" + len(data).to_bytes(4, "little") + data))

    def _add(self, data: bytes) -> None:
        self._out += data

    def _integer(self, value: int) -> None:
        if 0 <= value < 256:
            self._out += b"K" + bytes([value])
        elif 0 <= value < 65536:
            self._out += b"M" + value.to_bytes(2, "little")
        elif -(1 << 31) <= value < 1 << 31:
            self._out += b"J" + value.to_bytes(4, "little", signed=True)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self._out += b"\x8a" + bytes([len(data)]) + data

    def _tuple(self, value: tuple[Any, ...]) -> None:
        if not value:
            self._out += b")"
            return
        if len(value) > 3:
            self._out += b"("
        for item in value:
            self._write(item)
        self._out += {1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(value), b"t")

    def _list(self, value: list[Any]) -> None:
        self._out += b"]("
        for item in value:
            self._write(item)
        self._out += b"e"

    def _dict(self, value: dict[Any, Any]) -> None:
        self._out += b"}("
        for key, item in value.items():
            self._write(key)
            self._write(item)
        self._out += b"u"

    def _global(self, value: Global) -> None:
        self._once(value, lambda: self._add(f"c{value.module}\n{value.name}\n".encode()))

    def _bytes(self, value: bytes) -> None:
        self._write(Opaque(Global("_codecs", "encode"), (value.decode("latin-1"), "latin1")))

    def _opaque(self, value: Opaque) -> None:
        if value.state is None and not value.items:
            self._once((value.kind, repr(value.args)), lambda: self._call(value, b"R"))
            return
        self._call(value, b"R" if value.args else b"\x81")
        if value.state is not None:
            self._write(value.state)
            self._out += b"b"
        if value.items:
            raise TypeError(f"a record of {value.kind} with items cannot be written")

    def _call(self, value: Opaque, code: bytes) -> None:
        self._global(value.kind)
        self._tuple(value.args)
        self._out += code

    def _tensor(self, storage_id: tuple[Any, ...], shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self._global(_REBUILD)
        self._out += b"("
        self._tuple(storage_id)
        self._out += b"Q"
        self._integer(0)
        self._tuple(shape)
        self._tuple(strides)
        self._out += b"\x89"
        self._global(_HOOKS)
        self._out += b")RtR"


_WRITERS: dict[type, Callable[[Pickler, Any], None]] = {
    type(None): lambda p, _: p._add(b"N"),
    bool: lambda p, value: p._add(b"\x88" if value else b"\x89"),
    int: Pickler._integer,
    float: lambda p, value: p._add(b"G" + struct.pack(">d", value)),
    str: Pickler._text,
    bytes: Pickler._bytes,
    tuple: Pickler._tuple,
    list: Pickler._list,
    set: lambda p, value: p._opaque(Opaque(Global("__builtin__", "set"), (list(value),))),
    dict: Pickler._dict,
    Global: Pickler._global,
    Opaque: Pickler._opaque,
}
