"""Carries one operation out: tiles of canonical rows are read, hashed, cast and written, never a whole tensor."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from megatron_inherit.arch.tensors import TensorSpec
from megatron_inherit.base.errors import CheckpointError, PlanError
from megatron_inherit.checkpoint.dtypes import CARRIERS, LARGEST, cast, overflow
from megatron_inherit.checkpoint.extents import Shape
from megatron_inherit.checkpoint.files import FilePool
from megatron_inherit.checkpoint.formats.safetensors_file import read_header
from megatron_inherit.checkpoint.gather import empty_box, is_transposed, scatter
from megatron_inherit.checkpoint.manifest import TILE_BYTES, TensorHash, row_tiles, turned_rows
from megatron_inherit.checkpoint.packing import BESIDE, encode, form_of
from megatron_inherit.checkpoint.stream import Source, StoredTensor, dense_tensor, read_box
from megatron_inherit.plan.functions import apply
from megatron_inherit.plan.init import draw
from megatron_inherit.plan.ops import Compute, Copy, File, Init, Op, Tie

Tile = tuple[Shape, np.ndarray]
"""(first index, values in the carrier type of the target)."""

TRANSPOSED_BYTES = 96 << 20
"""Of all threads together, what a copy holds of tensors that are stored transposed: the more, the longer the runs."""

Progress = Callable[[int], None]
"""Called with the bytes that were written since the last call, from any thread."""


@dataclass
class Mover:
    """Fills the tensors of a sink.

    Attributes:
        source: What is read, or None.
        targets: The sink's tensors with absolute files.
        specs: The output's tensors by canonical name.
        ops: The operations by target.
        pool: Where the output's files are opened.
        progress: Told of the bytes written.
        threads: How many run operations at once.
    """

    source: Source | None
    targets: Mapping[str, StoredTensor]
    specs: Mapping[str, TensorSpec]
    ops: Mapping[str, Op]
    pool: FilePool
    progress: Progress
    threads: int = 1
    _buffers: threading.local = dataclasses.field(default_factory=threading.local)

    def run(self, op: Op) -> TensorHash:
        """Writes one tensor and gives the hash of what was written.

        Raises:
            CheckpointError: What it reads was changed since it was saved, or a value is too large for its new type.
        """
        for name in op.inputs:
            self._source().check(name)
        self._buffers.lost = []
        entry = self._run(op)
        _refuse_lost(op, self._buffers.lost)
        return entry

    def _run(self, op: Op) -> TensorHash:
        target, beside = self.targets[op.target], self.targets.get(f"{BESIDE}{op.target}")
        if beside is not None:
            return self._pack(op, target, beside)
        if not target.pieces:  # a format that holds weights as the optimizer's alone
            op = self.ops[f"fp32:{op.target}"]
        digest = xxhash.xxh3_128()
        pieces = () if self._is_held(op) else target.pieces
        as_stored = is_transposed(pieces)
        for start, values in self._tiles(op, target):
            for first, rows in turned_rows(values):
                digest.update(rows.data)
                if not as_stored:
                    scatter(self.pool, pieces, (start[0] + first, *start[1:]), rows)
            if as_stored:
                scatter(self.pool, pieces, start, values)
            self.progress(values.nbytes)
        return TensorHash(op.dtype, op.shape, digest.hexdigest())

    def _pack(self, op: Op, target: StoredTensor, beside: StoredTensor) -> TensorHash:
        """Writes a matrix packed; the hash is that of the values which it stands for."""
        made = self.ops[op.to] if isinstance(op, Tie) else op
        form = form_of(made.function, made.arguments) if isinstance(made, Compute) else None
        if form is None or not isinstance(made, Compute):
            raise PlanError(f"{op.target} is stored packed, and {made.describe()} gives it no such form.")
        packed = encode(self._inputs(made)[0], form, op.dtype)
        if not self._is_held(op):
            scatter(self.pool, target.pieces, (0, 0), np.ascontiguousarray(packed.weight))
            scatter(self.pool, beside.pieces, (0,) * packed.beside.ndim, np.ascontiguousarray(packed.beside))
        self.progress(packed.values.nbytes)
        return TensorHash(op.dtype, op.shape, xxhash.xxh3_128_hexdigest(np.ascontiguousarray(packed.values).data))

    def _is_held(self, op: Op) -> bool:
        """Tells whether the place of a tied tensor is that of the one it is tied to, which is written once."""
        return isinstance(op, Tie) and self.targets[op.target].pieces == self.targets[op.to].pieces

    def _tiles(self, op: Op, target: StoredTensor) -> Iterator[Tile]:
        if isinstance(op, Tie):
            op = dataclasses.replace(self.ops[op.to], target=op.to)
        if isinstance(op, Copy):
            return self._copy(op, self._source().find(op.source), target)
        if isinstance(op, Init):
            return self._draw(op)
        if isinstance(op, File):
            return self._file(op, target)
        if isinstance(op, Compute):
            return self._compute(op)
        raise PlanError(f"Unknown operation {op.kind!r}.")

    def _copy(self, op: Copy, stored: StoredTensor, target: StoredTensor) -> Iterator[Tile]:
        if op.box is not None:
            yield from self._copy_box(op, stored, op.box)
            return
        wide = TRANSPOSED_BYTES // self.threads if op.dtype == stored.dtype else 0
        for start, shape in row_tiles(stored, target, transposed_bytes=wide):
            values = read_box(self._source().pool, stored, start, shape, self._buffer(stored, shape))
            yield start, self._cast(values, stored.dtype, op.dtype)

    def _copy_box(self, op: Copy, stored: StoredTensor, box: Sequence[tuple[int, int]]) -> Iterator[Tile]:
        step = max(1, TILE_BYTES // max(1, stored.nbytes // stored.shape[0]))
        for first in range(box[0][0], box[0][1], step):
            start = (first, *(low for low, _ in box[1:]))
            shape = (min(step, box[0][1] - first), *(high - low for low, high in box[1:]))
            values = read_box(self._source().pool, stored, start, shape)
            yield (first - box[0][0], *(0,) * (len(box) - 1)), self._cast(values, stored.dtype, op.dtype)

    def _draw(self, op: Init) -> Iterator[Tile]:
        spec = dataclasses.replace(self.specs[op.target.rpartition(":")[2]], init=op.init)
        row = math.prod(op.shape[1:])
        step = max(1, TILE_BYTES // (4 * row))
        for first in range(0, op.shape[0], step):
            count = min(step, op.shape[0] - first)
            values = draw(
                spec,
                num_layers=op.num_layers,
                seed=op.seed,
                start=first * row,
                stop=(first + count) * row,
                std=op.std,
            )
            yield (
                (first, *(0,) * (len(op.shape) - 1)),
                cast(values.reshape(count, *op.shape[1:]), "F32", op.dtype),
            )

    def _file(self, op: File, target: StoredTensor) -> Iterator[Tile]:
        pool = FilePool()
        try:
            extents, header = read_header(pool, op.file)
            if op.name not in extents or (op.header and op.header != header):
                raise CheckpointError(f"{op.file} is not the file the plan was made with.", fix="Make the plan again.")
            extent = extents[op.name]
            if extent.shape != op.shape:
                raise CheckpointError(f"{op.file}: {op.name} has the wrong shape.", got=extent.shape, expected=op.shape)
            stored = dense_tensor(op.file, extent.offset, extent.dtype, extent.shape)
            for start, shape in row_tiles(stored, target):
                yield start, self._cast(read_box(pool, stored, start, shape), stored.dtype, op.dtype)
        finally:
            pool.close()

    def _compute(self, op: Compute) -> Iterator[Tile]:
        result = apply(op.function, self._inputs(op), dict(op.arguments))
        if result.shape != op.shape:
            raise PlanError(f"{op.describe()} gives {op.target} the wrong shape.", got=result.shape, expected=op.shape)
        yield (0,) * len(op.shape), self._cast(result.astype(np.float64), "F64", op.dtype)

    def _inputs(self, op: Compute) -> list[np.ndarray]:
        found = (self._source().read(name) for name in op.sources)
        return [cast(raw.array(), raw.dtype, "F64") for raw in found]

    def _cast(self, values: np.ndarray, source: str, target: str) -> np.ndarray:
        """Casts a tile, and keeps in mind what of it became infinite."""
        result = cast(values, source, target)
        if source != target and (lost := overflow(values, source, result, target)).size:
            self._buffers.lost.append((lost.size, float(np.abs(lost).max())))
        return result

    def _buffer(self, stored: StoredTensor, shape: Shape) -> np.ndarray:
        """Gives this thread's buffer, seen as a tile; the same memory serves every tile of a thread."""
        carrier = CARRIERS[stored.dtype]
        needed = math.prod(shape) * carrier.itemsize
        found = getattr(self._buffers, "block", None)
        if found is None or len(found) < needed:
            found = self._buffers.block = np.empty(max(needed, TILE_BYTES), np.uint8)
        return empty_box(stored.pieces, found[:needed].view(carrier), shape)

    def _source(self) -> Source:
        if self.source is None:
            raise PlanError("The plan reads a source and none was opened.")
        return self.source


def _refuse_lost(op: Op, lost: Sequence[tuple[int, float]]) -> None:
    """Refuses a tensor of which a cast made finite values infinite, given as (number, largest magnitude) a tile."""
    if not lost:
        return
    count, numel = sum(number for number, _ in lost), math.prod(op.shape)
    raise CheckpointError(
        f"{op.target}: {count} of {numel} values are beyond the range of {op.dtype} and would become infinite.",
        got=f"{max(largest for _, largest in lost):.6g} as the largest magnitude",
        expected=f"at most {LARGEST[op.dtype]:.6g}",
        fix="Write --dtype bf16, which has the range of fp32, or --dtype fp32.",
    )
