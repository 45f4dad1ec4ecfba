"""Lays out Megatron-LM rank files for any tensor, pipeline and virtual pipeline size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import UsageError
from megatron_inherit.checkpoint.extents import Extent, Piece
from megatron_inherit.checkpoint.formats.bind import common_dtype, in_order
from megatron_inherit.checkpoint.formats.megatron_args import args_from_config
from megatron_inherit.checkpoint.formats.megatron_folder import iteration_name, write_tracker
from megatron_inherit.checkpoint.formats.megatron_names import DIALECTS, megatron_rows, shift_layer
from megatron_inherit.checkpoint.formats.pickle_machine import Global, Opaque
from megatron_inherit.checkpoint.formats.pt_writer import (
    Archive,
    Blank,
    create_archives,
    lay_out,
    patch_checksums,
)
from megatron_inherit.checkpoint.layout import (
    PhysicalTensor,
    Place,
    padded_vocab_size,
    physical_tensors,
    place_layers,
    stack,
)
from megatron_inherit.checkpoint.stream import Sink, SinkOptions, StoredTensor

_FILE = "model_optim_rng.pt"

Chunk = dict[str, Blank]


def make_sink(config: ModelConfig, dtypes: Mapping[str, str], options: SinkOptions) -> Sink:
    """Lays the rank files of a model out.

    Args:
        config: The model.
        dtypes: Type of each canonical tensor.
        options: Parallel sizes, vocabulary padding, iteration (0: ``release``), and as dialect ``te`` (default),
            ``local`` or a ``legacy`` one.

    Raises:
        CheckpointError: The layers cannot be shared out, or a tensor cannot be cut.
    """
    dialect = options.dialect or "te"
    if dialect not in DIALECTS:
        raise UsageError(f"Unknown Megatron dialect {dialect!r}.", expected=f"one of {', '.join(DIALECTS)}")
    places = place_layers(config.num_layers, options.pp, options.vpp)
    padded = padded_vocab_size(config.vocab_size, options.tp, options.vocab_multiple)
    wanted = list(physical_tensors(megatron_rows(config, dialect), config))
    folder = iteration_name(options.iteration)
    args = args_from_config(config, options, dtype=common_dtype(wanted[0], dtypes), padded_vocab=padded)
    archives: dict[str, Archive] = {}
    homes: dict[tuple[str, int], list[Extent]] = {}
    for stage in range(options.pp):
        entries = _stage_entries(wanted, places, stage, options, DIALECTS[dialect].tied_head)
        for rank in range(options.tp):
            file = f"{folder}/mp_rank_{rank:02d}" + (f"_{stage:03d}" if options.pp > 1 else "") + f"/{_FILE}"
            blanks = [
                {name: Blank(common_dtype(tensor, dtypes), tensor.shard_shape(options.tp, padded_vocab=padded))
                 for name, tensor in chunk.items()}
                for chunk in entries
            ]  # fmt: skip
            archives[file] = lay_out(file, _value(blanks, args, options, dialect))
            stored = (tensor.name for chunk in entries for tensor in chunk.values())
            for name, extent in zip(stored, archives[file].extents, strict=True):
                homes.setdefault((name, rank), []).append(extent)
    tensors = in_order(config, _tensors(wanted, homes, options.tp))
    return Sink(
        "megatron",
        config,
        tensors,
        {file: archive.length for file, archive in archives.items()},
        prepare=lambda root: _prepare(root, archives),
        finish=lambda root: _finish(root, archives, options.iteration),
    )


def _stage_entries(
    wanted: list[PhysicalTensor], places: tuple[Place, ...], stage: int, options: SinkOptions, tied_head: str
) -> list[dict[str, PhysicalTensor]]:
    """Gives, for each chunk of a stage, its stored tensors by stage-local name."""
    chunks: list[dict[str, PhysicalTensor]] = [{} for _ in range(options.vpp)]
    for tensor in wanted:
        role = tensor.parts[0].role
        if tensor.layer is not None:
            place = places[tensor.layer]
            if place.rank == stage:
                chunks[place.chunk][shift_layer(tensor.name, place.index - tensor.layer)] = tensor
        elif role in ("embed", "pos_embed"):
            if stage == 0:
                chunks[0][tensor.name] = tensor
        elif stage == options.pp - 1:
            chunks[-1][tensor.name] = tensor
    if wanted[0].config.tied and options.pp > 1 and stage == options.pp - 1:
        chunks[-1][tied_head] = wanted[0]
    return chunks


def _value(chunks: list[Chunk], args: dict[str, Any], options: SinkOptions, dialect: str) -> dict[str, Any]:
    """Gives the whole dictionary of a rank's file."""
    models = [_nest(chunk) if dialect.startswith("legacy") else chunk for chunk in chunks]
    names = ["model"] if len(models) == 1 else [f"model{number}" for number in range(len(models))]
    return {
        "args": Opaque(Global("argparse", "Namespace"), (), args),
        "checkpoint_version": 3.0,
        "iteration": options.iteration,
        "num_floating_point_operations_so_far": 0,
        **dict(zip(names, models, strict=True)),
    }


def _nest(chunk: Chunk) -> dict[str, Any]:
    """Nests legacy names as Megatron-LM did: modules in dictionaries, the encoder's tensors flat in one."""
    nested: dict[str, Any] = {}
    for name, blank in chunk.items():
        flat = ".encoder." in name
        parts = name.split(".", 2) if flat else name.split(".")
        inner = nested
        for part in parts[:-1]:
            inner = inner.setdefault(part, {})
        inner[parts[-1]] = blank
    return nested


def _tensors(
    wanted: list[PhysicalTensor], homes: Mapping[tuple[str, int], list[Extent]], tp: int
) -> dict[str, StoredTensor]:
    """Gives the places of every canonical tensor, replicas of ranks and of the tied head included."""
    tensors = {}
    for tensor in wanted:
        copies = [homes[tensor.name, rank] for rank in range(tp)]
        pieces: list[Piece] = []
        for copy in zip(*copies, strict=True):
            pieces += stack(copy, tensor.split_axis)
        mapped = tensor.map(pieces, tp=tp)
        for part in tensor.parts:
            tensors[part.name] = StoredTensor(part.shape, pieces[0].extent.dtype, mapped[part.name])
    return tensors


def _prepare(root: Path, archives: Mapping[str, Archive]) -> None:
    for file, archive in archives.items():
        create_archives(root / file, [archive])


def _finish(root: Path, archives: Mapping[str, Archive], iteration: int) -> None:
    for file, archive in archives.items():
        patch_checksums(root / file, archive.records)
    write_tracker(root, iteration)
