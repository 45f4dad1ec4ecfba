"""DeepSpeed's universal checkpoints: a folder a parameter with ``fp32.pt``, ``exp_avg.pt``, ``exp_avg_sq.pt``.

A file holds ``{"param": tensor, "cat_dim": ..., ...}``, or a bare flat tensor where it was made from plain ZeRO-3.
Format: deepspeed/checkpoint/ds_to_universal.py and universal_checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.extents import Extent
from megatron_inherit.checkpoint.formats.adam import adam_of_config, adam_settings
from megatron_inherit.checkpoint.formats.bind import bind_shards, in_order
from megatron_inherit.checkpoint.formats.ds_model import find_config, find_rows, plain_names, tied_names
from megatron_inherit.checkpoint.formats.ds_universal_sink import make_sink
from megatron_inherit.checkpoint.formats.megatron_names import IGNORED
from megatron_inherit.checkpoint.formats.pickle_reader import fields, read_torch
from megatron_inherit.checkpoint.layout import PhysicalTensor, check_names, physical_tensors
from megatron_inherit.checkpoint.stream import Source, StoredTensor

__all__ = ["detect", "make_sink", "open_source"]

KINDS = ("fp32", "exp_avg", "exp_avg_sq")


def detect(path: str) -> bool:
    """Tells whether a folder is a universal checkpoint or names one in ``latest_universal``."""
    return _find_folder(Path(path)) is not None


def open_source(path: str) -> Source:
    """Reads the structure of every parameter's files.

    Raises:
        CheckpointError: The model is not known, or a parameter is missing, unknown or of the wrong shape.
    """
    folder = _find_folder(Path(path))
    if folder is None:
        raise CheckpointError(
            f"{path} is no universal checkpoint.", expected="a folder zero/ with one folder a parameter"
        )
    states = model_states(folder)
    config, raw = find_config(folder, states)
    entries = {entry.name: entry for entry in (folder / "zero").iterdir() if entry.is_dir()}
    names = {plain: entries[name] for name, plain in plain_names(entries).items()}
    dialect, prefix, rows = find_rows(names, config, where=str(folder))
    here = {name.removeprefix(prefix): entry for name, entry in names.items()}
    wanted = list(physical_tensors(rows, config))
    ignored = (*IGNORED, *tied_names(config))
    check_names(here, (tensor.name for tensor in wanted), where=str(folder), ignored=ignored, config=config)
    weights: dict[str, StoredTensor] = {}
    optimizer: dict[str, StoredTensor] = {}
    for tensor in wanted:
        for kind in KINDS:
            file = here[tensor.name] / f"{kind}.pt"
            if kind == "fp32" or file.is_file():
                found = bind_shards(tensor, [_read(file, tensor)])
                optimizer.update({f"{kind}:{name}": stored for name, stored in found.items()})
                if kind == "fp32":
                    weights.update(found)
    details = {"iteration": states.get("global_steps", 0), "dialect": dialect, "optimizer_step": _step(here, wanted)}
    details["adam"] = _adam(folder) or adam_of_config(states.get("ds_config"))
    identity = {name: xxhash.xxh3_128_hexdigest(repr(stored).encode()) for name, stored in weights.items()}
    return Source(
        "ds_universal",
        path,
        config,
        in_order(config, weights),
        optimizer,
        hf_config=raw,
        details=details,
        identity={"zero": xxhash.xxh3_128_hexdigest("".join(identity.values()).replace(str(folder), "").encode())},
    )


def _find_folder(path: Path) -> Path | None:
    for name in ("latest_universal", "latest"):
        tracker = path / name
        if tracker.is_file():
            inner = path / tracker.read_text()[:256].strip()
            if _is_universal(inner):
                return inner
    return path if _is_universal(path) else None


def _is_universal(path: Path) -> bool:
    return (path / "zero").is_dir() and any((path / "zero").glob("*/fp32.pt"))


def model_states(folder: Path) -> dict[str, Any]:
    """Reads one of the model states files of a step; gives nothing where there is none."""
    for pattern in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt", "*model_states.pt"):
        for file in sorted(folder.glob(pattern)):
            value = read_torch(file)
            if isinstance(value, dict):
                return value
    return {}


def _read(file: Path, tensor: PhysicalTensor) -> Extent:
    """Finds a parameter's elements in the dictionary or bare form."""
    value = read_torch(file)
    extent = value.get("param") if isinstance(value, dict) else value
    if not isinstance(extent, Extent):
        raise CheckpointError(f"{file} holds no tensor of {tensor.name}.", got=type(value).__name__)
    if isinstance(value, dict) and (value.get("sub_param_shape") is not None or value.get("ep_is_expert_param")):
        raise CheckpointError(f"{file}: parameters made of uneven parts or experts are not supported.")
    shape = tensor.shape()
    return extent.reshaped(shape) if len(extent.shape) == 1 != len(shape) and extent.is_dense else extent


def _adam(folder: Path) -> tuple[float, ...]:
    """Reads Adam's settings where the parameter groups tell them; weights and moments do without."""
    try:
        return adam_settings(fields(read_torch(folder / "zero" / "optimizer_state.pt")).get("param_groups"))
    except CheckpointError:
        return ()


def _step(here: Mapping[str, Path], wanted: list[PhysicalTensor]) -> int:
    """Reads the number of optimizer steps, which all parameters share."""
    file = here[wanted[0].name] / "step.pt"
    if not file.is_file():
        return 0
    return read_number(read_torch(file))


def read_number(value: Any) -> int:
    """Gives a stored step, which is a number or a tensor of one element."""
    if not isinstance(value, Extent):
        return int(value or 0)
    import numpy as np

    from megatron_inherit.checkpoint.dtypes import CARRIERS

    data = np.fromfile(value.file, CARRIERS[value.dtype], 1, offset=value.offset)
    return int(data[0])
