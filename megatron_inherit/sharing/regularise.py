"""What training a descendant may keep of its learngene: a pull towards the mean of its stage, and a mask of zeros.

Both change gradients before the norm, so that any optimizer and schedule takes them: the edits here change whole ones
after the replicas' reduction, ``engines.deepspeed.edits`` those that ZeRO cuts up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.checkpoint.stages import LAYER_PREFIX
from megatron_inherit.sharing.compress import kept_mask
from megatron_inherit.sharing.stage_plan import Component, StagePlan

if TYPE_CHECKING:
    import torch

    from megatron_inherit.model.language_model import LanguageModel

Edit = Callable[[int], None]
"""Changes the gradients of this rank, given the number of updates done before."""


@dataclass(frozen=True, kw_only=True)
class SoftTie:
    """A pull of the layers of a stage towards their mean.

    Attributes:
        plan: Which layers belong together; those of a stage must lie on one pipeline rank.
        weight: Of the penalty at the start.
        kind: ``l2`` is weight / 2 times the squared distances from the mean, ``group_lasso`` weight times the distance
            of each layer's matrix, which makes whole differences vanish.
        fade_steps: Steps in which the weight falls to nothing in a straight line; 0 keeps it.
    """

    plan: StagePlan
    weight: float
    kind: Literal["l2", "group_lasso"] = "l2"
    fade_steps: int = 0

    def weight_at(self, step: int) -> float:
        """Gives the weight of the penalty at a step."""
        return self.weight * max(0.0, 1 - step / self.fade_steps) if self.fade_steps else self.weight


def soft_tie(chunks: Sequence[LanguageModel], tie: SoftTie) -> Edit:
    """Makes the edit that adds the penalty's gradient to whole gradients."""
    groups = stage_groups(chunks, tie.plan)

    def edit(step: int) -> None:
        weight = tie.weight_at(step)
        for members in groups if weight else ():
            for parameter, change in zip(members, penalty_gradient(members, tie.kind), strict=True):
                gradient = _gradient(parameter)
                gradient.add_(change.to(gradient.dtype), alpha=weight)

    return edit


def penalty(members: Sequence[torch.Tensor], kind: str) -> torch.Tensor:
    """Gives the penalty of tensors that belong together, without its weight."""
    import torch

    stacked = torch.stack([member.float() for member in members])
    distances = (stacked - stacked.mean(dim=0)).flatten(1)
    return distances.square().sum() / 2 if kind == "l2" else distances.norm(dim=1).sum()


def penalty_gradient(
    members: Sequence[torch.Tensor], kind: str, total: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """Gives the gradient of ``penalty`` in each member; a member at the mean gets none of its own.

    Args:
        members: Of one shape; whole, or the same elements of each.
        kind: ``l2`` or ``group_lasso``.
        total: Adds values over the ranks among which the elements are shared out; needed by ``group_lasso`` alone.

    Returns:
        fp32 [members, ...].
    """
    import torch

    stacked = torch.stack([member.detach().float() for member in members])
    distance = stacked - stacked.mean(dim=0)
    if kind == "l2":
        return distance
    squares = distance.flatten(1).square().sum(dim=1)
    norms = (squares if total is None else total(squares)).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    unit = distance / norms.view(-1, *(1,) * (distance.dim() - 1))
    return unit - unit.mean(dim=0)


def keep_zeros(chunks: Sequence[LanguageModel]) -> Edit:
    """Makes the edit that leaves what is zero now at zero: Adam moves no weight that never had a gradient.

    Raises:
        ConfigError: Nothing is zero.
    """
    masks = [(parameter, kept_mask(parameter)) for chunk in chunks for parameter in matrices(chunk)]
    require_zeros([mask for _, mask in masks])

    def edit(step: int) -> None:
        for parameter, mask in masks:
            _gradient(parameter).mul_(mask)

    return edit


def require_zeros(masks: Sequence[torch.Tensor]) -> None:
    """Raises ConfigError where the masks keep every weight, so that there is nothing to keep at zero."""
    if all(bool(mask.all()) for mask in masks):
        raise ConfigError(
            "sharing.keep_zeros: no weight of the blocks is zero.",
            fix="Start from what --compress 2:4 of 'minherit share' made, or set sharing.keep_zeros=false.",
        )


def matrices(chunk: LanguageModel) -> Iterator[torch.nn.Parameter]:
    """Yields the parameters that hold matrices of blocks, what a learngene is pruned in."""
    from megatron_inherit.model.pieces import pieces_of

    pieces = pieces_of(chunk)
    for name, parameter in chunk.named_parameters():
        spec = pieces[name][0].spec
        if len(spec.shape) == 2 and not spec.name.startswith(LAYER_PREFIX) and spec.layer is not None:
            yield parameter


def stage_groups(chunks: Sequence[LanguageModel], plan: StagePlan) -> list[list[torch.nn.Parameter]]:
    """Lists the parameters that belong together: the same tensor of each layer of a stage, in order of depth."""
    from megatron_inherit.sharing.aux_model import layer_parameters, layers_of

    found: dict[tuple[Component, int, str], list[torch.nn.Parameter]] = {}
    for index, layer in layers_of(chunks):
        for component, path, module, attribute in layer_parameters(layer):
            members = found.setdefault((component, plan.ids(component)[index], path), [])
            members.append(getattr(module, attribute))
    return [members for members in found.values() if len(members) > 1]


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    from megatron_inherit.sharing.pipeline import gradient_of

    return gradient_of(parameter)
