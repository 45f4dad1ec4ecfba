"""A model with shared stages in a folder of its own: every physical layer once, and which layer of the depth uses it.

::

    config.json             of the model at its full depth, with the shared layers' ids under "sws"
    learngene.safetensors   embed.weight, sws.stages.{s}.attn.q.weight, ..., final_norm.weight, head.weight
    tokenizer and licence files

Read as a source it is the whole model, whose layers of a stage lie at the same place. With ``sws_packing`` in
``config.json`` the stages' matrices are packed, see ``checkpoint.packing``; readers get their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import xxhash

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.base.atomic import write_json
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.files import FilePool, create_file, is_remote, join
from megatron_inherit.checkpoint.formats.hf import read_licence, side_files
from megatron_inherit.checkpoint.formats.hf_config import read_config, write_config
from megatron_inherit.checkpoint.formats.native import read_json
from megatron_inherit.checkpoint.formats.safetensors_file import build_header, read_header
from megatron_inherit.checkpoint.packing import BESIDE, Packing, is_packed, packed_tensor, packing_of, stored_forms
from megatron_inherit.checkpoint.packing import KEY as PACKING
from megatron_inherit.checkpoint.stages import KEY, Ids, read_ids, share_names, stored_name
from megatron_inherit.checkpoint.stream import Sink, SinkOptions, Source, StoredTensor, dense_tensor, write_side_files

FILE = "learngene.safetensors"


def detect(path: str) -> bool:
    """Tells whether a folder is a learngene."""
    return not is_remote(path) and (Path(path) / FILE).is_file()


def open_source(path: str) -> Source:
    """Reads the configuration and the header.

    Raises:
        CheckpointError: A file is missing or damaged, or a tensor is missing or of the wrong shape.
    """
    pool = FilePool()
    where = join(path, "config.json")
    raw = read_json(Path(where))
    config = read_config(raw, where=where)
    extents, header = read_header(pool, join(path, FILE))
    ids, packing = read_ids(raw, config, where), packing_of(raw, where)
    stored = {name: dense_tensor(e.file, e.offset, e.dtype, e.shape) for name, e in extents.items()}
    if packing is not None:
        shapes = {stored_name(spec.name, ids): spec.shape for spec in enumerate_tensors(config) if is_packed(spec)}
        stored |= {name: packed_tensor(name, shape, extents, packing, pool) for name, shape in shapes.items()}
    return Source(
        format="learngene",
        path=path,
        config=config,
        tensors=share_names(stored, config, ids, path),
        side_files=side_files(pool, path),
        hf_config={name: value for name, value in raw.items() if name != PACKING},
        details={KEY: {name: list(values) for name, values in ids.items()}}
        | ({} if packing is None else {PACKING: packing._asdict()}),
        identity={FILE: header, "config.json": xxhash.xxh3_128_hexdigest(Path(where).read_bytes())},
        licence=read_licence(pool, path),
        pool=pool,
    )


def make_sink(config: ModelConfig, dtypes: Mapping[str, str], options: SinkOptions) -> Sink:
    """Lays one file out; layers that share weights are written to the same place.

    Args:
        config: The model at its full depth.
        dtypes: Type of each canonical tensor.
        options: ``hf_config`` must hold the ids under ``sws``, and may ask for packing; ``side_files`` are copied.

    Raises:
        CheckpointError: The ids are missing, or packed matrices were to have several types.
    """
    given = dict(options.hf_config or {})
    where = "the output's config.json"
    ids, packing = read_ids(given, config, where), packing_of(given, where)
    entries: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for spec in enumerate_tensors(config):
        name, dtype = stored_name(spec.name, ids), dtypes[spec.name]
        if packing is None or not is_packed(spec):
            entries.setdefault(name, (name, dtype, spec.shape))
            continue
        if dtype != packing.dtype:
            raise CheckpointError(f"{spec.name} cannot be packed as {packing.dtype}.", got=dtype, fix="Give --dtype.")
        for form in stored_forms(name, spec.shape, packing):
            entries.setdefault(form.name, form)
    head, places, size = build_header(list(entries.values()))
    stored = {name: dense_tensor(FILE, places[name][0], dtype, shape) for name, dtype, shape in entries.values()}
    raw = write_config(config, next(iter(dtypes.values()))) | given

    def prepare(folder: Path) -> None:
        create_file(folder / FILE, size, head)

    def finish(folder: Path) -> None:
        write_side_files(folder, options.side_files)
        write_json(folder / "config.json", raw)

    tensors = _targets(config, stored, ids, packing)
    return Sink("learngene", config, tensors, {FILE: size}, prepare, finish)


def _targets(
    config: ModelConfig, stored: Mapping[str, StoredTensor], ids: Ids, packing: Packing | None
) -> dict[str, StoredTensor]:
    """Gives the place of each canonical tensor, and of what packed ones have beside them as ``beside:NAME``."""
    found = {}
    for spec in enumerate_tensors(config):
        name = stored_name(spec.name, ids)
        found[spec.name] = stored[name]
        if packing is not None and is_packed(spec):
            found[f"{BESIDE}{spec.name}"] = stored[stored_forms(name, spec.shape, packing)[1].name]
    return found
