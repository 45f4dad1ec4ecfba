"""Megatron-LM checkpoints of ``--ckpt-format torch``: ``iter_XXXXXXX/mp_rank_TT[_PPP]/model_optim_rng.pt``.

Read in every dialect of ``megatron_names`` and every QKV order of ``checkpoint_version`` 0 to 3, with virtual stages
and uneven stages (the stages themselves tell how many layers they hold); written as Megatron-Core names (``te`` or
``local``) or ``legacy`` ones, version 3. Format: megatron/training/checkpointing.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.extents import Extent
from megatron_inherit.checkpoint.formats.bind import bind_tensors
from megatron_inherit.checkpoint.formats.megatron_args import config_from_args
from megatron_inherit.checkpoint.formats.megatron_folder import TRACKER, iteration_folder
from megatron_inherit.checkpoint.formats.megatron_names import (
    IGNORED,
    find_dialect,
    local_layer,
    megatron_rows,
    shift_layer,
)
from megatron_inherit.checkpoint.formats.megatron_sink import make_sink
from megatron_inherit.checkpoint.formats.pickle_reader import fields, read_torch
from megatron_inherit.checkpoint.layout import Fuse
from megatron_inherit.checkpoint.stream import Source

__all__ = ["detect", "make_sink", "open_source"]

_FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?(?:_(\d{3}))?")
_ORDERS: dict[float, Fuse] = {0: "qkv_v0", 1: "qkv_v1", 2: "qkv", 3: "qkv"}


@dataclass(frozen=True)
class _Rank:
    """One file: its model's chunks with flat names, and the fields beside them."""

    file: Path
    chunks: tuple[dict[str, Any], ...]
    args: Mapping[str, Any]
    version: float
    iteration: Any


def detect(path: str) -> bool:
    """Tells whether a folder holds Megatron-LM rank folders, directly or below an iteration."""
    return _iteration_folder(Path(path)) is not None


def open_source(path: str) -> Source:
    """Reads the structure of every rank's file.

    Raises:
        CheckpointError: A rank is missing or does not belong, or a tensor is missing, unknown or of the wrong shape.
    """
    folder = _iteration_folder(Path(path))
    if folder is None:
        raise CheckpointError(f"{path} has no mp_rank_XX folders.", fix=f"Give the folder that holds {TRACKER}.")
    grid = _read_grid(folder)
    tp, pp = len(grid[0]), len(grid)
    first = grid[0][0]
    where = str(first.file)
    config = config_from_args(first.args, where=where)
    vpp = len(first.chunks)
    by_rank = [_whole_model(grid, rank, config) for rank in range(tp)]
    dialect = find_dialect(by_rank[0], config, where=str(folder))
    if first.version not in _ORDERS:
        raise CheckpointError(f"{where} has an unknown checkpoint_version.", got=first.version, expected="0, 1, 2 or 3")
    order = _ORDERS[first.version]
    if order != "qkv" and config.num_heads != config.num_kv_heads:
        raise CheckpointError(f"{where}: checkpoint_version {first.version} has no grouped queries.")
    rows = megatron_rows(config, dialect, qkv=order)
    tensors = bind_tensors(config, rows, by_rank, where=str(folder), ignored=_ignored(config))
    details: dict[str, Any] = {
        "iteration": first.iteration,
        "tp": tp,
        "pp": pp,
        "vpp": vpp,
        "dialect": dialect,
        "checkpoint_version": first.version,
        "optimizer_note": "Optimizer state in mp_rank files is not read: save it as torch_dist, fully reshardable.",
    }
    if not first.args.get("vocab_size"):
        details["vocabulary"] = "padded: Megatron did not record the true size"
    identity = {f"{rank.file.parent.name}/{_FILE}": rank_hash for rank, rank_hash in _hashes(grid)}
    return Source("megatron", path, config, tensors, details=details, identity=identity)


def _iteration_folder(path: Path) -> Path | None:
    """Finds the folder that holds the rank folders: by the tracker, or the one named."""
    path = iteration_folder(path)
    if path.is_dir() and any(_RANK.fullmatch(entry.name) for entry in path.iterdir()):
        return path
    return None


def _read_grid(folder: Path) -> list[list[_Rank]]:
    """Reads all ranks, by pipeline rank and tensor rank.

    Raises:
        CheckpointError: Experts, a missing or superfluous rank, or files of different runs or iterations.
    """
    found: dict[tuple[int, int], Path] = {}
    for entry in sorted(folder.iterdir()):
        match = _RANK.fullmatch(entry.name)
        if match and match[3]:
            raise CheckpointError(f"{entry} is a rank of an expert-parallel model.", fix="MoE is not supported.")
        if match:
            place = int(match[2] or 0), int(match[1])
            if place in found:
                raise CheckpointError(
                    f"{entry} and {found[place].parent} are the same rank.", fix="Remove the one of another run."
                )
            found[place] = entry / _FILE
    pp, tp = 1 + max(stage for stage, _ in found), 1 + max(rank for _, rank in found)
    for stage in range(pp):
        for rank in range(tp):
            if (stage, rank) not in found:
                name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
                raise CheckpointError(f"{folder / name} is missing.", got=f"{len(found)} ranks", expected=tp * pp)
    grid = [[_read_rank(found[stage, rank]) for rank in range(tp)] for stage in range(pp)]
    for member in (member for stage in grid for member in stage):
        _check_rank(member, grid[0][0], tp, pp)
    return grid


def _check_rank(rank: _Rank, first: _Rank, tp: int, pp: int) -> None:
    for name, size in (("tensor_model_parallel_size", tp), ("pipeline_model_parallel_size", pp)):
        if rank.args.get(name, size) != size:
            raise CheckpointError(
                f"{rank.file} was written with {name} {rank.args[name]}.",
                got=f"{size} in the folder",
                fix="A rank folder is missing, or one of another run was copied in.",
            )
    if (rank.iteration, rank.version, len(rank.chunks)) != (first.iteration, first.version, len(first.chunks)):
        raise CheckpointError(
            f"{rank.file} does not belong to {first.file}.",
            got=f"iteration {rank.iteration}, version {rank.version}, {len(rank.chunks)} chunks",
            expected=f"iteration {first.iteration}, version {first.version}, {len(first.chunks)} chunks",
        )


def _read_rank(file: Path) -> _Rank:
    value = read_torch(file)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a Megatron checkpoint.", got=type(value).__name__)
    names = ["model"] if "model" in value else sorted(
        (name for name in value if re.fullmatch(r"model\d+", str(name))), key=lambda name: int(name[5:])
    )  # fmt: skip
    if not names or "args" not in value:
        raise CheckpointError(f"{file} lacks the model or its args.", got=", ".join(map(str, value))[:200])
    chunks = tuple(_flatten(value[name]) for name in names)
    if any(name.startswith("language_model.lm_head") for chunk in chunks for name in chunk):
        raise CheckpointError(
            f"{file} has language_model.lm_head, a name of epfLLM's Megatron-LLM, whose MLP holds up before gate.",
            fix="Export it to Hugging Face with its own tools first.",
        )
    version = value.get("checkpoint_version", 0)
    return _Rank(file, chunks, fields(value["args"]), float(version), value.get("iteration"))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Joins the keys of nested dictionaries with dots."""
    flat: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        if isinstance(item, dict):
            flat.update(_flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return {name.replace("language_model.transformer.", "language_model.encoder."): item for name, item in flat.items()}


def _whole_model(grid: list[list[_Rank]], rank: int, config: ModelConfig) -> dict[str, Extent]:
    """Joins one tensor rank's stages under global layer numbers: chunk by chunk, in each the stages in order."""
    whole: dict[str, Extent] = {}
    offset = 0
    for chunk in range(len(grid[0][0].chunks)):
        for stage in grid:
            here = stage[rank].chunks[chunk]
            layers = {layer for name in here if (layer := local_layer(name)) is not None}
            if layers and layers != set(range(max(layers) + 1)):
                missing = min(set(range(max(layers) + 1)) - layers)
                raise CheckpointError(f"{stage[rank].file} lacks its layer {missing}.")
            for name, item in here.items():
                whole.update(_entry(shift_layer(name, offset), item, config, stage[rank].file))
            offset += len(layers)
    if offset != config.num_layers:
        raise CheckpointError(
            f"{grid[0][rank].file.parent.parent} does not hold all layers.", got=offset, expected=config.num_layers
        )
    return whole


def _entry(name: str, item: Any, config: ModelConfig, file: Path) -> dict[str, Extent]:
    """Gives the tensor of an entry; what is no tensor must be a state without weights."""
    if any(re.fullmatch(rule, name) for rule in _ignored(config)):
        return {}
    if not isinstance(item, Extent):
        raise CheckpointError(f"{file}: {name} is not a tensor.", got=type(item).__name__)
    return {name: item}


def _ignored(config: ModelConfig) -> tuple[str, ...]:
    tied = (r"output_layer\.weight", r"word_embeddings_for_head\.weight", r"language_model\.output_layer\.weight")
    return (*IGNORED, *tied) if config.tied else IGNORED


def _hashes(grid: list[list[_Rank]]) -> list[tuple[_Rank, str]]:
    import xxhash

    found = []
    for rank in (rank for stage in grid for rank in stage):
        structure = repr([sorted((name, str(item)) for name, item in chunk.items()) for chunk in rank.chunks])
        content = f"{rank.file.stat().st_size} {rank.iteration} {structure}".replace(str(rank.file), "")
        found.append((rank, xxhash.xxh3_128_hexdigest(content.encode())))
    return found
