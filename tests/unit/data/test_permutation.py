from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_inherit.data.permutation import KeyedPermutation, derive_key, mix64


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_every_element_comes_once(size: int, key: int) -> None:
    assert sorted(KeyedPermutation(size, key)(np.arange(size)).tolist()) == list(range(size))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_an_element_does_not_depend_on_what_else_is_asked(size: int, key: int, places: list[int]) -> None:
    index = np.array([place % size for place in places])
    permutation = KeyedPermutation(size, key)
    together = permutation(index)
    assert together.tolist() == [int(permutation(index[i : i + 1])[0]) for i in range(len(index))]
    assert ((together >= 0) & (together < size)).all()


EXPECTED = [169569026, 961486632, 807707564, 285269367]


def test_values_are_the_same_for_ever() -> None:
    """A resumed run on another machine or version must read the same samples."""
    assert KeyedPermutation(10**9, derive_key(1, "samples", 0))(np.arange(4)).tolist() == EXPECTED


@pytest.mark.parametrize("size", [64, 1000])
def test_positions_are_uniform_over_keys(size: int) -> None:
    """Chi-square of where the first and a middle element land, in 16 bins over 1000 keys; 15 degrees of freedom."""
    for place in (0, size // 2):
        landed = [int(KeyedPermutation(size, derive_key(key))(np.array([place]))[0]) for key in range(1000)]
        counts = np.bincount(np.array(landed) * 16 // size, minlength=16)
        expected = np.bincount(np.arange(size) * 16 // size, minlength=16) / size * 1000
        assert ((counts - expected) ** 2 / expected).sum() < 45


def test_neighbours_are_separated() -> None:
    out = KeyedPermutation(100_000, 7)(np.arange(100_000))
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(out, np.arange(100_000))[0, 1]) < 0.02
    assert (np.abs(np.diff(out)) == 1).mean() < 1e-3


def test_mixing_is_a_bijection() -> None:
    values = np.arange(100_000, dtype=np.uint64)
    assert len(np.unique(mix64(values, derive_key("x")))) == 100_000
