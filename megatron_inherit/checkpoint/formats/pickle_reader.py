"""Reads torch's ``.pt``, ``.pth``, ``.bin`` files and the pieces of ``.distcp`` files: no torch, no code of theirs run.

Gives the structure as plain Python values in which every tensor is an ``Extent``: where its elements lie, not the
elements. Only names on the list below may occur; classes of Megatron-LM and DeepSpeed become inert records. Both
containers are read: the zip archive of torch >= 1.6 and the older stream (magic number, protocol, system, object,
storage keys, storages).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.extents import ITEM_SIZES, Extent
from megatron_inherit.checkpoint.formats.pickle_machine import (
    MEMBER,
    Global,
    Hooks,
    Machine,
    Opaque,
    PickleRefusedError,
)
from megatron_inherit.checkpoint.formats.zip_directory import ZipRefusedError, zip_entries

DTYPES: Mapping[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""safetensors' names of torch's dtypes."""

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@contextmanager
def mapped(path: Path) -> Iterator[Any]:
    """Maps a file into memory for reading.

    Raises:
        CheckpointError: It is missing or empty.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            data.madvise(mmap.MADV_RANDOM)  # headers are far apart: reading ahead would fetch tensors
            yield data
    except FileNotFoundError as error:
        raise CheckpointError(f"The file {path} is missing.") from error
    except ValueError as error:
        if path.stat().st_size:
            raise
        raise CheckpointError(f"The file {path} is empty.", fix="Copy it again: it is truncated.") from error


def read_torch(path: Path) -> Any:
    """Reads the structure of a file that ``torch.save`` wrote.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is damaged, not torch's, or names something that no checkpoint needs.
    """
    with mapped(path) as data:
        return read_torch_blob(data, path)


def read_torch_blob(data: Any, path: Path, *, start: int = 0, length: int | None = None) -> Any:
    """Reads the structure of what ``torch.save`` wrote somewhere inside a file, as in ``.distcp``.

    Args:
        data: Memory map of the whole file.
        path: The file, for the tensors and for messages.
        start: First byte of the blob.
        length: Number of bytes; to the end of the file by default.

    Raises:
        CheckpointError: As ``read_torch``.
    """
    length = len(data) - start if length is None else length
    if start < 0 or length < 4 or start + length > len(data):
        raise CheckpointError(f"{path} is shorter than the checkpoint's metadata says: it is truncated.")
    try:
        if bytes(data[start : start + 4]) == b"PK\x03\x04":
            return _read_zip(data, path, start, length)
        return _read_stream(data, path, start)
    except (PickleRefusedError, ZipRefusedError) as error:
        raise _refusal(path, error) from error


def read_pickle(path: Path) -> Any:
    """Reads a file that is one plain pickle, such as ``.metadata`` of ``torch.distributed.checkpoint``.

    Raises:
        CheckpointError: As ``read_torch``.
    """
    with mapped(path) as data:
        try:
            return Machine(data, Hooks(_allowed, _CALLS)).run()
        except PickleRefusedError as error:
            raise _refusal(path, error) from error


def fields(value: Any) -> dict[str, Any]:
    """Gives the attributes of a namespace or record, or the items of a dictionary."""
    return value.fields if isinstance(value, Opaque) else value if isinstance(value, dict) else {}


def _refusal(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a checkpoint file that can be trusted: {error}.",
        fix="No code of a pickle is ever run here. Get the file again from its author, as safetensors if there is one.",
    )


def _read_zip(data: Any, path: Path, start: int, length: int) -> Any:
    entries = zip_entries(data, start, length)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ZipRefusedError("it has no data.pkl, so torch did not write it")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in entries:
        offset, size = entries[f"{folder}byteorder"]
        if size > 16 or bytes(data[offset : offset + size]) != b"little":
            raise ZipRefusedError("its numbers are not little-endian")

    def persistent(key: Any) -> Extent:
        dtype, name, numel = _storage_id(key)
        record = entries.get(f"{folder}data/{name}")
        if record is None:
            raise PickleRefusedError(f"it lacks the storage {name}")
        if record[1] != numel * ITEM_SIZES[dtype]:
            raise PickleRefusedError(f"its storage {name} of {numel} x {dtype} has {record[1]} bytes")
        return Extent.dense(str(path), record[0], dtype, (numel,))

    offset, size = entries[pickles[0]]
    return Machine(data, Hooks(_allowed, _CALLS, persistent), start=offset, end=offset + size).run()


def _read_stream(data: Any, path: Path, start: int) -> Any:
    offsets: dict[str, int] = {}
    sizes: dict[str, int] = {}

    def persistent(key: Any) -> Extent:
        dtype, name, numel = _storage_id(key)
        if len(key) > 5 and key[5] is not None:
            raise PickleRefusedError("it holds storage views of torch < 0.4")
        sizes[name] = ITEM_SIZES[dtype]
        return Extent.dense(str(path), offsets.get(name, 0), dtype, (numel,))

    at, starts, values = start, [], []
    for number in range(5):
        machine = Machine(data, Hooks(_allowed, _CALLS, persistent), start=at)
        starts.append(at)
        values.append(machine.run())
        at = machine.position
        if number == 0 and values[0] != _LEGACY_MAGIC:
            raise PickleRefusedError("torch did not write it")
    if values[1] != _LEGACY_PROTOCOL or not fields(values[2]).get("little_endian", True):
        raise PickleRefusedError("it has an unknown protocol or is not little-endian")
    for name in values[4]:
        offsets[name] = at + 8
        at += 8 + int.from_bytes(data[at : at + 8], "little") * sizes.get(name, 1)
    if set(offsets) != set(sizes) or at > len(data):
        raise PickleRefusedError("it lacks elements that its tensors use: it is truncated")
    return Machine(data, Hooks(_allowed, _CALLS, persistent), start=starts[3]).run()


def _storage_id(key: Any) -> tuple[str, str, int]:
    if not (isinstance(key, tuple) and len(key) >= 5 and key[0] == "storage" and isinstance(key[1], Global)):
        raise PickleRefusedError("a tensor refers to something that is not a storage")
    dtype, numel = STORAGES.get(key[1].name), key[4]
    if dtype is None or not isinstance(numel, int) or numel < 0:
        raise PickleRefusedError(f"a tensor has a storage of the unknown kind {key[1]}")
    return dtype, str(key[2]), numel


def _tensor(storage: Any, start: int, shape: Any, strides: Any, *_: Any) -> Extent:
    if not isinstance(storage, Extent) or not all(isinstance(n, int) and n >= 0 for n in (start, *shape, *strides)):
        raise PickleRefusedError("a tensor is not described by numbers")
    if len(shape) != len(strides):
        raise PickleRefusedError("a tensor has more axes than strides")
    offset = storage.offset + start * storage.item_size
    tensor = Extent(storage.file, offset, storage.dtype, tuple(shape), tuple(strides))
    if tensor.end > storage.end:
        raise PickleRefusedError("a tensor reaches beyond its storage")
    return tensor


def _tensor_of_dtype(storage: Any, start: int, shape: Any, strides: Any, *more: Any) -> Extent:
    dtype = more[2]
    if not isinstance(storage, Extent) or not isinstance(dtype, Global) or dtype.name not in DTYPES:
        raise PickleRefusedError(f"a tensor has the unknown type {dtype}")
    name = DTYPES[dtype.name]
    typed = Extent.dense(storage.file, storage.offset, name, (storage.nbytes // ITEM_SIZES[name],))
    return _tensor(typed, start, shape, strides)


def _first(value: Any, *_: Any) -> Any:
    return value


def _subclass(function: Any, _kind: Any, args: Any, _state: Any) -> Any:
    call = _CALLS.get(function) if isinstance(function, Global) else None
    if call is None:
        raise PickleRefusedError(f"a tensor of a subclass is made by {function}")
    return call(*args)


def _encode(text: str, _codec: str = "latin1") -> bytes:
    return text.encode("latin1")


_REBUILD = "torch._utils"
_CALLS: dict[Global, Any] = {
    Global("collections", "OrderedDict"): lambda items=(): dict(items),
    Global("collections", "defaultdict"): lambda _factory=None, items=(): dict(items),
    Global("builtins", "dict"): lambda items=(): dict(items),
    Global("builtins", "set"): lambda items=(): set(items),
    Global("builtins", "frozenset"): lambda items=(): frozenset(items),
    Global("torch", "Size"): lambda items=(): tuple(items),
    Global("torch", "device"): lambda *parts: ":".join(map(str, parts)),
    Global("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
    Global("_codecs", "encode"): _encode,
    Global(_REBUILD, "_rebuild_tensor"): _tensor,
    Global(_REBUILD, "_rebuild_tensor_v2"): _tensor,
    Global(_REBUILD, "_rebuild_tensor_v3"): _tensor_of_dtype,
    Global(_REBUILD, "_rebuild_parameter"): _first,
    Global(_REBUILD, "_rebuild_parameter_with_state"): _first,
    Global("torch._tensor", "_rebuild_from_type_v2"): _subclass,
}
_RECORDS = {
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("collections", "deque"),
    ("collections", "Counter"),
    ("signal", "Signals"),
    ("datetime", "timedelta"),
    ("functools", "partial"),
    ("builtins", "slice"),
    ("builtins", "complex"),
    ("builtins", "range"),
    ("builtins", "bytearray"),
    ("builtins", "int"),
    ("builtins", "float"),
    ("builtins", "list"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch._C", "Generator"),
    ("io", "BytesIO"),
}
_MODULES = (
    "megatron",
    "deepspeed",
    "transformer_engine",
    "apex",
    "torch.optim",
    "torch.distributed.checkpoint",
    "torch.nn.functional",
    "numpy",
)


def _allowed(name: Global) -> bool:
    if name == MEMBER or name in _CALLS or (name.module, name.name) in _RECORDS:
        return True
    if name.module in ("torch", "torch.storage") and name.name in (*DTYPES, *STORAGES, "TypedStorage"):
        return True
    root = name.module
    return any(root == module or root.startswith(f"{module}.") for module in _MODULES)
