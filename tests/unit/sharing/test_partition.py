import pytest

from megatron_inherit.arch.presets import preset
from megatron_inherit.base.errors import ConfigError
from megatron_inherit.sharing.partition import aligned_cuts, partition
from megatron_inherit.sharing.stage_plan import contiguous, cycle, parse_plan


def test_one_stage_a_rank_is_eighty_percent_balanced():
    split = partition(contiguous((3, 3, 4, 3, 3)), 5)
    assert split.bounds == (0, 3, 6, 10, 13, 16)
    assert split.balance == pytest.approx(0.8)
    assert split.ties == ()
    assert split.layout() == "Ettt|ttt|tttt|ttt|tttL"
    assert split.bubble(8) == pytest.approx(4 / 12)


def test_a_rank_may_hold_whole_stages():
    assert partition(contiguous((2, 2, 2, 2)), 2).bounds == (0, 4, 8)


def test_a_stage_crosses_ranks_only_when_told():
    plan = contiguous((4, 4))
    with pytest.raises(ConfigError, match="allow_cross_rank"):
        partition(plan, 4)
    split = partition(plan, 4, allow_cross_rank=True)
    assert split.bounds == (0, 2, 4, 6, 8)
    assert {(tie.physical, tie.ranks) for tie in split.ties} == {(0, (0, 1)), (1, (2, 3))}


def test_aligned_boundaries_win_at_equal_balance():
    assert partition(contiguous((3, 3, 4, 3, 3)), 5, allow_cross_rank=True).ties == ()


def test_tie_bytes_of_a_seven_billion_layer():
    config = preset("llama-2-7b").with_layers(4)
    split = partition(contiguous((4,)), 2, allow_cross_rank=True)
    assert split.tie_bytes(config) == (809_533_440, 809_533_440)
    assert "772.03 MiB" in split.describe(config)


def test_interleaved_chunks_take_aligned_stages_only():
    split = partition(contiguous((1,) * 4 + (2,) * 4), 4, 2)
    assert split.segments[4] == split.layers_of(0, 1) == (4, 6)
    assert split.loads == (3, 3, 3, 3)
    with pytest.raises(ConfigError, match="several chunks"):
        partition(contiguous((8,)), 2, 2, allow_cross_rank=True)
    with pytest.raises(ConfigError, match="several chunks"):
        partition(cycle(4, 2), 4, 2)


def test_nothing_may_be_shared_across_an_aligned_cut():
    assert aligned_cuts(parse_plan("attn=1,1,2;mlp=2,2;norm=unshared:4")) == (2,)
    assert aligned_cuts(cycle(2, 2)) == ()
    with pytest.raises(ConfigError, match="more pipeline chunks than layers"):
        partition(contiguous((2,)), 3, allow_cross_rank=True)
