"""What training a descendant may keep of its learngene: a pull towards the mean of its stage, and a mask of zeros.

Both change gradients after the replicas' reduction and before the norm, so that any optimizer and schedule takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_inherit.base.errors import ConfigError
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
        plan: Which layers belong together; they must lie on one pipeline rank.
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
    """Makes the edit that adds the penalty's gradient.

    Raises:
        ConfigError: A stage lies on several pipeline ranks, or a matrix's distance would be taken of its tensor shards.
    """
    if tie.kind == "group_lasso" and chunks[0].config.tensor_model_parallel_size > 1:
        raise ConfigError(
            "sharing.soft_tie.kind: group_lasso takes distances of whole matrices, and here each rank holds a part.",
            fix="Set parallel.tp=1, or sharing.soft_tie.kind=l2.",
        )
    groups = list(_groups(chunks, tie.plan))

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


def penalty_gradient(members: Sequence[torch.Tensor], kind: str) -> torch.Tensor:
    """Gives the gradient of ``penalty`` in each member, [members, ...]; a member at the mean gets none of its own."""
    import torch

    stacked = torch.stack([member.detach().float() for member in members])
    distance = stacked - stacked.mean(dim=0)
    if kind == "l2":
        return distance
    norms = distance.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    unit = distance / norms.view(-1, *(1,) * (distance.dim() - 1))
    return unit - unit.mean(dim=0)


def keep_zeros(chunks: Sequence[LanguageModel]) -> Edit:
    """Makes the edit that leaves what is zero now at zero: Adam moves no weight that never had a gradient."""
    masks = [
        (parameter, parameter.detach() != 0)
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if ".layers." in name and parameter.dim() == 2
    ]

    def edit(step: int) -> None:
        for parameter, mask in masks:
            _gradient(parameter).mul_(mask)

    return edit


def _groups(chunks: Sequence[LanguageModel], plan: StagePlan) -> Iterator[list[torch.nn.Parameter]]:
    from megatron_inherit.sharing.aux_model import layer_parameters, layers_of

    found: dict[tuple[Component, int, str], dict[int, torch.nn.Parameter]] = {}
    for index, layer in layers_of(chunks):
        for component, path, module, attribute in layer_parameters(layer):
            key = (component, plan.ids(component)[index], path)
            found.setdefault(key, {})[index] = getattr(module, attribute)
    for (component, physical, _), members in found.items():
        if len(members) != len(plan.uses(component, physical)):
            raise ConfigError(
                "A stage of sharing.soft_tie lies on several pipeline ranks.",
                got=f"{component} {physical} of {plan}",
                fix="Put the stages' ends where the pipeline is cut, or set parallel.pp=1.",
            )
        if len(members) > 1:
            yield list(members.values())


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    from megatron_inherit.sharing.pipeline import gradient_of

    return gradient_of(parameter)
