"""How often a shared weight's gradient comes: once, unless recomputation is reentrant."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.sharing.hooks import OneGradient


def backward(layer, *, reentrant):
    hidden = torch.ones(2, 3, requires_grad=True)
    for _ in range(4):
        hidden = checkpoint(layer, hidden, use_reentrant=reentrant)
    hidden.sum().backward()


def test_recomputed_uses_give_one_gradient():
    layer = torch.nn.Linear(3, 3)
    watch = OneGradient(layer)
    for _ in range(2):
        watch.expect(0)
        backward(layer, reentrant=False)


def test_reentrant_recomputation_is_refused_with_the_fix():
    layer = torch.nn.Linear(3, 3)
    watch = OneGradient(layer)
    watch.expect(0)
    with pytest.raises(ConfigError, match=r"(?s)gradient of \w+ came twice.*use_reentrant=False"):
        backward(layer, reentrant=True)


def test_only_the_first_step_is_watched():
    layer = torch.nn.Linear(3, 3)
    watch = OneGradient(layer)
    watch.expect(1)
    backward(layer, reentrant=True)
