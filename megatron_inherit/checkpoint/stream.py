"""Sources and sinks of tensors.

A *source* is a checkpoint whose headers were read: it knows where every canonical tensor lies and reads boxes of them.
A *sink* is a checkpoint that does not exist yet: it knows where every canonical tensor will lie.
Neither holds a tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.atomic import write_bytes
from megatron_inherit.base.errors import AbsentError, CheckpointError
from megatron_inherit.checkpoint.checksums import Checksums
from megatron_inherit.checkpoint.dtypes import CARRIERS
from megatron_inherit.checkpoint.extents import ITEM_SIZES, Extent, Piece, Shape, dense_strides
from megatron_inherit.checkpoint.files import FilePool, file_pool
from megatron_inherit.checkpoint.gather import gather

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Decode:
    """A pure function between the stored and the canonical values of a tensor, row by row.

    Attributes:
        name: What the plan prints, for instance ``dequantise``.
        arguments: JSON-able arguments, for the plan.
        stored_shape: Shape of the stored array; axis 0 is the canonical one.
        stored_dtype: Its type.
        apply: Takes stored rows [n, ...] of the carrier type and gives canonical rows [n, ...].
        positional: ``apply`` takes the index of the first row too.
        beside_bytes: What a read of the whole tensor fetches beside its stored array.
    """

    name: str
    arguments: Mapping[str, Any]
    stored_shape: Shape
    stored_dtype: str
    apply: Callable[..., np.ndarray]
    positional: bool = False
    beside_bytes: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A canonical tensor in a checkpoint.

    Attributes:
        shape: Canonical shape.
        dtype: Safetensors name of the canonical elements.
        pieces: Where its elements are; those of a source are disjoint and complete, those of a sink may repeat.
        decode: Set where the stored values are not the canonical ones.
    """

    shape: Shape
    dtype: str
    pieces: tuple[Piece, ...]
    decode: Decode | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical elements."""
        return self.numel * ITEM_SIZES[self.dtype]

    @property
    def stored_bytes(self) -> int:
        """Bytes that a read of all of it fetches."""
        beside = 0 if self.decode is None else self.decode.beside_bytes
        return sum(piece.extent.nbytes for piece in self.pieces) + beside

    @property
    def files(self) -> tuple[str, ...]:
        """The files it lies in."""
        return tuple(dict.fromkeys(piece.extent.file for piece in self.pieces))


@dataclass(frozen=True)
class RawTensor:
    """Elements without a tensor library.

    Attributes:
        dtype: Safetensors name.
        shape: Of the elements.
        data: Their bytes in row-major order, a one-dimensional uint8 array.
    """

    dtype: str
    shape: Shape
    data: np.ndarray

    def array(self) -> np.ndarray:
        """Gives the elements in their numpy carrier (bfloat16 as uint16)."""
        return self.data.view(CARRIERS[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class SideFile:
    """A small file that travels with the weights: tokenizer, licence, generation settings.

    Attributes:
        name: File name in the folder that is written.
        file: Path or URL to copy from, or None where ``content`` holds the bytes.
    """

    name: str
    file: str | None = None
    content: bytes | None = None

    def read(self, pool: FilePool) -> bytes:
        """Gives the bytes; 256 MB at most."""
        if self.content is not None:
            return self.content
        if self.file is None:
            raise CheckpointError(f"The side file {self.name} has no content.")
        return pool.read_all(self.file, limit=1 << 28)


def write_side_files(folder: Path, files: Sequence[SideFile]) -> None:
    """Copies small files into a folder, which is made if there are any; each appears whole and is durable."""
    if files:
        folder.mkdir(exist_ok=True)
    with file_pool() as pool:
        for file in files:
            write_bytes(folder / file.name, file.read(pool))


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be read.

    Attributes:
        format: ``hf``, ``gguf``, ``meta``, ``megatron``, ``torch_dist``, ``ds_universal``, ``ds_zero`` or ``native``.
        path: What the user named.
        config: The model; ``attn_scale_by_layer`` is always folded.
        tensors: Weights by canonical name, in the order of ``enumerate_tensors``.
        optimizer: fp32 weights and moments where the checkpoint has them, keyed ``fp32:NAME``, ``exp_avg:NAME`` and
            ``exp_avg_sq:NAME``.
        own: With shared stages, what layers have of their own, by its stored name (and ``KIND:NAME``); then also all
            weights before that is folded into them, as ``unfolded:NAME``.
        side_files: What travels with the weights.
        hf_config: The teacher's ``config.json``, for formats that carry one.
        details: JSON-able facts for ``inspect`` (parallel sizes, iteration, version).
        identity: Hash of each header, index and configuration read, by file name.
        licence: SPDX identifier or name of the licence, if the checkpoint tells.
        checksums: Hashes of what the tensors lie in, for formats that keep them.
    """

    format: str
    path: str
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    optimizer: Mapping[str, StoredTensor] = field(default_factory=dict)
    own: Mapping[str, StoredTensor] = field(default_factory=dict)
    side_files: tuple[SideFile, ...] = ()
    hf_config: Mapping[str, Any] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""
    checksums: Checksums = field(default_factory=Checksums, repr=False, compare=False)
    pool: FilePool = field(default_factory=FilePool, repr=False, compare=False)

    def find(self, key: str) -> StoredTensor:
        """Looks a weight (``NAME``) or an optimizer tensor (``KIND:NAME``) up.

        Raises:
            AbsentError: It is not there.
        """
        found = self.tensors.get(key) or self.optimizer.get(key) or self.own.get(key)
        if found is None:
            raise AbsentError(f"{self.path} has no tensor {key}.")
        return found

    def read(self, key: str, box: Box | None = None) -> RawTensor:
        """Reads a box of a canonical tensor and no byte more than its layout asks for.

        Args:
            key: Canonical name, or ``KIND:NAME`` for optimizer state.
            box: A slice a dimension, of step 1; default everything.
        """
        stored = self.find(key)
        start, shape = bounds(stored.shape, box)
        values = read_box(self.pool, stored, start, shape)
        return RawTensor(stored.dtype, shape, np.ascontiguousarray(values).reshape(-1).view(np.uint8))

    def check(self, key: str) -> None:
        """Compares the bytes that a tensor lies in with their hashes, where the format keeps any.

        Raises:
            CheckpointError: They were changed, or the tensor is not there.
        """
        self.checksums.check(self.find(key))

    def close(self) -> None:
        """Closes the files."""
        self.pool.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class SinkOptions:
    """How a checkpoint is to be laid out; a format ignores what it does not know of.

    Attributes:
        tp, pp, vpp: Tensor, pipeline and virtual pipeline parallel sizes.
        vocab_multiple: The vocabulary is padded to a multiple of this times ``tp`` where the format pads.
        max_shard_bytes: Largest file of a sharded Hugging Face folder.
        dialect: Format-specific variant, for instance ``legacy`` names of Megatron.
        iteration: Number in the names and trackers of training formats.
        optimizer: Optimizer tensors are written too.
        adam: Adam's two betas and epsilon where they are known, else empty.
        hf_config: ``config.json`` to start from, for formats that carry one.
        side_files: Copied into the folder by formats that carry them.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    vocab_multiple: int = 128
    max_shard_bytes: int = 5_000_000_000
    dialect: str = ""
    iteration: int = 0
    optimizer: bool = False
    adam: tuple[float, ...] = ()
    hf_config: Mapping[str, Any] | None = None
    side_files: tuple[SideFile, ...] = ()


@dataclass(frozen=True)
class Sink:
    """A checkpoint that can be written.

    Attributes:
        format: As in ``Source``.
        config: The model.
        tensors: Where each canonical tensor (or ``KIND:NAME``) goes; files are relative to the output folder. Boxes of
            one tensor may repeat (replicas on tensor-parallel ranks, a tied head on the last stage).
        sizes: Exact size of every container file, by relative name.
        prepare: Creates the containers in a folder: headers, metadata, exact sizes; ``files.create_file`` helps.
            What no tensor covers must read as zeros or be right already.
        finish: Called when all bytes are in place, to write what must come last (checksums, index, config, trackers).
    """

    format: str
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    sizes: Mapping[str, int]
    prepare: Callable[[Path], None]
    finish: Callable[[Path], None]

    @property
    def total_bytes(self) -> int:
        """Bytes of all containers."""
        return sum(self.sizes.values())

    def rooted(self, folder: Path) -> Mapping[str, StoredTensor]:
        """Gives the tensors with the files inside ``folder``."""
        return {key: dataclasses.replace(t, pieces=_rooted(t.pieces, str(folder))) for key, t in self.tensors.items()}


def bounds(shape: Shape, box: Box | None) -> tuple[Shape, Shape]:
    """Turns slices into (start, shape).

    Raises:
        CheckpointError: The box lies outside the tensor.
    """
    if box is None:
        return (0,) * len(shape), shape
    start, size = [], []
    for extent, part in zip(shape, box, strict=True):
        low, high, step = part.indices(extent)
        if step != 1 or high < low:
            raise CheckpointError(f"{part} is not a box of a tensor of shape {shape}.")
        start.append(low)
        size.append(high - low)
    return tuple(start), tuple(size)


def read_box(
    pool: FilePool, stored: StoredTensor, start: Shape, shape: Shape, out: np.ndarray | None = None
) -> np.ndarray:
    """Reads a box of a canonical tensor, decoded.

    Args:
        pool: Where files are opened.
        stored: The tensor.
        start: First index of the box.
        shape: Its shape.
        out: Array of the carrier type and shape to fill, to spare an allocation.
    """
    decode = stored.decode
    if decode is None:
        return gather(pool, stored.pieces, start, shape, stored.dtype, out)
    first = (start[0], *(0,) * (len(decode.stored_shape) - 1))
    rows = gather(pool, stored.pieces, first, (shape[0], *decode.stored_shape[1:]), decode.stored_dtype)
    values = decode.apply(rows, start[0]) if decode.positional else decode.apply(rows)
    inner = tuple(slice(low, low + size) for low, size in zip(start[1:], shape[1:], strict=True))
    return values[(slice(None), *inner)]


def _rooted(pieces: Iterable[Piece], folder: str) -> tuple[Piece, ...]:
    return tuple(
        Piece(piece.start, dataclasses.replace(piece.extent, file=f"{folder}/{piece.extent.file}")) for piece in pieces
    )


def dense_tensor(file: str, offset: int, dtype: str, shape: Sequence[int]) -> StoredTensor:
    """Describes a tensor that lies row-major in one place."""
    extent = Extent(file, offset, dtype, tuple(shape), dense_strides(shape))
    return StoredTensor(tuple(shape), dtype, (Piece((0,) * len(shape), extent),))
