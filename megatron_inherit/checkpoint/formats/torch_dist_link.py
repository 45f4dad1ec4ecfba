"""A torch_dist checkpoint whose files are hard links to another's: only the metadata is new.

Every chunk lies where it lay; the new ``.metadata`` gives it another layer's place, or two. So a student costs a few
kilobytes, for any map of layers. The files are shared: Megatron never changes a checkpoint in place.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.extents import Extent
from megatron_inherit.checkpoint.formats.dcp_metadata import METADATA, Chunk, ChunkedTensor, Metadata
from megatron_inherit.checkpoint.formats.megatron_args import OWN
from megatron_inherit.checkpoint.formats.megatron_folder import iteration_name
from megatron_inherit.checkpoint.formats.megatron_names import megatron_rows
from megatron_inherit.checkpoint.formats.pickle_machine import Opaque
from megatron_inherit.checkpoint.formats.pickle_reader import fields, mapped
from megatron_inherit.checkpoint.formats.pt_writer import Blank, create_archives, lay_out
from megatron_inherit.checkpoint.formats.torch_dist import Opened, find_prefix, opened, stacked_name
from megatron_inherit.checkpoint.formats.torch_dist_sink import close
from megatron_inherit.checkpoint.layout import PhysicalTensor, physical_tensors
from megatron_inherit.checkpoint.stream import Source

_KEPT = ("checkpoint_version", "content_metadata", "num_floating_point_operations_so_far")
_OF_OPTIMIZER = ("optimizer", "opt_param_scheduler")
_STATE = re.compile(r"(decoder\.layers\.)(\d+\.)?(.*_extra_state)/shard_(\d+)_(\d+)")


@dataclass(frozen=True)
class Linked:
    """What was made.

    Attributes:
        files: Names of the linked files, relative to the output folder.
        copied: Those that had to be copied, as they are on another file system.
        bytes_written: Of metadata, and of copies.
    """

    files: tuple[str, ...]
    copied: tuple[str, ...]
    bytes_written: int


@dataclass(frozen=True)
class Links:
    """A checkpoint of linked files that does not exist yet.

    Attributes:
        origin: What it links to.
        config: The model that it holds.
        iteration: Number in its names and tracker.
        metadata: Its own.
    """

    origin: Opened
    config: ModelConfig
    iteration: int
    metadata: Metadata

    @property
    def names(self) -> list[str]:
        """Files of the origin that it needs."""
        chunks = {chunk.blob.file for tensor in self.metadata.tensors.values() for chunk in tensor.chunks}
        return sorted(chunks | {blob.file for blob in self.metadata.objects.values()})

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each linked file by its name in the output."""
        folder = iteration_name(self.iteration)
        return {f"{folder}/{name}": (self.origin.folder / name).stat().st_size for name in self.names}


def plan_links(source: Source, config: ModelConfig, sources: Mapping[str, str], *, iteration: int = 0) -> Links:
    """Gives the chunks of a checkpoint their places in another; nothing is written.

    Args:
        source: The opened torch_dist checkpoint to link to.
        config: The model that the output holds.
        sources: Canonical tensor of the checkpoint for each canonical tensor of the output; ``KIND:NAME`` keys take
            the optimizer state of that kind along.
        iteration: Number in the output's names and tracker.

    Raises:
        CheckpointError: A fused tensor would need parts of several layers, a chunk holds more than one, or the source
            is no torch_dist checkpoint.
    """
    origin = opened(source)
    metadata = _relabel(_Names(origin.metadata, origin.folder), config, sources)
    return Links(origin, config, iteration, metadata)


def link_checkpoint(links: Links, output: Path) -> Linked:
    """Makes a checkpoint of linked files in an existing empty folder."""
    name, files = iteration_name(links.iteration), links.names
    (output / name).mkdir()
    copied = _link(links.origin.folder, output / name, files)
    common = _student_common(links)
    create_archives(output / name / "common.pt", [lay_out("common.pt", common)])
    close(output, links.metadata, links.iteration)
    written = sum(entry.stat().st_size for entry in output.rglob("*") if entry.is_file() and entry.name not in files)
    written += sum((output / name / file).stat().st_size for file in copied)
    return Linked(tuple(f"{name}/{file}" for file in files), tuple(copied), written)


class _Names:
    """Knows the keys of a checkpoint's tensors and whether layers are stacked in them."""

    def __init__(self, metadata: Metadata, folder: Path) -> None:
        self.metadata, self.folder = metadata, folder
        self.prefix = find_prefix(metadata, folder)
        self.stacked = any(key.startswith(f"{self.prefix}decoder.layers.self_attention.") for key in metadata.tensors)

    def key(self, tensor: PhysicalTensor, layer: int | None) -> str:
        """Gives the key of a stored tensor at a layer."""
        if self.stacked:
            return stacked_name(tensor)
        return tensor.row.physical.replace("{i}", str(layer))

    def chunks(self, key: str, layer: int | None) -> tuple[ChunkedTensor, list[Chunk]]:
        """Gives a stored tensor and its chunks of one layer."""
        tensor = self.metadata.tensors[key]
        if not self.stacked or layer is None:
            return tensor, list(tensor.chunks)
        chosen = [chunk for chunk in tensor.chunks if chunk.start[0] <= layer < chunk.start[0] + chunk.shape[0]]
        if any(chunk.shape[0] != 1 for chunk in chosen):
            raise CheckpointError(
                f"{self.folder / METADATA}: a chunk of {key} holds several layers, so it cannot be linked.",
                fix="Leave --zero-copy out.",
            )
        return tensor, chosen


def _relabel(old: _Names, config: ModelConfig, sources: Mapping[str, str]) -> Metadata:
    """Gives the chunks their new layers."""
    found: dict[str, list[Chunk]] = {}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    kinds = sorted({target.partition(":")[0] for target in sources if ":" in target})
    layer_of: dict[int, int] = {}
    for tensor in physical_tensors(megatron_rows(config, "te", gate_up="concat"), config):
        layer = _source_layer(tensor, sources)
        if tensor.layer is not None and layer is not None:
            layer_of.setdefault(tensor.layer, layer)
        for kind in ("", *kinds):
            lead = old.prefix if not kind else _optimizer_prefix(old, kind, tensor, layer)
            key, target = lead + old.key(tensor, layer), lead + old.key(tensor, tensor.layer)
            stored, chunks = old.chunks(key, layer)
            stacked = old.stacked and layer is not None
            shapes[target] = stored.dtype, (config.num_layers, *stored.shape[1:]) if stacked else stored.shape
            for chunk in chunks:
                start = (tensor.layer or 0, *chunk.start[1:]) if stacked else chunk.start
                found.setdefault(target, []).append(Chunk(start, chunk.shape, chunk.blob))
    tensors = {key: ChunkedTensor(*shapes[key], tuple(chunks)) for key, chunks in found.items()}
    return Metadata(tensors, _states(old, layer_of, config.num_layers))


def _source_layer(tensor: PhysicalTensor, sources: Mapping[str, str]) -> int | None:
    """Gives the layer that all parts of a stored tensor come from."""
    expected = []
    for part in tensor.parts:
        match = re.fullmatch(r"layers\.(\d+)\.(.*)", sources[part.name])
        same = match[2] == part.name.split(".", 2)[2] if match and tensor.layer is not None else False
        if not same and sources[part.name] != part.name:
            raise CheckpointError(f"{part.name} out of {sources[part.name]} is no whole stored tensor to link to.")
        expected.append(int(match[1]) if match else None)
    if len(set(expected)) > 1:
        raise CheckpointError(
            f"{tensor.name} would need parts of layers {sorted(map(str, expected))}, which no link can give.",
            fix="Leave --zero-copy out.",
        )
    return expected[0]


def _optimizer_prefix(old: _Names, kind: str, tensor: PhysicalTensor, layer: int | None) -> str:
    for spelling in ("fp32_param", "param") if kind == "fp32" else (kind,):
        prefix = f"optimizer.state.{spelling}."
        if prefix + old.key(tensor, layer) in old.metadata.tensors:
            return prefix
    raise CheckpointError(f"{old.folder} has no {kind} of {tensor.name} that can be linked.")


def _states(old: _Names, layer_of: Mapping[int, int], depth: int) -> dict[str, Any]:
    """Gives the extra states of the new layers."""
    by_layer: dict[int, list[tuple[str, Any]]] = {}
    for key, blob in old.metadata.objects.items():
        match = _STATE.fullmatch(key.removeprefix(old.prefix))
        if match:
            layer = int(match[4]) if match[2] is None else int(match[2][:-1])
            by_layer.setdefault(layer, []).append((match[3], blob))
    states = {}
    for new, layer in layer_of.items():
        for module, blob in by_layer.get(layer, ()):
            name = f"{module}/shard_{new}_{depth}" if old.stacked else f"{new}.{module}/shard_0_1"
            states[f"{old.prefix}decoder.layers.{name}"] = blob
    return states


def _link(source: Path, target: Path, files: Iterable[str]) -> list[str]:
    copied = []
    for file in files:
        try:
            os.link(source / file, target / file)
        except OSError:
            shutil.copyfile(source / file, target / file)
            copied.append(file)
    return copied


def _student_common(links: Links) -> dict[str, Any]:
    """Rewrites what is not tensors: the depth in the args, and of the teacher's run the optimizer's settings alone."""
    common, config, iteration = links.origin.common, links.config, links.iteration
    args = {**fields(common["args"])}
    args.update(num_layers=config.num_layers, iteration=iteration, consumed_train_samples=0, consumed_valid_samples=0)
    if "encoder_num_layers" in args:
        args["encoder_num_layers"] = config.num_layers
    args[OWN] = config.to_json()
    names = _KEPT + (_OF_OPTIMIZER if any(key.startswith("optimizer.") for key in links.metadata.tensors) else ())
    kept = {name: _writable(common[name]) for name in names if name in common}
    return {"args": Opaque(common["args"].kind, (), args), "iteration": iteration, **kept}


def _writable(value: Any) -> Any:
    """Puts the elements of tensors, such as a step count, in their places."""
    if isinstance(value, Extent):
        with mapped(Path(value.file)) as data:
            return Blank(value.dtype, value.shape, bytes(data[value.offset : value.end]))
    if isinstance(value, dict):
        return {key: _writable(item) for key, item in value.items()}
    return type(value)(map(_writable, value)) if isinstance(value, list | tuple) else value
