"""Two ranks with half the vocabulary each compute the losses and gradients of one rank with all of it."""

from __future__ import annotations

import pytest
import torch

from megatron_inherit.kernels.linear_cross_entropy import reference as lce
from megatron_inherit.kernels.linear_kl import reference as kl
from tests.support.vocabulary_shards import compare

CASES = [(13, 16), (8, 16), (16, 16)]
"""The second rank holds fewer tokens, none at all, or as many as the first."""


@pytest.mark.slow
def test_two_shards_of_the_vocabulary_equal_the_whole(tmp_path):
    torch.set_num_threads(1)
    assert compare(lce, kl, CASES, tmp_path) < 2e-6
