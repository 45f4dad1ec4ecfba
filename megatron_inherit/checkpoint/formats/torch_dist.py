"""Megatron-Core's ``torch_dist`` checkpoints: ``.metadata``, ``__R_K.distcp``, ``common.pt``, ``metadata.json``.

Tensors are global: query groups packed, [gate; up], names of the Transformer Engine spec whatever the spec was. The
layers of a homogeneous model are axis 0 of one tensor per kind; else the global index is in the name. Format:
megatron/core/dist_checkpointing and torch/distributed/checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.dtypes import WEIGHT_DTYPES
from megatron_inherit.checkpoint.extents import Extent, Piece, check_cover
from megatron_inherit.checkpoint.formats.adam import adam_settings, adam_step
from megatron_inherit.checkpoint.formats.dcp_metadata import METADATA, Chunk, ChunkedTensor, Metadata, read_metadata
from megatron_inherit.checkpoint.formats.megatron_args import config_from_args
from megatron_inherit.checkpoint.formats.megatron_folder import iteration_folder
from megatron_inherit.checkpoint.formats.megatron_names import IGNORED, megatron_rows
from megatron_inherit.checkpoint.formats.pickle_reader import fields, mapped, read_torch, read_torch_blob
from megatron_inherit.checkpoint.formats.torch_dist_sink import make_sink
from megatron_inherit.checkpoint.layout import (
    PhysicalTensor,
    check_names,
    check_shape,
    physical_tensors,
    take_layer,
)
from megatron_inherit.checkpoint.stream import Source, StoredTensor

__all__ = ["Opened", "detect", "make_sink", "open_source", "opened"]

_PREFIXES = ("", "model.", "module.", "model.module.")
_EMBEDDING = "embedding.word_embeddings.weight"
_STATES = {"fp32": ("fp32_param", "param"), "exp_avg": ("exp_avg",), "exp_avg_sq": ("exp_avg_sq",)}
_FLAT = "optimizer.distributed."
_NO_OPTIMIZER = (
    "Its optimizer state is in flat buffers tied to the parallel layout (dp_reshardable, Megatron's default). "
    "Save the checkpoint again with --dist-ckpt-optim-fully-reshardable."
)


@dataclass(frozen=True)
class Opened:
    """What was read of a checkpoint when it was opened.

    Attributes:
        folder: Where its files are.
        metadata: Which chunk of which tensor is where.
        common: What is no tensor, the args among it.
    """

    folder: Path
    metadata: Metadata
    common: Mapping[str, Any]


def opened(source: Source) -> Opened:
    """Gives what was read of an opened ``torch_dist`` checkpoint.

    Raises:
        CheckpointError: The source is of another format.
    """
    if not isinstance(source.tensors, _Tensors):
        raise CheckpointError(f"{source.path} is no torch_dist checkpoint.", got=source.format)
    return source.tensors.opened


def detect(path: str) -> bool:
    """Tells whether a folder is a ``torch_dist`` checkpoint or holds one by its tracker."""
    return find_folder(Path(path)) is not None


def find_folder(path: Path) -> Path | None:
    """Finds the folder with the metadata: by the tracker, or the one named."""
    path = iteration_folder(path)
    complete = (path / METADATA).is_file() and (path / "metadata.json").is_file()
    return path if complete or any(path.glob("__*_*.distcp")) else None


def open_source(path: str) -> Source:
    """Reads the metadata and the configuration; where a tensor's bytes begin is looked up when it is first asked for.

    Raises:
        CheckpointError: The folder is incomplete, of another backend, or a tensor is missing, unknown or misshapen.
    """
    folder = find_folder(Path(path))
    if folder is None:
        raise CheckpointError(f"{path} has no {METADATA} of a torch_dist checkpoint.")
    _check_backend(folder)
    metadata = read_metadata(folder)
    common = read_common(folder)
    config = config_from_args(fields(common["args"]), where=str(folder / "common.pt"))
    prefix = find_prefix(metadata, folder)
    known = {name.removeprefix(prefix): tensor for name, tensor in metadata.tensors.items()}
    states = {name: tensor for name, tensor in known.items() if name.startswith("optimizer.")}
    weights = {name: tensor for name, tensor in known.items() if name not in states and not _is_other(name)}
    found = _Tensors(Opened(folder, metadata, common), config, weights)
    details: dict[str, Any] = {
        "iteration": common.get("iteration"),
        "homogeneous": found.homogeneous,
        "files": sorted({chunk.blob.file for tensor in weights.values() for chunk in tensor.chunks}),
    }
    inner = fields(fields(fields(common.get("optimizer")).get("optimizer")))
    details |= {
        "adam": adam_settings(inner.get("param_groups")),
        "optimizer_step": adam_step(inner.get("param_groups")),
    }
    if any(name.startswith(_FLAT) for name in (*metadata.tensors, *metadata.objects)):
        details["optimizer_note"] = _NO_OPTIMIZER
    identity = {name: _hash(folder / name) for name in (METADATA, "common.pt")}
    return Source("torch_dist", path, config, found, _optimizer(found, states), details=details, identity=identity)


def read_common(folder: Path) -> dict[str, Any]:
    """Reads ``common.pt``.

    Raises:
        CheckpointError: It is missing or lacks Megatron's args.
    """
    path = folder / "common.pt"
    common = read_torch(path)
    if not isinstance(common, dict) or not fields(common.get("args")):
        raise CheckpointError(
            f"{path} does not hold the args of a Megatron-LM run, which say what the model is.",
            fix="Checkpoints saved without args (other trainers) cannot be read.",
        )
    return common


def _check_backend(folder: Path) -> None:
    path = folder / "metadata.json"
    try:
        backend = json.loads(path.read_bytes()[: 1 << 20])["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged, so the save was not finished.", fix="Use an earlier checkpoint."
        ) from error
    if backend != "torch_dist":
        raise CheckpointError(f"{path} names another backend.", got=backend, expected="torch_dist")
    if not (folder / METADATA).is_file():
        raise CheckpointError(f"{folder / METADATA} is missing, so the save was not finished.")


def find_prefix(metadata: Metadata, folder: Path) -> str:
    """Gives what stands before the model's keys.

    Raises:
        CheckpointError: There is no embedding under any known prefix.
    """
    for prefix in _PREFIXES:
        if prefix + _EMBEDDING in metadata.tensors:
            return prefix
    raise CheckpointError(
        f"{folder} holds no Megatron GPT model.", got=", ".join(sorted(metadata.tensors)[:3]) or "no tensor"
    )


def _is_other(name: str) -> bool:
    """Tells whether a key belongs to the random state, the schedule and the like."""
    return name.split("/", maxsplit=1)[0] in ("rng_state", "opt_param_scheduler", "rerun_state_machine")


class _Tensors(Mapping[str, StoredTensor]):
    """Canonical tensors by name; the extents of a stored tensor are looked up on first use."""

    def __init__(self, opened: Opened, config: ModelConfig, stored: Mapping[str, ChunkedTensor]) -> None:
        self.opened, self._folder, self._config, self._stored = opened, opened.folder, config, stored
        rows = megatron_rows(config, "te", gate_up="concat")
        wanted = list(physical_tensors(rows, config))
        names = {stacked_name(tensor) for tensor in wanted}
        self.homogeneous = any(tensor.layer is not None and stacked_name(tensor) in stored for tensor in wanted)
        if not self.homogeneous:
            names = {tensor.name for tensor in wanted}
        ignored = (*IGNORED, r"output_layer\.weight") if config.tied else IGNORED
        check_names(stored, sorted(names), where=str(self._folder), ignored=ignored, config=config)
        self.homes = {part.name: tensor for tensor in wanted for part in tensor.parts}
        self.shapes = {part.name: part.shape for tensor in wanted for part in tensor.parts}
        self._order = [spec.name for spec in enumerate_tensors(config)]
        self._known: dict[str, StoredTensor] = {}
        for tensor in wanted:
            self._check(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, name: object) -> bool:
        return name in self.homes

    def __getitem__(self, name: str) -> StoredTensor:
        stored = self._stored[self.key(self.homes[name])]
        return _Deferred(self.shapes[name], stored.dtype, partial(self._resolve, name))

    def _resolve(self, name: str) -> StoredTensor:
        if name not in self._known:
            tensor = self.homes[name]
            self._known.update(self.bind(tensor, self._stored[self.key(tensor)]))
        return self._known[name]

    def key(self, tensor: PhysicalTensor) -> str:
        """Gives the key a stored tensor has here."""
        return stacked_name(tensor) if self.homogeneous else tensor.name

    def bind(self, tensor: PhysicalTensor, stored: ChunkedTensor) -> dict[str, StoredTensor]:
        """Finds the bytes of a stored tensor.

        Raises:
            CheckpointError: A chunk is not what the metadata says, or something is missing.
        """
        layer = tensor.layer if self.homogeneous else None
        chunks = [chunk for chunk in stored.chunks if layer is None or _has_layer(chunk, layer)]
        pieces = tuple(self._piece(chunk, stored.dtype) for chunk in chunks)
        if layer is not None:
            pieces = take_layer(pieces, layer)
        mapped_pieces = tensor.map(pieces)
        found = {}
        for part in tensor.parts:
            check_cover(part.name, part.shape, mapped_pieces[part.name])
            found[part.name] = StoredTensor(part.shape, stored.dtype, mapped_pieces[part.name])
        return found

    def _piece(self, chunk: Chunk, dtype: str) -> Piece:
        path = self._folder / chunk.blob.file
        with mapped(path) as data:
            extent = read_torch_blob(data, path, start=chunk.blob.offset, length=chunk.blob.length)
        if not isinstance(extent, Extent) or extent.shape != chunk.shape or extent.dtype != dtype:
            raise CheckpointError(
                f"{path}: the chunk at byte {chunk.blob.offset} is not what {METADATA} says.",
                got=f"{extent.dtype} {extent.shape}" if isinstance(extent, Extent) else type(extent).__name__,
                expected=f"{dtype} {chunk.shape}",
            )
        return Piece(chunk.start, extent)

    def _check(self, tensor: PhysicalTensor) -> None:
        """Checks shape and type by the metadata alone."""
        key = self.key(tensor)
        stored = self._stored[key]
        where = str(self._folder / METADATA)
        stacked = self.homogeneous and tensor.layer is not None
        shape = stored.shape[1:] if stacked else stored.shape
        rows = shape[0] if tensor.is_vocab and shape and shape[0] >= tensor.parts[0].shape[0] else None
        expected = tensor.shape(padded_vocab=rows)
        check_shape(key, stored.shape, (self._config.num_layers, *expected) if stacked else expected, where=where)
        if stored.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{where}: {key} is quantised or no weight.", got=stored.dtype)


class _Deferred(StoredTensor):
    """A tensor whose shape and type the metadata tell, and whose place is looked up when it is first read."""

    def __init__(self, shape: tuple[int, ...], dtype: str, load: Callable[[], StoredTensor]) -> None:
        for name, value in (("shape", shape), ("dtype", dtype), ("decode", None), ("_load", load)):
            object.__setattr__(self, name, value)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Where its elements are."""
        return self._load().pieces  # type: ignore[attr-defined]

    @property
    def stored_bytes(self) -> int:
        """Bytes that a read of all of it fetches."""
        return self.nbytes


def _optimizer(found: _Tensors, states: Mapping[str, ChunkedTensor]) -> dict[str, StoredTensor]:
    """Finds the fp32 weights and moments of the model-shaped layouts (fully_reshardable, fully_sharded_model_space)."""
    load: dict[str, StoredTensor] = {}
    for kind, spellings in _STATES.items():
        for name, tensor in found.homes.items():
            for spelling in spellings:
                key = f"optimizer.state.{spelling}.{found.key(tensor)}"
                if key in states:
                    later = partial(_load_state, found, tensor, states[key], name)
                    load[f"{kind}:{name}"] = _Deferred(found.shapes[name], states[key].dtype, later)
    return load


def _load_state(found: _Tensors, tensor: PhysicalTensor, stored: ChunkedTensor, name: str) -> StoredTensor:
    return found.bind(tensor, stored)[name]


def stacked_name(tensor: PhysicalTensor) -> str:
    """Gives the key of a homogeneous checkpoint, which has no layer number."""
    return tensor.row.physical.replace("{i}.", "")


def _has_layer(chunk: Chunk, layer: int) -> bool:
    return chunk.start[0] <= layer < chunk.start[0] + chunk.shape[0]


def _hash(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())
