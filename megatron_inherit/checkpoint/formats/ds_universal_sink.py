"""Lays out a universal checkpoint that DeepSpeed loads at any ZeRO stage and number of ranks.

Where no optimizer state is written the moments are zeros, since DeepSpeed's loader asks for them; they take no space.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.atomic import write_bytes, write_json
from megatron_inherit.base.errors import CheckpointError, UsageError
from megatron_inherit.checkpoint.extents import Piece, whole
from megatron_inherit.checkpoint.formats.hf import ROWS
from megatron_inherit.checkpoint.formats.hf_config import config_file
from megatron_inherit.checkpoint.formats.megatron_names import DIALECTS, megatron_rows
from megatron_inherit.checkpoint.formats.pickle_machine import Global, Opaque
from megatron_inherit.checkpoint.formats.pt_writer import Archive, Blank, create_archives, lay_out, patch_checksums
from megatron_inherit.checkpoint.layout import LayoutRow, PhysicalTensor, physical_tensors
from megatron_inherit.checkpoint.stream import Sink, SinkOptions, StoredTensor, write_side_files

_KINDS = ("fp32", "exp_avg", "exp_avg_sq")
_VERSION = "0.19.8"
_MAX_GROUPS = 64
_INFO_VERSION = 0.2


def make_sink(config: ModelConfig, dtypes: Mapping[str, str], options: SinkOptions) -> Sink:
    """Lays the files out.

    Args:
        config: The model.
        dtypes: Type of each tensor; all must be F32.
        options: As dialect ``hf`` (default) or one of Megatron's, whose names the parameters get; ``iteration`` is
            the number of steps taken; ``optimizer`` fills fp32 weights and moments from ``KIND:NAME`` tensors.

    Raises:
        CheckpointError: A tensor is not F32, or ``config.json`` has no place for something of the model.
    """
    wrong = next((name for name, dtype in dtypes.items() if dtype != "F32"), None)
    if wrong:
        raise CheckpointError(
            f"{wrong} cannot be written to a universal checkpoint.",
            got=dtypes[wrong],
            expected="F32",
            fix="Universal checkpoints hold fp32 weights: pass --dtype fp32.",
        )
    rows = _rows(config, options.dialect or "hf")
    raw = config_file(config, options.hf_config, "F32")
    folder = f"global_step{options.iteration}"
    archives: dict[str, Archive] = {}
    tensors: dict[str, StoredTensor] = {}
    for tensor in physical_tensors(rows, config):
        parameter = f"{folder}/zero/{tensor.name}"
        step = Blank("F32", (), struct.pack("<f", options.iteration if options.optimizer else 0))
        archives[f"{parameter}/step.pt"] = lay_out(f"{parameter}/step.pt", step)
        for kind in _KINDS:
            file = f"{parameter}/{kind}.pt"
            archives[file] = lay_out(file, _entry(tensor, zeros=kind != "fp32" and not options.optimizer))
            places = tensor.map(whole(archives[file].extents[0]))
            for part in tensor.parts:
                if options.optimizer:
                    tensors[f"{kind}:{part.name}"] = StoredTensor(part.shape, "F32", places[part.name])
                if kind == "fp32":
                    pieces: tuple[Piece, ...] = () if options.optimizer else places[part.name]
                    tensors[part.name] = StoredTensor(part.shape, "F32", pieces)
    archives |= _states(folder, rows, config, options)

    def prepare(root: Path) -> None:
        for file, archive in archives.items():
            create_archives(root / file, [archive])

    def finish(root: Path) -> None:
        for file, archive in archives.items():
            patch_checksums(root / file, archive.records)
        write_side_files(root, options.side_files)
        write_json(root / "config.json", raw)
        write_bytes(root / "latest_universal", folder.encode())

    wanted = {name: tensors[name] for name in dtypes if name in tensors}
    sizes = {file: archive.length for file, archive in archives.items()}
    return Sink("ds_universal", config, wanted, sizes, prepare, finish)


def _rows(config: ModelConfig, dialect: str) -> tuple[LayoutRow, ...]:
    if dialect == "hf":
        return ROWS[config.family]
    if dialect in DIALECTS:
        return megatron_rows(config, dialect, gate_up="concat")
    raise UsageError(f"Unknown dialect {dialect!r} of universal names.", expected=f"hf, {', '.join(DIALECTS)}")


def _entry(tensor: PhysicalTensor, *, zeros: bool) -> dict[str, Any]:
    """Gives what a parameter's file holds: the tensor, and how tensor parallelism may cut it."""
    entry: dict[str, Any] = {"param": Blank("F32", tensor.shape(), zeros=zeros)}
    axis = tensor.split_axis
    if axis is not None:
        entry["cat_dim"] = 1 - axis if tensor.row.transpose else axis
    if tensor.row.fuse == "concat" and len(tensor.parts) == 2:
        entry["param_n_sub_params"] = 2
    if tensor.is_vocab:
        entry["vocab_tensor"] = True
    return entry


def _config(options: SinkOptions) -> dict[str, Any]:
    """Keeps Adam's settings, which our reader looks for; DeepSpeed's loaders do not."""
    if not options.adam:
        return {}
    return {"optimizer": {"type": "Adam", "params": {"betas": options.adam[:2], "eps": options.adam[2]}}}


def _states(folder: str, rows: tuple[LayoutRow, ...], config: ModelConfig, options: SinkOptions) -> dict[str, Archive]:
    """Lays out the files beside the parameters, as far as DeepSpeed's loaders ask for them."""
    shapes = {
        tensor.name: Opaque(Global("torch", "Size"), (tensor.shape(),)) for tensor in physical_tensors(rows, config)
    }
    step = options.iteration if options.optimizer else 0
    model: dict[str, Any] = {
        "module": {},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [shapes],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": options.iteration,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": _config(options),
        "ds_version": _VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": _INFO_VERSION},
    }
    # DeepSpeed pairs these groups with the trainer's own and stops at the shorter list; an empty one changes nothing.
    groups: list[dict[str, Any]] = [{} for _ in range(_MAX_GROUPS)]
    first = {"step": Blank("F32", (), struct.pack("<f", step))}
    optimizer: dict[str, Any] = {
        "ds_version": _VERSION,
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: first}, "param_groups": groups},
    }
    files: dict[str, Any] = {f"{folder}/zero/optimizer_state.pt": optimizer}
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        files[f"{folder}/{name}"] = model
    return {file: lay_out(file, value) for file, value in files.items()}
