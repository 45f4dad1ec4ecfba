"""The two movements of tensor data: gather a box out of files, scatter a box into files.

Pieces that lie side by side in a file are fetched or written at once, whatever their order in the box. A box of a
tensor that is stored transposed is kept in memory as it lies in the file: its runs go straight to and fro, and
``row_major`` turns it where its elements are needed in canonical order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from megatron_inherit.checkpoint.dtypes import CARRIERS
from megatron_inherit.checkpoint.extents import Extent, Piece, Shape
from megatron_inherit.checkpoint.files import FilePool

_CHUNK = 1 << 22
_WHOLE_ROW = 2048
_SHORT_RUN = 512
_MAX_WASTE = 1.02
_BLOCK = (512, 32)
"""Rows and columns that are turned at once: small enough for the second level cache, runs of whole cache lines."""


def gather(
    pool: FilePool,
    pieces: Iterable[Piece],
    start: Shape,
    shape: Shape,
    dtype: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Reads a box that disjoint pieces cover.

    Pieces that lie side by side in a file are fetched by one read, whatever their order in the box.

    Args:
        pool: Where files are opened.
        pieces: Of the tensor.
        start: First index of the box.
        shape: Its shape.
        dtype: Of its elements.
        out: Array of the carrier type and shape to fill; ``empty_box`` gives its best order.

    Returns:
        The box, in row-major order or, where it is stored transposed, in column-major order.

    Raises:
        CheckpointError: A file is missing or too short.
    """
    pieces = tuple(pieces)
    out = empty_box(pieces, np.empty(math.prod(shape), CARRIERS[dtype]), shape) if out is None else out
    parts = [cut for piece in pieces if (cut := piece.cut(start, shape)) is not None]
    if is_transposed(pieces):
        for piece in pieces:
            pool.spool(piece.extent.file, piece.extent.offset, piece.extent.end)
    for cluster in _clusters(parts):
        views = [_view(out, piece, start) for piece in cluster]
        if len(cluster) == 1 and cluster[0].extent.is_dense and views[0].flags.c_contiguous:
            pool.read_into(cluster[0].extent.file, cluster[0].extent.offset, _bytes(views[0]))
        elif len(cluster) == 1 and _has_runs(cluster[0].extent, views[0]):
            _move_runs(pool.read_into, cluster[0].extent, views[0])
        elif _is_packed(cluster):
            low, high = cluster[0].extent.offset, max(piece.extent.end for piece in cluster)
            block = np.empty(high - low, np.uint8)
            pool.read_into(cluster[0].extent.file, low, block.data)
            for piece, view in zip(cluster, views, strict=True):
                view[...] = _strided(block, piece.extent, low)
        else:
            for piece, view in zip(cluster, views, strict=True):
                _read_strided(pool, piece.extent, view)
    return out


def scatter(pool: FilePool, pieces: Iterable[Piece], start: Shape, values: np.ndarray) -> None:
    """Writes a box of values to every place that pieces give for it (replicas included).

    Args:
        pool: Where files are opened.
        pieces: Of the sink's tensor, with absolute files.
        start: First index of the box.
        values: Array of the carrier type, shaped as the box.
    """
    parts = [cut for piece in pieces if (cut := piece.cut(start, values.shape)) is not None]
    for cluster in _clusters(parts):
        low, high = cluster[0].extent.offset, max(piece.extent.end for piece in cluster)
        if len(cluster) == 1 and cluster[0].extent.is_dense:
            view = row_major(_view(values, cluster[0], start))
            pool.write_from(cluster[0].extent.file, low, _bytes(view))
        elif len(cluster) == 1 and is_transposed(cluster) and cluster[0].extent.strides[0] == 1:
            turned = row_major(_view(values, cluster[0], start).T)
            _move_runs(pool.write_from, cluster[0].extent, turned.T)
        elif sum(piece.extent.nbytes for piece in cluster) == high - low:
            block = np.empty(high - low, np.uint8)
            for piece in cluster:
                _strided(block, piece.extent, low)[...] = _view(values, piece, start)
            pool.write_from(cluster[0].extent.file, low, block.data)
        else:
            for piece in cluster:
                _write_strided(pool, piece.extent, _view(values, piece, start))


def is_transposed(pieces: Iterable[Piece]) -> bool:
    """Tells whether a matrix is stored column by column, wholly or in part."""
    return any(
        len(piece.shape) == 2 and piece.shape[1] > 1 and piece.extent.strides[1] > piece.extent.strides[0]
        for piece in pieces
    )


def empty_box(pieces: Iterable[Piece], memory: np.ndarray, shape: Shape) -> np.ndarray:
    """Sees a one-dimensional array as a box of a tensor, in the order in which the tensor is stored."""
    return memory.reshape(shape[::-1]).T if is_transposed(pieces) else memory.reshape(shape)


def row_major(values: np.ndarray) -> np.ndarray:
    """Gives the values in row-major order: themselves, or a copy that is made block by block where they are turned."""
    if values.flags.c_contiguous or values.ndim != 2 or values.strides[0] > values.strides[1]:
        return np.ascontiguousarray(values)
    out = np.empty(values.shape, values.dtype)
    for row in range(0, values.shape[0], _BLOCK[0]):
        for column in range(0, values.shape[1], _BLOCK[1]):
            block = slice(row, row + _BLOCK[0]), slice(column, column + _BLOCK[1])
            out[block] = values[block]
    return out


def _has_runs(extent: Extent, view: np.ndarray) -> bool:
    """Tells whether both a file and an array hold the columns of a matrix in runs worth a read each."""
    return (
        view.ndim == 2
        and extent.strides[0] == 1
        and view.strides[0] == view.itemsize
        and (extent.shape[0] * extent.item_size >= _SHORT_RUN or extent.span == extent.nbytes)
    )


def _move_runs(move: Callable[[str, int, memoryview], None], extent: Extent, view: np.ndarray) -> None:
    """Reads or writes a matrix column by column; all at once where neither file nor array has gaps."""
    turned = view.T
    if extent.span == extent.nbytes and turned.flags.c_contiguous:
        move(extent.file, extent.offset, _bytes(turned))
        return
    step = extent.strides[1] * extent.item_size
    for number, run in enumerate(turned):
        move(extent.file, extent.offset + number * step, run.view(np.uint8).data)


def _view(array: np.ndarray, piece: Piece, start: Shape) -> np.ndarray:
    """Gives the part of a box's array that a piece covers."""
    where = (slice(a - b, a - b + n) for a, b, n in zip(piece.start, start, piece.shape, strict=True))
    return array[tuple(where)]


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _strided(block: np.ndarray, extent: Extent, low: int) -> np.ndarray:
    """Sees the elements of an extent in the bytes that begin at offset ``low`` of its file."""
    strides = tuple(stride * extent.item_size for stride in extent.strides)
    return np.ndarray(extent.shape, CARRIERS[extent.dtype], block, extent.offset - low, strides)


def _clusters(parts: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Groups pieces of a file whose spans touch or interleave."""
    if len(parts) == 1:
        yield [parts[0]]
        return
    cluster: list[Piece] = []
    end = 0
    for piece in sorted(parts, key=lambda part: (part.extent.file, part.extent.offset)):
        extent = piece.extent
        if cluster and (extent.file != cluster[0].extent.file or extent.offset > end):
            yield cluster
            cluster = []
        end = max(end, extent.end) if cluster else extent.end
        cluster.append(piece)
    if cluster:
        yield cluster


def _is_packed(cluster: Sequence[Piece]) -> bool:
    """Tells whether one read of the cluster's whole span fetches hardly more than its elements."""
    span = max(piece.extent.end for piece in cluster) - cluster[0].extent.offset
    return span <= _MAX_WASTE * sum(piece.extent.nbytes for piece in cluster) and span <= 16 * _CHUNK


def _read_strided(pool: FilePool, extent: Extent, view: np.ndarray) -> None:
    """Reads a strided array: as one span where that is cheap, else slice by slice along its widest stride."""
    if extent.span <= 16 * _CHUNK and (extent.span <= _MAX_WASTE * extent.nbytes or extent.span <= _WHOLE_ROW):
        block = np.empty(extent.span, np.uint8)
        pool.read_into(extent.file, extent.offset, block.data)
        view[...] = _strided(block, extent, extent.offset)
        return
    axis = _widest(extent)
    inner = extent.steps(axis, 0, 1, 1)
    rows = _rows_at_once(extent, axis, inner)
    for first in range(0, extent.shape[axis], rows):
        count = min(rows, extent.shape[axis] - first)
        where = (*(slice(None),) * axis, slice(first, first + count))
        part = extent.steps(axis, first, count, 1)
        if count > 1 or part.span > _MAX_WASTE * part.nbytes:
            _read_span(pool, part, view[where])
        else:
            _read_strided(pool, part, view[where])


def _read_span(pool: FilePool, extent: Extent, view: np.ndarray) -> None:
    block = np.empty(extent.span, np.uint8)
    pool.read_into(extent.file, extent.offset, block.data)
    view[...] = _strided(block, extent, extent.offset)


def _write_strided(pool: FilePool, extent: Extent, values: np.ndarray) -> None:
    """Writes a strided array in its contiguous runs."""
    if extent.is_dense or extent.span == extent.nbytes:
        block = np.empty(extent.span, np.uint8)
        _strided(block, extent, extent.offset)[...] = values
        pool.write_from(extent.file, extent.offset, block.data)
        return
    axis = _widest(extent)
    for index in range(extent.shape[axis]):
        where = (*(slice(None),) * axis, slice(index, index + 1))
        _write_strided(pool, extent.steps(axis, index, 1, 1), values[where])


def _widest(extent: Extent) -> int:
    """Finds the axis of the widest stride among those longer than one."""
    axes = [axis for axis, size in enumerate(extent.shape) if size > 1]
    return max(axes, key=lambda axis: extent.strides[axis])


def _rows_at_once(extent: Extent, axis: int, inner: Extent) -> int:
    """Says how many indices of an axis one read should span: several where each alone would be tiny."""
    if inner.nbytes >= _WHOLE_ROW or inner.span > _MAX_WASTE * inner.nbytes:
        return 1
    step = extent.strides[axis] * extent.item_size
    return max(1, _CHUNK // max(step, 1))
