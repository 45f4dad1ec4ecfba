"""Where the elements of a tensor lie: strided arrays in files, and boxes of canonical tensors made of them.

Every layout of every format comes down to one statement: this box of the canonical tensor is that strided array of
that file. Reading, writing, slicing, resharding and comparing are intersections of boxes; no tensor is needed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_inherit.base.errors import CheckpointError

ITEM_SIZES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of an element by safetensors' dtype name."""

Shape = tuple[int, ...]


def dense_strides(shape: Sequence[int]) -> Shape:
    """Gives the row-major strides of a shape, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True)
class Extent:
    """A strided array in a file.

    Attributes:
        file: Path or URL; relative to the output folder in a sink.
        offset: Byte of the first element.
        dtype: Safetensors name, a key of ``ITEM_SIZES``.
        shape: Elements a dimension.
        strides: Distance between neighbours along each dimension, in elements.
    """

    file: str
    offset: int
    dtype: str
    shape: Shape
    strides: Shape

    @classmethod
    def dense(cls, file: str, offset: int, dtype: str, shape: Sequence[int]) -> Extent:
        """Makes the extent of a row-major array."""
        return cls(file, offset, dtype, tuple(shape), dense_strides(shape))

    @property
    def item_size(self) -> int:
        """Bytes of an element."""
        return ITEM_SIZES[self.dtype]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, gaps left out."""
        return self.numel * self.item_size

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last one, gaps included."""
        if not self.numel:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.item_size

    @property
    def end(self) -> int:
        """Byte behind the last element."""
        return self.offset + self.span

    @property
    def is_dense(self) -> bool:
        """Tells whether the elements lie in row-major order without gaps."""
        pairs = zip(self.shape, self.strides, dense_strides(self.shape), strict=True)
        return all(stride == dense for size, stride, dense in pairs if size > 1)

    def box(self, start: Sequence[int], shape: Sequence[int]) -> Extent:
        """Cuts the box ``[start, start + shape)`` out."""
        skip = sum(first * stride for first, stride in zip(start, self.strides, strict=True))
        return dataclasses.replace(self, offset=self.offset + skip * self.item_size, shape=tuple(shape))

    def steps(self, axis: int, start: int, length: int, step: int) -> Extent:
        """Takes ``length`` indices ``start, start + step, ...`` of one axis."""
        shape, strides = list(self.shape), list(self.strides)
        offset = self.offset + start * strides[axis] * self.item_size
        shape[axis], strides[axis] = length, strides[axis] * step
        return dataclasses.replace(self, offset=offset, shape=tuple(shape), strides=tuple(strides))

    def index(self, position: int) -> Extent:
        """Takes one index of the first axis and drops the axis (one layer of a stacked tensor)."""
        taken = self.steps(0, position, 1, 1)
        return dataclasses.replace(taken, shape=taken.shape[1:], strides=taken.strides[1:])

    def transposed(self) -> Extent:
        """Reverses the order of the axes."""
        return dataclasses.replace(self, shape=self.shape[::-1], strides=self.strides[::-1])

    def reshaped(self, shape: Sequence[int]) -> Extent:
        """Gives a dense array another shape of the same number of elements.

        Raises:
            CheckpointError: The array is not dense or the number of elements differs.
        """
        if not self.is_dense or math.prod(shape) != self.numel:
            raise CheckpointError(f"{self.file}: {self.shape} cannot be seen as {tuple(shape)}.")
        return Extent.dense(self.file, self.offset, self.dtype, shape)


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a canonical tensor and the array that holds it; axis k of the box is axis k of the extent.

    Attributes:
        start: First index of the box, one a dimension.
        extent: Where its elements lie; ``extent.shape`` is the shape of the box.
    """

    start: Shape
    extent: Extent

    @property
    def shape(self) -> Shape:
        """Shape of the box."""
        return self.extent.shape

    def cut(self, start: Sequence[int], shape: Sequence[int]) -> Piece | None:
        """Gives the part of the piece inside the box ``[start, start + shape)``, or None."""
        found = intersect(self.start, self.extent.shape, start, shape)
        if found is None:
            return None
        first, size = found
        inner = tuple(a - b for a, b in zip(first, self.start, strict=True))
        return Piece(first, self.extent.box(inner, size))


def whole(extent: Extent) -> tuple[Piece, ...]:
    """Gives the single piece of a tensor that one array holds."""
    return (Piece((0,) * len(extent.shape), extent),)


def intersect(
    start: Sequence[int], shape: Sequence[int], other_start: Sequence[int], other_shape: Sequence[int]
) -> tuple[Shape, Shape] | None:
    """Intersects two boxes; gives (start, shape) or None where they share nothing."""
    first = tuple(map(max, start, other_start))
    size = tuple(
        min(a + n, b + m) - f for a, n, b, m, f in zip(start, shape, other_start, other_shape, first, strict=True)
    )
    return (first, size) if all(n > 0 for n in size) else None


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[tuple[Shape, Shape, int]]:
    """Cuts elements ``[start, stop)`` of a row-major tensor into boxes (flat partitions of ZeRO are such ranges).

    Args:
        shape: Of the tensor.
        start: First element in row-major order.
        stop: One past the last element.

    Returns:
        (box start, box shape, elements of the range before the box), in order; at most 2 * dimensions - 1 boxes.
    """
    if len(shape) <= 1:
        size = tuple(shape)[:0] if not shape else (stop - start,)
        return [((start,) if shape else (), size, 0)] if stop > start else []
    row = math.prod(shape[1:])
    boxes: list[tuple[Shape, Shape, int]] = []
    cursor = start
    while cursor < stop:
        index, inner = divmod(cursor, row)
        if inner == 0 and stop - cursor >= row:
            count = (stop - cursor) // row
            boxes.append(((index, *(0,) * (len(shape) - 1)), (count, *shape[1:]), cursor - start))
            cursor += count * row
            continue
        end = min(stop, (index + 1) * row)
        for first, size, before in flat_boxes(shape[1:], inner, end - index * row):
            boxes.append(((index, *first), (1, *size), cursor - start + before))
        cursor = end
    return boxes


def flat_pieces(shape: Sequence[int], start: int, extent: Extent) -> list[Piece]:
    """Gives the pieces of a one-dimensional dense extent that holds elements ``[start, start + numel)`` of a tensor."""
    pieces = []
    for first, size, before in flat_boxes(shape, start, start + extent.numel):
        offset = extent.offset + before * extent.item_size
        pieces.append(Piece(first, Extent.dense(extent.file, offset, extent.dtype, size)))
    return pieces


def check_cover(name: str, shape: Sequence[int], pieces: Iterable[Piece]) -> None:
    """Checks that disjoint pieces fill a canonical tensor.

    Raises:
        CheckpointError: Elements are missing, outside the tensor or given twice.
    """
    found = sorted(pieces, key=lambda piece: piece.start)
    for piece in found:
        inside = all(a >= 0 and a + n <= m for a, n, m in zip(piece.start, piece.shape, shape, strict=True))
        if not inside:
            raise CheckpointError(
                f"Tensor {name} does not fit its place in {piece.extent.file}.", got=piece.shape, expected=tuple(shape)
            )
    twice = next((one for one, other in itertools.pairwise(found) if one.start == other.start), None)
    if twice is not None:
        raise CheckpointError(
            f"Tensor {name}: the part at {list(twice.start)} is there twice.",
            got=twice.extent.file,
            fix="Copy the checkpoint again: a file of it may stand in another's place.",
        )
    covered = sum(piece.extent.numel for piece in found)
    if covered != math.prod(shape):
        files = sorted({piece.extent.file for piece in found})
        raise CheckpointError(
            f"Tensor {name} is not complete in {', '.join(files[:3]) or 'the checkpoint'}.",
            got=f"{covered} elements",
            expected=f"{math.prod(shape)}",
        )
