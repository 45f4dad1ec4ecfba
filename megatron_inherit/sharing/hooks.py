"""Sees that an engine waits for the whole gradient of a shared weight, which recomputation may hand over in parts.

Non-reentrant recomputation, the DeepSpeed engine's, hands it over once a backward pass, however often the weight was
used. Megatron-Core's is reentrant: it runs a backward pass of its own for each recomputed use and hands a part over
each time. Whoever reduces at the first part loses the rest: ZeRO would, while Megatron-Core counts the parts in the
first step and waits for as many.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.sharing.aux_model import layers_of

if TYPE_CHECKING:
    import torch

    from megatron_inherit.model.language_model import LanguageModel


def expected_hook_counts(chunk: LanguageModel) -> dict[int, int]:
    """Tells how often a backward pass hands over the gradient of each parameter of a chunk's layers.

    Returns:
        id of a parameter -> once for each layer that computes it anew, and once for all that do not.
    """
    passes: dict[int, set[int | None]] = defaultdict(set)
    for index, layer in layers_of([chunk]):
        for name, parameter in layer.named_parameters():
            anew = layer.config.reentrant and layer.recomputes(name.split(".")[0])
            passes[id(parameter)].add(index if anew else None)
    return {parameter: len(which) for parameter, which in passes.items()}


def check_hook_counts(chunks: Sequence[Any]) -> None:
    """Checks, after the first step, that overlapped reduction waits for the last part of each gradient.

    Megatron-Core counts in the first step how often each parameter's gradient hook fires, and keeps the counts when the
    second one begins.

    Args:
        chunks: Megatron-Core's DistributedDataParallel modules of this rank, after their first backward pass.

    Raises:
        ConfigError: A hook fired more or less often than the parameter's uses say, so that a reduction may start before
            the gradient is whole.
    """
    for chunk in chunks:
        names = {id(parameter): name for name, parameter in chunk.named_parameters()}
        expected = expected_hook_counts(chunk.module)
        for group in chunk.bucket_groups:
            counts = group.golden_per_param_grad_ready_counts or group.per_param_grad_ready_counts
            for parameter in group.params:
                count, wanted = counts.get(parameter, 0), expected.get(id(parameter), 1)
                if count != wanted:
                    raise ConfigError(
                        f"The gradient of {names[id(parameter)]} comes in {count} parts a step.",
                        expected=f"{wanted}, one for each layer that recomputes it",
                        fix="Turn megatron.overlap_grad_reduce off.",
                    )


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
