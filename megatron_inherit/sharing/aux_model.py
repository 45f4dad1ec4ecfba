"""Makes a built model an auxiliary one: layers of a stage apply the same parameters, each in its own place.

Parameters are shared, not modules: every layer keeps its own number and hooks, while autograd adds up the gradients of
all uses of a parameter, and recomputation, gradient buffers and optimizers see it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.sharing.stage_plan import Component, StagePlan
from megatron_inherit.sharing.tensors import stored_name

if TYPE_CHECKING:
    from megatron_inherit.model.language_model import LanguageModel
    from megatron_inherit.model.modules import Layer

_COMPONENT_OF: dict[str, Component] = {
    "self_attention": "attn",
    "mlp": "mlp",
    "input_layernorm": "norm",
    "pre_mlp_layernorm": "norm",
}
"""Child of a layer -> the plan that its parameters follow."""


class StageKey(NamedTuple):
    """Names one shared parameter: component, its physical id, and the parameter's path inside a layer."""

    component: Component
    physical: int
    path: str


StageParameters = dict[StageKey, torch.nn.Parameter]


def layer_parameters(layer: Layer) -> Iterator[tuple[Component, str, torch.nn.Module, str]]:
    """Yields component, path, owning module and attribute of each parameter that stages may share."""
    for child, component in _COMPONENT_OF.items():
        for prefix, module in getattr(layer, child).named_modules(prefix=child):
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    yield component, f"{prefix}.{attribute}", module, attribute


def layers_of(chunks: Sequence[LanguageModel]) -> Iterator[tuple[int, Layer]]:
    """Yields the index in the whole depth and the layer, of all layers of a rank."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            yield layer.layer_number - 1, layer


def share_stages(chunks: Sequence[LanguageModel], plan: StagePlan) -> StageParameters:
    """Lets the layers of each stage apply the parameters of the stage's first layer on this rank.

    Call it before gradient buffers, optimizers or ZeRO see the model.

    Args:
        chunks: This rank's part of the model, one a virtual pipeline stage.
        plan: Which physical weights each layer of the whole model applies.

    Returns:
        The parameters left, by stage.

    Raises:
        ConfigError: A stage lies in two chunks of this rank: each has its own gradient buffer, so a parameter in both
            would silently lose one's gradient.
    """
    kept: StageParameters = {}
    for chunk in chunks:
        here: StageParameters = {}
        for index, layer in layers_of([chunk]):
            for component, path, module, attribute in list(layer_parameters(layer)):
                key = StageKey(component, plan.ids(component)[index], path)
                setattr(module, attribute, here.setdefault(key, getattr(module, attribute)))
        crossing = sorted(set(kept) & set(here))
        if crossing:
            raise ConfigError(
                "A stage lies in two chunks of an interleaved pipeline, which is not supported.",
                got=f"{crossing[0].component} {crossing[0].physical} of {plan}",
                fix="Put stage boundaries on chunk boundaries ('minherit share plan' shows them), or set vpp to 1.",
            )
        kept |= here
        chunk.stored_name = partial(stored_name, plan=plan)
    return kept


def split_stages(chunks: Sequence[LanguageModel], plan: StagePlan) -> None:
    """Gives the layers of each stage of a finer plan their own copy of the parameters they share now.

    The function does not change. Gradient buffers and optimizers must be made anew.
    """
    for _, layer in layers_of(chunks):
        for _, _, module, attribute in list(layer_parameters(layer)):
            old = getattr(module, attribute)
            new = torch.nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            new.__dict__.update({name: value for name, value in old.__dict__.items() if name in _KEPT})
            setattr(module, attribute, new)
    share_stages(chunks, plan)


_KEPT = ("sequence_parallel", "tensor_model_parallel", "partition_dim", "partition_stride", "allreduce")
"""Marks of a parameter that say how it is cut and reduced."""


def count_unique(chunks: Sequence[LanguageModel]) -> int:
    """Counts the parameters of this rank, shared ones once."""
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
