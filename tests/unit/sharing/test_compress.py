import numpy as np
import pytest
import torch

from megatron_inherit.base.errors import ConfigError, PlanError
from megatron_inherit.plan.functions import apply
from megatron_inherit.sharing.compress import kept_mask, low_rank


def matrix(rows=24, columns=32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_two_of_four_keeps_the_largest_and_does_so_once():
    values = np.array([[1.0, -4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]])
    assert apply("prune", [values], {"keep": 2, "of": 4}).tolist() == [[0, -4, 3, 0, 5, 5, 0, 0]]
    once = apply("prune", [matrix().numpy()], {"keep": 2, "of": 4})
    assert np.array_equal(apply("prune", [once], {"keep": 2, "of": 4}), once)
    assert (np.count_nonzero(once.reshape(24, 8, 4), axis=2) == 2).all()
    assert kept_mask(torch.from_numpy(once)).sum() == 24 * 16
    with pytest.raises(PlanError, match="groups of 4"):
        apply("prune", [np.ones((2, 6))], {"keep": 2, "of": 4})


def test_low_rank_error_falls_to_nothing():
    weight = matrix()
    values = torch.linalg.svdvals(weight)
    errors = []
    for rank in (0, 4, 12, 24):
        up, down = low_rank(weight, rank)
        assert up.shape == (24, rank)
        assert down.shape == (rank, 32)
        errors.append(float((weight - up @ down).norm()))
        assert errors[-1] == pytest.approx(float(values[rank:].norm()), abs=1e-9)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10
    with pytest.raises(ConfigError, match="rank"):
        low_rank(weight, 25)
