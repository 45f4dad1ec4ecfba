"""The ``.metadata`` file of torch.distributed.checkpoint: which chunk of which tensor lies in which file.

Read without unpickling, written without torch. Classes and fields: torch/distributed/checkpoint/metadata.py and
filesystem.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.formats.pickle_machine import Global, Opaque
from megatron_inherit.checkpoint.formats.pickle_reader import DTYPES, fields, read_pickle
from megatron_inherit.checkpoint.formats.pickle_writer import Pickler
from megatron_inherit.checkpoint.formats.pt_writer import dtype_global

Shape = tuple[int, ...]

METADATA = ".metadata"
_CLASSES = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True)
class Blob:
    """What one ``torch.save`` wrote: a run of bytes of a ``.distcp`` file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor.

    Attributes:
        start: First index of the box.
        shape: Its shape.
        blob: Where it is.
    """

    start: Shape
    shape: Shape
    blob: Blob


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor in chunks.

    Attributes:
        dtype: safetensors name.
        shape: Global shape.
        chunks: Boxes that fill it.
    """

    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Metadata:
    """All tensors and all other pickled objects of a checkpoint, by key."""

    tensors: Mapping[str, ChunkedTensor]
    objects: Mapping[str, Blob]


def read_metadata(folder: Path) -> Metadata:
    """Reads the metadata of a folder and checks it against the sizes of the files.

    Raises:
        CheckpointError: It is damaged, names a file that is missing, outside the folder or too short, or holds a class
            that no checkpoint needs.
    """
    path = folder / METADATA
    raw = fields(read_pickle(path))
    entries, storage = raw.get("state_dict_metadata"), raw.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise CheckpointError(f"{path} is not the metadata of a distributed checkpoint.")
    try:
        return _collect(entries, storage, _FileSizes(folder), path)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged.", got=error, fix="Copy the checkpoint again.") from error


def _collect(entries: dict[Any, Any], storage: dict[Any, Any], sizes: _FileSizes, path: Path) -> Metadata:
    blobs: dict[tuple[str, Shape | None], Blob] = {}
    for index, info in storage.items():
        key, where = fields(index), fields(info)
        blob = Blob(where["relative_path"], where["offset"], where["length"])
        sizes.check(blob)
        if where.get("transform_descriptors"):
            raise CheckpointError(f"{path}: {key['fqn']} is stored compressed, which Megatron never does.")
        blobs[key["fqn"], key.get("offset")] = blob
    tensors, objects = {}, {}
    for name, entry in entries.items():
        if entry.kind.name == "BytesStorageMetadata":
            objects[name] = blobs[name, None]
            continue
        found = fields(entry)
        dtype = _dtype(found["properties"])
        shape = found["size"]
        chunks = []
        for chunk in map(fields, found["chunks"]):
            chunks.append(Chunk(chunk["offsets"], chunk["sizes"], blobs[name, chunk["offsets"]]))
        if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
            raise CheckpointError(f"{path}: the chunks of {name} do not fill it.", expected=list(shape))
        tensors[name] = ChunkedTensor(dtype, shape, tuple(chunks))
    return Metadata(tensors, objects)


class _FileSizes:
    """Knows the size of every file of a folder, asked once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._sizes = folder, dict[str, int]()

    def check(self, blob: Blob) -> None:
        """Checks that a blob lies inside its file.

        Raises:
            CheckpointError: It does not.
        """
        size = self._sizes.get(blob.file)
        if size is None:
            if not re.fullmatch(r"[\w.+-]+", blob.file) or blob.file.startswith(".."):
                raise CheckpointError(f"{self._folder / METADATA} names a file outside its folder.", got=blob.file)
            path = self._folder / blob.file
            if not path.is_file():
                raise CheckpointError(f"The file {path} is missing.", fix="Copy the checkpoint again.")
            size = self._sizes[blob.file] = path.stat().st_size
        if not 0 <= blob.offset <= blob.offset + blob.length <= size:
            raise CheckpointError(
                f"{self._folder / blob.file} is truncated.", got=size, expected=blob.offset + blob.length
            )


def _dtype(properties: Any) -> str:
    state = properties.state
    name = str((state["dtype"] if isinstance(state, dict) else state[0]).name)
    return DTYPES.get(name, name)


def write_metadata(metadata: Metadata) -> bytes:
    """Gives the bytes of a ``.metadata`` file that ``torch.distributed.checkpoint`` and Megatron-Core read."""
    entries: dict[str, Any] = {}
    storage: dict[Opaque, Opaque] = {}
    for name, tensor in metadata.tensors.items():
        chunks = [
            _record("ChunkStorageMetadata", offsets=_size(chunk.start), sizes=_size(chunk.shape))
            for chunk in tensor.chunks
        ]
        properties = Opaque(Global(_CLASSES, "TensorProperties"), (), _properties(tensor.dtype))
        entries[name] = _record("TensorStorageMetadata", properties=properties, size=_size(tensor.shape), chunks=chunks)
        for number, chunk in enumerate(tensor.chunks):
            storage[_record("MetadataIndex", fqn=name, offset=_size(chunk.start), index=number)] = _info(chunk.blob)
    for name, blob in metadata.objects.items():
        entries[name] = Opaque(Global(_CLASSES, "BytesStorageMetadata"))
        storage[_record("MetadataIndex", fqn=name, offset=None, index=None)] = _info(blob)
    whole = _record("Metadata", state_dict_metadata=entries, planner_data=None, storage_data=storage, storage_meta=None)
    return Pickler().dumps(whole)


def _record(kind: str, **state: Any) -> Opaque:
    return Opaque(Global(_CLASSES, kind), (), state)


def _size(shape: Shape) -> Opaque:
    return Opaque(Global("torch", "Size"), (shape,))


def _info(blob: Blob) -> Opaque:
    state = {"relative_path": blob.file, "offset": blob.offset, "length": blob.length}
    return Opaque(Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), (), state)


def _properties(dtype: str) -> tuple[Any, ...]:
    layout = Opaque(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Opaque(Global(_CLASSES, "_MEM_FORMAT_ENCODING"), (0,))
    return (dtype_global(dtype), layout, False, memory_format, False)
