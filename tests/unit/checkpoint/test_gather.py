"""Gather and scatter against numpy, for pieces of any order and stride."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_inherit.checkpoint import gather as module
from megatron_inherit.checkpoint.extents import Extent, Piece
from megatron_inherit.checkpoint.files import FilePool, create_file
from megatron_inherit.checkpoint.gather import gather, scatter


@st.composite
def layouts(draw):
    """A tensor of [rows, columns] whose rows lie permuted, strided, transposed or in two files."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["dense", "permuted", "interleaved", "transposed", "columns", "gaps"]))
    if kind == "permuted":
        order = draw(st.permutations(range(rows)))
        return rows, columns, [piece(row, 1, columns, at * columns) for at, row in enumerate(order)]
    if kind == "interleaved":
        half = (rows + 1) // 2
        first = Piece((0, 0), Extent("a", 0, "F32", (half, columns), (2 * columns, 1)))
        second = Piece((half, 0), Extent("a", columns * 4, "F32", (rows - half, columns), (2 * columns, 1)))
        return rows, columns, [first, second] if rows > half else [first]
    if kind == "transposed":
        return rows, columns, [Piece((0, 0), Extent("a", 0, "F32", (rows, columns), (1, rows)))]
    if kind == "columns":
        cut = draw(st.integers(1, columns))
        left = Piece((0, 0), Extent.dense("a", 0, "F32", (rows, cut)))
        right = Piece((0, cut), Extent.dense("b", 0, "F32", (rows, columns - cut)))
        return rows, columns, [left, right] if cut < columns else [left]
    step = columns + draw(st.integers(0, 5)) if kind == "gaps" else columns
    return rows, columns, [Piece((0, 0), Extent("a", 0, "F32", (rows, columns), (step, 1)))]


def piece(row, count, columns, at):
    return Piece((row, 0), Extent.dense("a", at * 4, "F32", (count, columns)))


@settings(deadline=None, max_examples=150)
@given(layouts(), st.data())
def test_what_is_scattered_is_gathered(tmp_path_factory, layout, data):
    rows, columns, pieces = layout
    folder = tmp_path_factory.mktemp("g")
    pieces = [Piece(p.start, _at(p.extent, folder)) for p in pieces]
    for name in ("a", "b"):
        create_file(folder / name, 4 * 2000)
    values = data.draw(st.just(np.random.default_rng(0).random((rows, columns), np.float32)))
    pool = FilePool()
    cut = data.draw(st.integers(0, rows))
    for low, high in ((0, cut), (cut, rows)):
        if high > low:
            scatter(pool, pieces, (low, 0), np.ascontiguousarray(values[low:high]))
    start = (data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1)))
    shape = (data.draw(st.integers(1, rows - start[0])), data.draw(st.integers(1, columns - start[1])))
    expected = values[start[0] : start[0] + shape[0], start[1] : start[1] + shape[1]]
    assert np.array_equal(gather(pool, pieces, start, shape, "F32"), expected)
    assert np.array_equal(gather(pool, pieces, (0, 0), (rows, columns), "F32"), values)
    assert pool.bytes_written == values.nbytes
    pool.close()


def _at(extent, folder):
    return Extent(f"{folder}/{extent.file}", extent.offset, extent.dtype, extent.shape, extent.strides)


@pytest.mark.parametrize("interleaved", [True, False])
def test_interleaved_rows_are_fetched_once_and_gaps_are_not(tmp_path, interleaved, monkeypatch):
    monkeypatch.setattr(module, "_WHOLE_ROW", 16)
    create_file(tmp_path / "a", 4096)
    first = Piece((0, 0), Extent(str(tmp_path / "a"), 0, "F32", (8, 16), (32, 1)))
    second = Piece((8, 0), Extent(str(tmp_path / "a"), 64, "F32", (8, 16), (32, 1)))
    pool = FilePool()
    pieces, rows = ([first, second], 16) if interleaved else ([first], 8)
    gather(pool, pieces, (0, 0), (rows, 16), "F32")
    assert pool.bytes_read == rows * 16 * 4
    pool.close()
