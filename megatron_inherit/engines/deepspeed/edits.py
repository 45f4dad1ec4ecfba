"""What ``sharing.soft_tie`` and ``sharing.keep_zeros`` do to gradients that ZeRO cuts up.

Up to ZeRO-2 each rank has whole weights, and hooks change a gradient as autograd gives it, before DeepSpeed reduces,
offloads and measures it. Under ZeRO-3 a rank has a part of each weight, the same elements of every layer of a stage,
and changes its part of the reduced gradient after the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_inherit.engines.deepspeed.shards import partition_bounds
from megatron_inherit.sharing.compress import kept_mask
from megatron_inherit.sharing.regularise import matrices, penalty_gradient, require_zeros, stage_groups

if TYPE_CHECKING:
    from megatron_inherit.engines.base import EngineOptions
    from megatron_inherit.model.language_model import LanguageModel

Members = Sequence[Any]
"""Parameters, with the attributes that DeepSpeed gives them."""


class GradientEdits:
    """Changes gradients of a model between its backward pass and the optimizer.

    Make it when the weights are filled, before DeepSpeed puts hooks of its own on the parameters.

    Args:
        model: The whole model, or under ZeRO-3 this rank's partition of it.
        options: The engine's.
        replicas: Ranks that share out gradients.
        device: Of the gradients; partitions of weights may lie in host memory.
    """

    def __init__(
        self, model: LanguageModel, options: EngineOptions, replicas: dist.ProcessGroup, device: torch.device
    ) -> None:
        self.tie, self.replicas, self._cut = options.soft_tie, replicas, options.zero_stage == 3
        self._device = device
        self._weight = 0.0
        self._groups: list[Any] = [] if self.tie is None else stage_groups([model], self.tie.plan)
        kept = matrices(model) if options.keep_zeros else ()
        self._masks = [(parameter, kept_mask(self._values(parameter))) for parameter in kept]
        if options.keep_zeros:
            require_zeros([mask for _, mask in self._masks])
        if not self._cut:
            self._hook()

    def begin(self, step: int, *, last: bool) -> None:
        """Announces a backward pass; the pull is added once a step, in the last one.

        Args:
            step: Updates done before it.
            last: No further micro-batch follows.
        """
        self._weight = self.tie.weight_at(step) if self.tie is not None and last else 0.0

    @torch.no_grad()
    def finish(self) -> None:
        """Changes the partitions of ZeRO-3 once the last backward pass is over; all replicas call it together."""
        if not self._cut:
            return
        for members in self._groups if self._weight else ():
            for parameter, change in zip(members, self._changes(members), strict=True):
                self._change(parameter, change.mul_(self._weight).add_)
        for parameter, mask in self._masks:
            self._change(parameter, mask.mul)

    def _hook(self) -> None:
        for members in self._groups:
            for place, parameter in enumerate(members):
                parameter.register_hook(self._pull(members, place))
        for parameter, mask in self._masks:
            parameter.register_hook(mask.mul)

    def _pull(self, members: Members, place: int) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def pull(gradient: torch.Tensor) -> torch.Tensor | None:
            if not self._weight:
                return None
            return torch.add(gradient, self._changes(members)[place].to(gradient.dtype), alpha=self._weight)

        return pull

    def _changes(self, members: Members) -> torch.Tensor:
        kind = "l2" if self.tie is None else self.tie.kind
        return penalty_gradient([self._values(parameter) for parameter in members], kind, self._total)

    def _total(self, squares: torch.Tensor) -> torch.Tensor:
        if self._cut:
            dist.all_reduce(squares, group=self.replicas)
        return squares

    def _values(self, parameter: Any) -> torch.Tensor:
        if not self._cut:
            return parameter.detach()
        return parameter.ds_tensor.data.view(-1)[: self._count(parameter)].to(self._device)

    def _count(self, parameter: Any) -> int:
        low, high = partition_bounds(parameter, parameter.ds_numel, self.replicas.rank())
        return high - low

    def _change(self, parameter: Any, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        gradient = safe_get_local_grad(parameter).clone()  # what it gives may lie in a buffer that is used again
        own = gradient.view(-1)[: self._count(parameter)]
        own.copy_(edit(own))
        safe_set_local_grad(parameter, gradient)
