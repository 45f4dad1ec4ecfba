"""Sees that a shared weight's gradient is handed over once a backward pass, whole, however often the weight was used.

Non-reentrant recomputation does that. Reentrant recomputation runs a backward pass of its own for each use and hands a
part over each time: whoever reduces at the first one, as ZeRO does, loses the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_inherit.base.errors import ConfigError

if TYPE_CHECKING:
    import torch


class OneGradient:
    """Watches the first optimizer step of a model with shared stages.

    Make it before an engine puts hooks of its own on the parameters, so that its message comes first.

    Args:
        model: With its stages shared.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._seen: set[int] = set()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def expect(self, updates: int) -> None:
        """Begins a backward pass.

        Args:
            updates: Optimizer updates done before; from the first one on nothing is watched any more.
        """
        self._seen.clear()
        if updates:
            while self._handles:
                self._handles.pop().remove()

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def once(parameter: torch.Tensor) -> None:
            if id(parameter) in self._seen:
                raise ConfigError(
                    f"Reentrant recomputation of shared stages: the gradient of {name} came twice in a backward pass.",
                    expected="once",
                    fix="Recompute with torch.utils.checkpoint(..., use_reentrant=False), as train.recompute does.",
                )
            self._seen.add(id(parameter))

        return once
