"""Shared stages in a checkpoint: several layers of the model read one stored tensor, ``sws.stages.{s}.*``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.stream import StoredTensor

KEY = "sws"
"""Field of ``config.json`` that holds the ids."""

PREFIX = "sws.stages."
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")

Ids = Mapping[str, Sequence[int]]
"""``attn``, ``mlp`` and ``norm`` -> physical id of each layer."""


def component_of(inside: str) -> str:
    """Tells whose ids a tensor of a block follows, from its name inside the block."""
    return "attn" if inside.startswith("attn.") else "mlp" if inside.startswith("mlp.") else "norm"


def stored_name(name: str, ids: Ids) -> str:
    """Names the stored tensor that a canonical one reads: ``layers.7.*`` -> ``sws.stages.2.*``."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    return f"{PREFIX}{ids[component_of(match[2])][int(match[1])]}.{match[2]}"


def read_ids(raw: Mapping[str, Any], config: ModelConfig, where: str) -> Ids:
    """Reads the shared layers' ids from a ``config.json``.

    Raises:
        CheckpointError: They are missing or do not cover the model's layers.
    """
    ids = raw.get(KEY)
    names = ("attn", "mlp", "norm")
    right = isinstance(ids, Mapping) and all(
        isinstance(ids.get(name), list)
        and len(ids[name]) == config.num_layers
        and all(type(number) is int and 0 <= number < config.num_layers for number in ids[name])
        for name in names
    )
    if not right or not isinstance(ids, Mapping):
        raise CheckpointError(
            f"{where}: {KEY} does not say which weights each of the {config.num_layers} layers uses.",
            expected=f"lists {', '.join(names)} of {config.num_layers} ids",
        )
    return {name: tuple(ids[name]) for name in names}


def share_names(
    stored: Mapping[str, StoredTensor], config: ModelConfig, ids: Ids, where: str
) -> dict[str, StoredTensor]:
    """Gives the whole model's tensors, and optimizer state in the same kinds as it is stored, by canonical name.

    Args:
        stored: By stored name, ``KIND:NAME`` for optimizer state.
        config: The model.
        ids: Which layer uses which stored weights.
        where: For messages.

    Raises:
        CheckpointError: A weight is missing or of another shape.
    """
    kinds = {kind + ":" for kind, colon, _ in (key.rpartition(":") for key in stored) if colon}
    tensors = {}
    for spec in enumerate_tensors(config):
        name = stored_name(spec.name, ids)
        if name not in stored:
            raise CheckpointError(f"{where} has no tensor {name}, which {spec.name} needs.")
        if stored[name].shape != spec.shape:
            raise CheckpointError(f"{where}: wrong shape of {name}.", got=stored[name].shape, expected=spec.shape)
        tensors[spec.name] = stored[name]
        tensors |= {kind + spec.name: stored[kind + name] for kind in kinds if kind + name in stored}
    return tensors
