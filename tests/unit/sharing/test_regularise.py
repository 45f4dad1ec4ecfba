import pytest
import torch

from megatron_inherit.sharing.regularise import SoftTie, penalty, penalty_gradient
from megatron_inherit.sharing.stage_plan import contiguous


@pytest.mark.parametrize("kind", ["l2", "group_lasso"])
def test_the_gradient_is_that_of_the_penalty(kind):
    generator = torch.Generator().manual_seed(0)
    members = [torch.randn(5, 3, generator=generator, requires_grad=True) for _ in range(3)]
    penalty(members, kind).backward()
    for member, gradient in zip(members, penalty_gradient(members, kind), strict=True):
        torch.testing.assert_close(gradient, member.grad)


@pytest.mark.parametrize("kind", ["l2", "group_lasso"])
def test_equal_members_are_left_alone(kind):
    value = torch.randn(4, 4)
    assert torch.equal(penalty_gradient([value, value.clone()], kind), torch.zeros(2, 4, 4))


def test_the_pull_fades():
    tie = SoftTie(plan=contiguous((2,)), weight=0.8, fade_steps=4)
    assert [tie.weight_at(step) for step in (0, 2, 4, 9)] == pytest.approx([0.8, 0.4, 0.0, 0.0])
    assert SoftTie(plan=contiguous((2,)), weight=0.8).weight_at(10**6) == 0.8
