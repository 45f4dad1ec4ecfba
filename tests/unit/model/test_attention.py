"""Masks, context order and the padding of odd heads change nothing that they should not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.model import attention
from megatron_inherit.model.attention import attend, attention_mask, context_order, padded_head


def _qkv(head_dim: int = 12, groups: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, heads, 10, head_dim, generator=random) for heads in (4, groups, groups))


def test_context_order_deals_every_token_once_and_evenly():
    for size in (1, 2, 4):
        orders = [context_order(16, size, rank) for rank in range(size)]
        assert torch.cat(orders).sort().values.tolist() == list(range(16))
        work = [int((order + 1).sum()) for order in orders]
        assert len(set(work)) == 1


def test_mask_without_segments_is_causal():
    positions = torch.arange(5)
    mask = attention_mask(positions, positions, segments=None, window=None)
    assert torch.equal(mask[0, 0], torch.ones(5, 5).tril().bool())


def test_mask_keeps_to_segments_and_window():
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    positions = torch.arange(5)
    mask = attention_mask(positions, positions, segments=segments, window=2)
    assert mask.shape == (2, 1, 5, 5)
    assert mask[0, 0].nonzero().tolist() == [[0, 0], [1, 0], [1, 1], [2, 2], [3, 2], [3, 3], [4, 3], [4, 4]]
    assert mask[1, 0, 4].nonzero().flatten().tolist() == [3, 4]


def test_mask_of_a_context_rank_is_a_permutation_of_the_whole():
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    whole = attention_mask(torch.arange(8), torch.arange(8), segments=segments, window=3)
    keys = torch.cat([context_order(8, 2, rank) for rank in range(2)])
    for rank in range(2):
        mine = context_order(8, 2, rank)
        part = attention_mask(mine, keys, segments=segments, window=3)
        assert torch.equal(part[0, 0], whole[0, 0][mine][:, keys])


@pytest.mark.parametrize("masked", [False, True])
def test_padded_heads_give_the_same_attention(masked):
    q, k, v = _qkv()
    mask = attention_mask(torch.arange(10), torch.arange(10), segments=None, window=4) if masked else None
    plain = attend(q, k, v, mask=mask, head_dim=12)
    padded = attend(*(F.pad(x, (0, 4)) for x in (q, k, v)), mask=mask, head_dim=12)
    assert padded.shape == plain.shape
    torch.testing.assert_close(padded, plain, atol=1e-6, rtol=0)


def test_heads_are_padded_to_8_on_cuda_only():
    assert padded_head(100, torch.device("cuda")) == 104
    assert padded_head(128, torch.device("cuda")) == 128
    assert padded_head(100, torch.device("cpu")) == 100


def test_unfused_attention_is_refused_on_cuda(monkeypatch):
    for name in ("can_use_cudnn_attention", "can_use_flash_attention", "can_use_efficient_attention"):
        monkeypatch.setattr(torch.backends.cuda, name, lambda *_: False)
    with pytest.raises(ConfigError, match="unfused one is refused"):
        attention._cuda_backend(*_qkv(), None, True)
