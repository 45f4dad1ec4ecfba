import pytest
import torch

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.sharing.compress import compress, low_rank, prune_mask, quantise


def matrix(rows=24, columns=32, dtype=torch.float32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("method", "levels"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("group", [0, 8])
def test_quantised_values_lie_within_half_a_step(method, levels, group):
    weight = matrix()
    packed = quantise(weight, method, group=group)
    assert packed.codes.dtype == torch.int8
    assert int(packed.codes.abs().max()) <= levels
    width = group or weight.shape[1]
    steps = packed.scales.repeat_interleave(width, dim=1)
    error = (packed.dequantise(torch.float32) - weight).abs()
    assert torch.all(error <= steps / 2 * 1.0001)


def test_quantisation_of_zeros_is_zero():
    assert torch.equal(compress(torch.zeros(4, 8), "int8"), torch.zeros(4, 8))


def test_stored_size_of_four_bits_is_half_of_eight():
    weight = matrix()
    assert quantise(weight, "int8").num_bytes - 24 * 4 == 2 * (quantise(weight, "int4").num_bytes - 24 * 4)


@pytest.mark.parametrize("method", ["int8", "int4", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressing_twice_changes_nothing_and_commutes_with_copying(method, dtype):
    weight = matrix(dtype=dtype)
    once = compress(weight, method)
    assert once.dtype == dtype
    if method == "2:4" or dtype == torch.float32:
        assert torch.equal(compress(once, method), once)
    copies = torch.stack([weight] * 3)
    assert torch.equal(torch.stack([compress(copy, method) for copy in copies]), torch.stack([once] * 3))


def test_two_of_four_keeps_the_largest():
    mask = prune_mask(torch.tensor([[1.0, -4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]]))
    assert mask.tolist() == [[False, True, True, False, True, True, False, False]]
    assert torch.all(prune_mask(matrix()).view(24, 8, 4).sum(dim=2) == 2)


def test_low_rank_error_falls_to_nothing():
    weight = matrix().double()
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


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="group"):
        quantise(matrix(), "int8", group=5)
    with pytest.raises(ConfigError, match="multiple of four"):
        prune_mask(matrix(columns=30))
    with pytest.raises(ConfigError, match="rank"):
        low_rank(matrix(), 25)
