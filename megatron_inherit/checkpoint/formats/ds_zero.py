"""DeepSpeed's ordinary ZeRO checkpoints: fp32 weights and moments in flat partitions, one file a data-parallel rank.

ZeRO-1 and 2: the parameters of a group, flattened in the order of ``param_shapes``, cut into equal parts. ZeRO-3: every
parameter cut on its own, ceil(n / W) elements a rank, the pieces of a rank one after another. Format:
deepspeed/runtime/zero/stage_1_and_2.py, stage3.py, and utils/zero_to_fp32.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.extents import Extent, Piece, flat_pieces
from megatron_inherit.checkpoint.formats.adam import adam_of_config, adam_settings
from megatron_inherit.checkpoint.formats.bind import bind_pieces, in_order
from megatron_inherit.checkpoint.formats.ds_model import find_config, find_rows, tied_names
from megatron_inherit.checkpoint.formats.ds_universal import KINDS, read_number
from megatron_inherit.checkpoint.formats.megatron_folder import missing_folder
from megatron_inherit.checkpoint.formats.megatron_names import IGNORED
from megatron_inherit.checkpoint.formats.pickle_machine import Opaque
from megatron_inherit.checkpoint.formats.pickle_reader import read_torch
from megatron_inherit.checkpoint.layout import LayoutRow, check_names, physical_tensors
from megatron_inherit.checkpoint.stream import Source, StoredTensor

_STAGES = ("disabled", "optimizer_states", "gradients", "weights")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
Flat = dict[str, dict[str, StoredTensor]]
"""Kind -> parameter name -> where its elements are, in the shape the parameter has on this tensor-parallel rank."""


@dataclass(frozen=True)
class _Rank:
    """One data-parallel rank: its flat arrays by kind, one a group."""

    file: Path
    stage: int
    world: int
    flats: Mapping[str, Sequence[Extent]]
    step: int
    adam: tuple[float, ...]


def detect(path: str) -> bool:
    """Tells whether a folder holds ZeRO optimizer files, or names one that does in ``latest``."""
    return _find_folder(Path(path)) is not None


def open_source(path: str) -> Source:
    """Reads the structure of every rank's optimizer and model states.

    Raises:
        CheckpointError: A rank is missing or of another step, the model is not known, or a parameter is missing,
            unknown or of the wrong shape.
    """
    folder = _find_folder(Path(path))
    if folder is None:
        raise CheckpointError(f"{path} holds no zero_pp_rank_*_optim_states.pt.")
    grid = _read_grid(folder)
    states = [_model_states(folder, mp, ranks[0].stage) for mp, ranks in enumerate(grid)]
    config, raw = find_config(folder, states[0])
    shards = [_flat(ranks, state, folder) for ranks, state in zip(grid, states, strict=True)]
    dialect, prefix, rows = find_rows(shards[0]["fp32"], config, where=str(folder))
    if len(shards) > 1 and dialect == "hf":
        raise CheckpointError(
            f"{folder} has {len(shards)} model-parallel ranks, whose layout it does not tell.",
            fix="Convert it with DeepSpeed's ds_to_universal.py first.",
        )
    bound = {kind: _bind(config, rows, [shard[kind] for shard in shards], prefix, folder) for kind in KINDS}
    optimizer = {f"{kind}:{name}": stored for kind in KINDS for name, stored in bound[kind].items()}
    first = grid[0][0]
    details = {
        "iteration": states[0].get("global_steps"),
        "stage": first.stage,
        "dp": len(grid[0]),
        "tp": len(grid),
        "dialect": dialect,
        "optimizer_step": first.step,
        "adam": first.adam or adam_of_config(states[0].get("ds_config")),
    }
    content = repr([(rank.file.name, rank.file.stat().st_size, rank.step) for ranks in grid for rank in ranks])
    identity = {"optim_states": xxhash.xxh3_128_hexdigest(content.encode())}
    weights = in_order(config, bound["fp32"])
    return Source("ds_zero", path, config, weights, optimizer, hf_config=raw, details=details, identity=identity)


def _find_folder(path: Path) -> Path | None:
    tracker = path / "latest"
    if tracker.is_file():
        path = path / tracker.read_text()[:256].strip()
        if not path.is_dir():
            raise missing_folder(tracker, path)
    return path if path.is_dir() and any(_OPTIMIZER.fullmatch(entry.name) for entry in path.iterdir()) else None


def _read_grid(folder: Path) -> list[list[_Rank]]:
    """Reads the optimizer files by model-parallel and data-parallel rank.

    Raises:
        CheckpointError: A rank is missing, or the ranks are of different worlds.
    """
    found: dict[tuple[int, int], Path] = {}
    for entry in sorted(folder.iterdir()):
        match = _OPTIMIZER.fullmatch(entry.name)
        if match:
            place = int(match[2]), int(match[1])
            if place in found:
                raise CheckpointError(
                    f"{entry} and {found[place].name} are the same rank.", fix="Remove the one of another run."
                )
            found[place] = entry
    worlds = 1 + max(mp for mp, _ in found), 1 + max(dp for _, dp in found)
    for mp in range(worlds[0]):
        for dp in range(worlds[1]):
            if (mp, dp) not in found:
                raise CheckpointError(f"{folder} lacks the optimizer states of rank {dp} (mp_rank_{mp:02d}).")
    grid = [[_read_rank(found[mp, dp]) for dp in range(worlds[1])] for mp in range(worlds[0])]
    first = grid[0][0]
    for rank in (rank for ranks in grid for rank in ranks):
        if rank.world != worlds[1]:
            raise CheckpointError(
                f"{rank.file} was written by {rank.world} data-parallel ranks.",
                got=f"{worlds[1]} files",
                fix="A rank's file is missing, or one of another run was copied in.",
            )
        if (rank.step, rank.stage) != (first.step, first.stage):
            raise CheckpointError(
                f"{rank.file} does not belong to {first.file}.",
                got=f"step {rank.step}, stage {rank.stage}",
                expected=f"step {first.step}, stage {first.stage}",
            )
    return grid


def _stage(stored: Any) -> int:
    """Reads a number, or DeepSpeed's ``ZeroStageEnum`` by its value or its name."""
    told = stored.args[-1] if isinstance(stored, Opaque) else stored
    return _STAGES.index(told) if told in _STAGES else int(told)


def _read_rank(file: Path) -> _Rank:
    value = read_torch(file)
    state = value.get("optimizer_state_dict") if isinstance(value, dict) else None
    if not isinstance(state, dict) or "zero_stage" not in state:
        raise CheckpointError(f"{file} holds no ZeRO optimizer state.")
    stage = _stage(state["zero_stage"])
    weights = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    base = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    try:
        count = state["partition_count"]
        world = count[0] if isinstance(count, (list, tuple)) else count
        moments = state[base]["state"]
        groups = [moments[key] for key in sorted(moments)]
        flats = {
            "fp32": state[weights],
            "exp_avg": [group["exp_avg"] for group in groups],
            "exp_avg_sq": [group["exp_avg_sq"] for group in groups],
        }
        step = read_number(groups[0].get("step", 0))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{file} has no fp32 weights with Adam's moments in flat groups.",
            got=error,
            fix="Only Adam-like optimizers are read; convert it with DeepSpeed's zero_to_fp32.py.",
        ) from error
    for kind_name, arrays in flats.items():
        if not all(isinstance(array, Extent) and array.is_dense for array in arrays):
            raise CheckpointError(f"{file}: {kind_name} is not a list of flat tensors.")
        sizes, needed = ([array.numel for array in group] for group in (arrays, flats["fp32"]))
        if len(sizes) != len(needed) or any(size < least for size, least in zip(sizes, needed, strict=True)):
            raise CheckpointError(
                f"{file}: {kind_name} does not fit the fp32 weights group by group.", got=sizes, expected=needed
            )
    return _Rank(file, stage, int(world), flats, step, adam_settings(state[base].get("param_groups")))


def _model_states(folder: Path, mp: int, stage: int) -> dict[str, Any]:
    name = f"zero_pp_rank_0_mp_rank_{mp:02d}_model_states.pt" if stage == 3 else f"mp_rank_{mp:02d}_model_states.pt"
    value = read_torch(folder / name)
    if not isinstance(value, dict) or not isinstance(value.get("param_shapes"), list):
        raise CheckpointError(f"{folder / name} has no param_shapes.")
    if value.get("frozen_param_shapes"):
        raise CheckpointError(f"{folder / name}: frozen parameters are not supported.", fix="Use zero_to_fp32.py.")
    return value


def _flat(ranks: Sequence[_Rank], states: Mapping[str, Any], folder: Path) -> Flat:
    """Finds every parameter in the partitions of all ranks."""
    split = _split_per_parameter if ranks[0].stage == 3 else _split_per_group
    flat: Flat = {}
    for kind in KINDS:
        pieces: dict[str, list[Piece]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for group in states["param_shapes"]:
            shapes.update(group)
        split(kind, ranks, states["param_shapes"], pieces)
        for name, shape in shapes.items():
            covered = sum(piece.extent.numel for piece in pieces.get(name, ()))
            if covered != math.prod(shape):
                raise CheckpointError(
                    f"{folder}: the partitions do not hold all of {name}.", got=covered, expected=math.prod(shape)
                )
        flat[kind] = {
            name: StoredTensor(tuple(shape), "F32", tuple(pieces.get(name, ()))) for name, shape in shapes.items()
        }
        for alias, holder in states.get("shared_params", {}).items():
            if holder in flat[kind]:
                flat[kind].setdefault(alias, flat[kind][holder])
    return flat


def _split_per_group(
    kind: str, ranks: Sequence[_Rank], groups: Sequence[Mapping[str, Any]], pieces: dict[str, list[Piece]]
) -> None:
    """ZeRO-1 and 2: the partitions of a group, put together, are its parameters one after another."""
    for number, shapes in enumerate(groups):
        at, low = 0, 0
        bounds = []
        for name, shape in shapes.items():
            bounds.append((name, tuple(shape), at, at + math.prod(shape)))
            at += math.prod(shape)
        for rank in ranks:
            size = rank.flats["fp32"][number].numel
            part = rank.flats[kind][number]
            for name, shape, first, last in bounds:
                start, stop = max(first, low), min(last, low + size)
                if start < stop:
                    cut = part.box((start - low,), (stop - start,))
                    pieces.setdefault(name, []).extend(flat_pieces(shape, start - first, cut))
            low += size


def _split_per_parameter(
    kind: str, ranks: Sequence[_Rank], groups: Sequence[Mapping[str, Any]], pieces: dict[str, list[Piece]]
) -> None:
    """ZeRO-3: a rank's flat groups, put together, are its slices of all parameters; a slice may cross two groups."""
    world = len(ranks)
    for number, rank in enumerate(ranks):
        stored, at = _Concatenated(rank.flats[kind]), 0
        for shapes in groups:
            for name, shape in shapes.items():
                numel = math.prod(shape)
                part = -(-numel // world)
                first = min(numel, number * part)
                for offset, cut in stored.cut(at, min(part, numel - first)):
                    pieces.setdefault(name, []).extend(flat_pieces(tuple(shape), first + offset, cut))
                at += part


class _Concatenated:
    """Flat arrays seen as one."""

    def __init__(self, arrays: Sequence[Extent]) -> None:
        self._arrays = arrays

    def cut(self, start: int, length: int) -> list[tuple[int, Extent]]:
        """Gives the parts of ``[start, start + length)``: (offset in it, extent)."""
        parts, low = [], 0
        for array in self._arrays:
            first, last = max(start, low), min(start + length, low + array.numel)
            if first < last:
                parts.append((first - start, array.box((first - low,), (last - first,))))
            low += array.numel
        return parts


def _bind(
    config: ModelConfig, rows: tuple[LayoutRow, ...], shards: list[dict[str, StoredTensor]], prefix: str, folder: Path
) -> dict[str, StoredTensor]:
    if len(shards) > 1:  # each rank's [gate; up] comes as it was trained, unlike in a universal checkpoint
        rows = tuple(_per_shard(row) for row in rows)
    wanted = list(physical_tensors(rows, config))
    named = [{name.removeprefix(prefix): stored for name, stored in shard.items()} for shard in shards]
    ignored = (*IGNORED, *tied_names(config))
    for shard in named:
        check_names(shard, (tensor.name for tensor in wanted), where=str(folder), ignored=ignored, config=config)
    bound: dict[str, StoredTensor] = {}
    for tensor in wanted:
        bound.update(bind_pieces(tensor, [shard[tensor.name] for shard in named]))
    return bound


def _per_shard(row: LayoutRow) -> LayoutRow:
    return dataclasses.replace(row, fuse="concat_per_shard") if row.fuse == "concat" else row
