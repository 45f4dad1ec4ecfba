"""Where DeepSpeed keeps weights, masters and moments of each ZeRO stage, as shards of our parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_inherit.engines.deepspeed.nvme import stored_values
from megatron_inherit.engines.parts import MOMENTS, Shard
from megatron_inherit.model.pieces import Piece

Named = list[tuple[Any, list[Piece]]]
"""Parameters, with the attributes that DeepSpeed gives them, and their pieces."""


def partition_bounds(parameter: Any, numel: int, rank: int) -> tuple[int, int]:
    """Gives the elements of a flattened ZeRO-3 parameter that ``rank`` holds, padding left out."""
    size = parameter.ds_tensor.ds_numel
    return min(rank * size, numel), min((rank + 1) * size, numel)


def weight_shards(named: Named, *, stage: int, rank: int, size: int) -> Iterator[Shard]:
    """Yields the model's weights: ZeRO-3 partitions, else whole ones that the replicas write in turns.

    Args:
        named: Parameters and their pieces.
        stage: ZeRO stage.
        rank: Data parallel rank.
        size: Data parallel ranks.
    """
    for index, (parameter, pieces) in enumerate(named):
        if stage < 3:
            values = {"weight": parameter.data.view(-1)}
            yield Shard(pieces, 0, parameter.numel(), values, written=index % size == rank)
            continue
        low, high = partition_bounds(parameter, parameter.ds_numel, rank)
        stored = parameter.ds_tensor.data.view(-1)[: high - low]
        yield Shard(pieces, low, high, {"weight": stored}, written=True)


def state_shards(named: Named, optimizer: Any, *, stage: int, rank: int, size: int) -> Iterator[Shard]:
    """Yields fp32 masters (of fp32 weights too, from stage 1 on) and the moments that exist.

    Args:
        named: Parameters and their pieces.
        optimizer: What ``deepspeed.initialize`` gave: AdamW itself at stage 0, else a ZeRO optimizer around it.
        stage: ZeRO stage.
        rank: Data parallel rank.
        size: Data parallel ranks.
    """
    for index, (parameter, pieces) in enumerate(named):
        if stage == 0:
            state = optimizer.state.get(parameter, {})
            values = {kind: state[kind].view(-1) for kind in MOMENTS if kind in state}
            yield Shard(pieces, 0, parameter.numel(), values, written=index % size == rank)
        elif stage == 3:
            low, high = partition_bounds(parameter, parameter.ds_numel, rank)
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield Shard(pieces, low, high, _values(flat, optimizer, offset, high - low), written=True)
        elif parameter._hp_mapping is not None:
            inside, at = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
            flat = masters(optimizer)[parameter._hp_mapping.param_group_index]
            values = _values(flat, optimizer, at.start, at.numel)
            yield Shard(pieces, inside.start, inside.start + inside.numel, values, written=True)


def masters(optimizer: Any) -> list[torch.Tensor]:
    """Gives the flat fp32 tensors that AdamW updates on this rank."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _values(flat: torch.Tensor, optimizer: Any, start: int, numel: int) -> dict[str, torch.Tensor]:
    whole = stored_values(optimizer, flat)
    if whole is None:
        state = optimizer.optimizer.state.get(flat, {})
        whole = {"fp32": flat.data} | {kind: state[kind] for kind in MOMENTS if kind in state}
    return {kind: tensor.view(-1)[start : start + numel] for kind, tensor in whole.items()}
