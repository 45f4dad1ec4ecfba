"""Lays out a ``torch_dist`` checkpoint that ``megatron.core.dist_checkpointing.load`` reads strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.atomic import write_bytes, write_json
from megatron_inherit.base.errors import CheckpointError, UsageError
from megatron_inherit.checkpoint.extents import Piece
from megatron_inherit.checkpoint.formats.bind import common_dtype
from megatron_inherit.checkpoint.formats.dcp_metadata import (
    METADATA,
    Blob,
    Chunk,
    ChunkedTensor,
    Metadata,
    write_metadata,
)
from megatron_inherit.checkpoint.formats.megatron_args import args_from_config
from megatron_inherit.checkpoint.formats.megatron_folder import iteration_name, write_tracker
from megatron_inherit.checkpoint.formats.megatron_names import megatron_rows
from megatron_inherit.checkpoint.formats.pickle_machine import Global, Opaque
from megatron_inherit.checkpoint.formats.pt_writer import (
    Archive,
    Blank,
    Record,
    create_archives,
    lay_out,
    patch_checksums,
)
from megatron_inherit.checkpoint.layout import PhysicalTensor, padded_vocab_size, physical_tensors, place_layers
from megatron_inherit.checkpoint.stream import Sink, SinkOptions, StoredTensor

BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_SHARDING = "fully_reshardable"
_STATES = {
    "fp32:": "optimizer.state.param.",
    "exp_avg:": "optimizer.state.exp_avg.",
    "exp_avg_sq:": "optimizer.state.exp_avg_sq.",
}
"""Kind of our names -> what Megatron-Core's distributed optimizer puts before a model key."""
_WITH_STATE = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


class _File:
    """A ``.distcp`` file that grows blob by blob."""

    def __init__(self, folder: str, rank: int) -> None:
        self.name = f"__{rank}_0.distcp"
        self._path = f"{folder}/{self.name}"
        self.size = 0
        self.archives: list[Archive] = []

    def add(self, value: Any) -> tuple[Blob, Archive]:
        """Places one more value."""
        archive = lay_out(self._path, value, start=self.size)
        blob = Blob(self.name, self.size, archive.length)
        self.size += archive.length
        self.archives.append(archive)
        return blob, archive


def make_sink(config: ModelConfig, dtypes: Mapping[str, str], options: SinkOptions) -> Sink:
    """Lays the files out: one a tensor rank and stage, one chunk a layer and tensor rank.

    Any number of ranks can load the result; ``tp`` and ``pp`` only choose how finely it is cut.

    Args:
        config: The model.
        dtypes: Type of each canonical tensor.
        options: Parallel sizes, vocabulary padding, iteration, and as dialect ``homogeneous`` (default) or ``global``
            (the layer's number in the key).

    Raises:
        CheckpointError: A tensor cannot be cut.
    """
    dialect = options.dialect or "homogeneous"
    if dialect not in ("homogeneous", "global"):
        raise UsageError(f"Unknown torch_dist dialect {dialect!r}.", expected="homogeneous or global")
    if options.optimizer and not options.adam:
        raise CheckpointError(
            "The checkpoint does not tell Adam's betas, which Megatron reads beside the optimizer state.",
            fix="Write --format ds_universal, which needs none, or leave --optimizer keep out.",
        )
    stacked = dialect == "homogeneous"
    padded = padded_vocab_size(config.vocab_size, options.tp, options.vocab_multiple)
    folder = iteration_name(options.iteration)
    files = [_File(folder, rank) for rank in range(options.tp * options.pp)]
    tensors, chunked = _place(config, dtypes, options, files, stacked=stacked, padded=padded)
    state, _ = files[0].add([None])
    metadata = Metadata(chunked, dict.fromkeys(_state_keys(config.num_layers, stacked), state))
    args = args_from_config(config, options, dtype=tensors["embed.weight"].dtype, padded_vocab=padded)
    common = lay_out(f"{folder}/common.pt", _common(args, options, stacked))
    sizes = {f"{folder}/{file.name}": file.size for file in files} | {f"{folder}/common.pt": common.length}

    def prepare(root: Path) -> None:
        for file in files:
            create_archives(root / folder / file.name, file.archives)
        create_archives(root / folder / "common.pt", [common])

    def finish(root: Path) -> None:
        for file in files:
            patch_checksums(root / folder / file.name, _records(file))
        close(root, metadata, options.iteration)

    ordered = {name: tensors[name] for name in dtypes if name in tensors}
    return Sink("torch_dist", config, ordered, sizes, prepare, finish)


def _place(
    config: ModelConfig,
    dtypes: Mapping[str, str],
    options: SinkOptions,
    files: list[_File],
    *,
    stacked: bool,
    padded: int,
) -> tuple[dict[str, StoredTensor], dict[str, ChunkedTensor]]:
    """Gives every chunk its place in the files: the canonical tensors, and the metadata's tensors by key."""
    places = place_layers(config.num_layers, options.pp, options.vpp)
    chunks: dict[str, list[Chunk]] = {}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    tensors: dict[str, StoredTensor] = {}
    for tensor in physical_tensors(megatron_rows(config, "te", gate_up="concat"), config):
        stage = _stage(tensor, places, options)
        lead = (tensor.layer,) if stacked and tensor.layer is not None else ()
        shape = tensor.shape(padded_vocab=padded)
        for kind in ("", *_STATES) if options.optimizer else ("",):
            key = _STATES.get(kind, "") + _key(tensor, stacked)
            dtype = "F32" if kind else common_dtype(tensor, dtypes)
            shapes[key] = dtype, (config.num_layers, *shape) if lead else shape
            pieces = []
            for rank, start, size in _boxes(tensor, shape, options.tp):
                blob, archive = files[stage * options.tp + rank].add(Blank(dtype, (1, *size) if lead else size))
                extent = archive.extents[0]
                chunks.setdefault(key, []).append(Chunk((*lead, *start), extent.shape, blob))
                pieces.append(Piece(start, extent.index(0) if lead else extent))
            found = tensor.map(pieces)
            tensors |= {kind + part.name: StoredTensor(part.shape, dtype, found[part.name]) for part in tensor.parts}
    return tensors, {key: ChunkedTensor(*shapes[key], tuple(found)) for key, found in chunks.items()}


def close(root: Path, metadata: Metadata, iteration: int) -> None:
    """Writes what makes a checkpoint complete: the metadata, then the backend's file, then the tracker."""
    folder = iteration_name(iteration)
    write_bytes(root / folder / METADATA, write_metadata(metadata))
    write_json(root / folder / "metadata.json", BACKEND)
    write_tracker(root, iteration)


def _records(file: _File) -> list[Record]:
    return [record for archive in file.archives for record in archive.records]


def _common(args: dict[str, Any], options: SinkOptions, stacked: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"singleton_local_shards": False, "non_homogeneous_layers": not stacked}
    common: dict[str, Any] = {
        "args": Opaque(Global("argparse", "Namespace"), (), args),
        "checkpoint_version": 3.0,
        "iteration": options.iteration,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": content,
    }
    if options.optimizer:
        content |= {"distrib_optim_sharding_type": _SHARDING, "chained_optim_avoid_prefix": True}
        groups = [_group(options, decay) for decay in (1.0, 0.0)]
        common["optimizer"] = {"optimizer": {"param_groups": groups}, "param_state_sharding_type": _SHARDING}
    return common


def _group(options: SinkOptions, decay: float) -> dict[str, Any]:
    """Gives a parameter group of Megatron's Adam; its scheduler sets the learning rate and the weight decay anew."""
    beta1, beta2, eps = options.adam
    marks = {"wd_mult": decay, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    marks["default_config"] = True
    settings = {"lr": 0.0, "betas": (beta1, beta2), "eps": eps, "weight_decay": 0.0, "bias_correction": True}
    return {**settings, **marks, "step": options.iteration}


def _state_keys(num_layers: int, stacked: bool) -> list[str]:
    """Names the empty extra states that Megatron-Core's linear layers ask for."""
    if stacked:
        return [
            f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}"
            for layer in range(num_layers)
            for module in _WITH_STATE
        ]
    return [
        f"decoder.layers.{layer}.{module}._extra_state/shard_0_1"
        for layer in range(num_layers)
        for module in _WITH_STATE
    ]


def _key(tensor: PhysicalTensor, stacked: bool) -> str:
    return tensor.row.physical.replace("{i}.", "") if stacked else tensor.name


def _stage(tensor: PhysicalTensor, places: tuple[Any, ...], options: SinkOptions) -> int:
    if tensor.layer is not None:
        return int(places[tensor.layer].rank)
    return 0 if tensor.parts[0].role in ("embed", "pos_embed") else options.pp - 1


def _boxes(
    tensor: PhysicalTensor, shape: tuple[int, ...], tp: int
) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Cuts a global tensor into the boxes of tensor-parallel ranks: (rank, start, shape), each element once."""
    axis = tensor.split_axis
    tensor.shard_shape(tp, padded_vocab=shape[0] if tensor.is_vocab else None)
    if axis is None:
        return [(0, (0,) * len(shape), shape)]
    boxes = []
    sections = [part.shape[0] for part in tensor.parts] if tensor.row.fuse == "concat" else [shape[axis]]
    before = 0
    for section in sections:
        size = section // tp
        for rank in range(tp):
            start = tuple(before + rank * size if number == axis else 0 for number in range(len(shape)))
            boxes.append((rank, start, (*shape[:axis], size, *shape[axis + 1 :])))
        before += section
    return boxes
