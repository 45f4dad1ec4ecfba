"""Shared stages in a checkpoint: several layers of the model read one stored tensor, ``sws.stages.{s}.*``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.dtypes import cast
from megatron_inherit.checkpoint.files import FilePool
from megatron_inherit.checkpoint.stream import Decode, StoredTensor, read_box

KEY = "sws"
"""Field of ``config.json`` that holds the ids."""

PREFIX = "sws.stages."
LAYER_PREFIX = "sws.layers."
"""What a layer has of its own beside its stage: ``gate.*``, ``up.*`` and ``down.*``."""
UNFOLDED = "unfolded"
"""Kind under which a weight is read as it is stored, for the run that goes on with its gates and factors."""
DOWN_OF = {
    "attn.q": "attn.qkv",
    "attn.k": "attn.qkv",
    "attn.v": "attn.qkv",
    "attn.o": "attn.o",
    "mlp.gate": "mlp.in",
    "mlp.up": "mlp.in",
    "mlp.down": "mlp.down",
}
"""Matrix -> name of the second of its low-rank factors; one serves all matrices that share an input."""
GATE_OF = {"attn.o": "attn", "mlp.down": "mlp"}
"""Tensors that a layer's gates scale."""
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


def fold_own(
    tensors: Mapping[str, StoredTensor], own: Mapping[str, StoredTensor], pool: FilePool
) -> dict[str, StoredTensor]:
    """Folds what layers have of their own into their weights: gate times (stage + up x down), computed in float64.

    Args:
        tensors: The whole model's by canonical name; optimizer state is left as it is.
        own: ``sws.layers.{i}.gate.*``, ``.up.*`` and ``.down.*``, small enough to be read now.
        pool: Where files are opened.
    """
    values = {
        name: cast(read_box(pool, stored, (0,) * len(stored.shape), stored.shape), stored.dtype, "F64")
        for name, stored in own.items()
        if name.startswith(LAYER_PREFIX)
    }
    folded = dict(tensors)
    for name, stored in tensors.items():
        match = re.fullmatch(r"layers\.(\d+)\.(\w+\.\w+)\.(weight|bias)", name)
        if match is None:
            continue
        head, part = f"{LAYER_PREFIX}{match[1]}.", match[2]
        gate = values.get(f"{head}gate.{GATE_OF.get(part, '')}")
        up = values.get(f"{head}up.{part}") if match[3] == "weight" else None
        if gate is not None or up is not None:
            down = None if up is None else values[f"{head}down.{DOWN_OF[part]}"]
            folded[name] = replace(stored, decode=_fold(stored, gate, up, down))
    return folded


def _fold(stored: StoredTensor, gate: np.ndarray | None, up: np.ndarray | None, down: np.ndarray | None) -> Decode:
    def apply(rows: np.ndarray, first: int) -> np.ndarray:
        exact = cast(rows, stored.dtype, "F64")
        if up is not None and down is not None:
            exact = exact + up[first : first + len(rows)] @ down
        if gate is not None:
            exact = exact * gate[0]
        return cast(exact.astype(np.float32), "F32", stored.dtype)

    arguments = {"gate": "" if gate is None else float(gate[0]), "rank": 0 if up is None else up.shape[1]}
    return Decode("fold", arguments, stored.shape, stored.dtype, apply, positional=True)
