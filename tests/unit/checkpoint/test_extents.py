import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.extents import (
    Extent,
    Piece,
    check_cover,
    dense_strides,
    flat_boxes,
    flat_pieces,
    intersect,
    whole,
)

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def addresses(extent):
    """The byte of every element, as numpy computes it from the strides."""
    places = np.full(extent.shape, extent.offset)
    for axis, stride in enumerate(extent.strides):
        steps = np.arange(extent.shape[axis]) * stride * extent.item_size
        places += steps.reshape([-1 if at == axis else 1 for at in range(len(extent.shape))])
    return places


@given(shapes)
def test_dense_strides_are_numpys(shape):
    expected = tuple(stride // 4 for stride in np.empty(shape, np.float32).strides)
    assert dense_strides(shape) == expected


@given(st.data(), shapes)
def test_cuts_address_what_numpy_slices(data, shape):
    extent = Extent.dense("f", 8, "BF16", shape)
    start = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    size = tuple(data.draw(st.integers(1, full - low)) for full, low in zip(shape, start, strict=True))
    where = tuple(slice(low, low + count) for low, count in zip(start, size, strict=True))
    assert np.array_equal(addresses(extent.box(start, size)), addresses(extent)[where])
    assert np.array_equal(addresses(extent.transposed()), addresses(extent).T)
    assert np.array_equal(addresses(extent.index(start[0])), addresses(extent)[start[0]])
    step = data.draw(st.integers(1, 3))
    length = (shape[0] - start[0] + step - 1) // step
    assert np.array_equal(addresses(extent.steps(0, start[0], length, step)), addresses(extent)[start[0] :: step])
    inner = extent.box(start, size)
    assert inner.end - inner.offset == inner.span == int(addresses(inner).max() - inner.offset) + 2


@given(st.data(), st.integers(1, 3))
def test_intersection_is_that_of_the_index_sets(data, dimensions):
    def draw_box():
        start = [data.draw(st.integers(0, 4)) for _ in range(dimensions)]
        return start, [data.draw(st.integers(1, 4)) for _ in range(dimensions)]

    def indices(start, shape):
        return set(itertools.product(*(range(low, low + size) for low, size in zip(start, shape, strict=True))))

    one, other = draw_box(), draw_box()
    found = intersect(*one, *other)
    assert (indices(*found) if found else set()) == indices(*one) & indices(*other)


@given(st.data(), shapes)
def test_flat_boxes_are_the_range(data, shape):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    numbers = np.arange(numel).reshape(shape)
    boxes = flat_boxes(shape, start, stop)
    found = []
    for first, size, before in boxes:
        where = tuple(slice(low, low + count) for low, count in zip(first, size, strict=True))
        values = numbers[where].ravel()
        assert values[0] == start + before
        found += values.tolist()
    assert found == list(range(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1


@given(st.data(), shapes)
def test_partitions_of_any_world_size_cover_a_tensor(data, shape):
    world = data.draw(st.integers(1, 5))
    part = -(-math.prod(shape) // world)
    pieces = []
    for rank in range(world):
        low, high = min(rank * part, math.prod(shape)), min((rank + 1) * part, math.prod(shape))
        if high > low:
            pieces += flat_pieces(shape, low, Extent.dense(f"rank{rank}", 0, "F32", (high - low,)))
    check_cover("w", shape, pieces)
    with pytest.raises(CheckpointError, match="not complete"):
        check_cover("w", shape, pieces[1:])


def test_a_piece_outside_is_named():
    piece = Piece((2, 0), Extent.dense("file.pt", 0, "F32", (2, 2)))
    with pytest.raises(CheckpointError, match=r"w does not fit its place in file\.pt"):
        check_cover("w", (3, 2), [piece])
    with pytest.raises(CheckpointError, match="cannot be seen as"):
        Extent.dense("f", 0, "F32", (2, 3)).transposed().reshaped((6,))
    assert whole(piece.extent)[0].start == (0, 0)


def test_a_part_that_is_given_twice_does_not_stand_for_a_missing_one():
    half = Piece((0, 0), Extent.dense("rank_0", 0, "F32", (2, 3)))
    with pytest.raises(CheckpointError, match=r"w: the part at \[0, 0\] is there twice"):
        check_cover("w", (4, 3), [half, Piece((0, 0), Extent.dense("rank_1", 0, "F32", (2, 3)))])
