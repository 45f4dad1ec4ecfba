"""Hugging Face folders: ``config.json`` beside safetensors files, sharded or not.

Names and orders are those of transformers' modelling files; canonical names follow the same row order, so that all but
GPT-2's transposed Conv1D matrices are the canonical bytes themselves.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import tensor_table
from megatron_inherit.base.atomic import write_json
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.dtypes import WEIGHT_DTYPES, cast
from megatron_inherit.checkpoint.extents import Extent, whole
from megatron_inherit.checkpoint.files import FilePool, MissingFileError, create_file, is_remote, join
from megatron_inherit.checkpoint.formats.bind import check_tied
from megatron_inherit.checkpoint.formats.hf_config import config_file, read_config
from megatron_inherit.checkpoint.formats.safetensors_file import build_header, read_header
from megatron_inherit.checkpoint.layout import LayoutRow, PhysicalTensor, check_names, check_shape, physical_tensors
from megatron_inherit.checkpoint.stream import (
    Decode,
    SideFile,
    Sink,
    SinkOptions,
    Source,
    StoredTensor,
    dense_tensor,
    write_side_files,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDE_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "provenance.json",
    "spiece.model",
    "LICEN[SC]E*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Patterns of the small files that travel with the weights."""

_JSON_LIMIT = 100_000_000
_IGNORED = (r".*rotary_emb\.inv_freq", r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")


def _pair(physical: str, canonical: str, *, transpose: bool = False) -> tuple[LayoutRow, ...]:
    weight = LayoutRow(f"{physical}.weight", (f"{canonical}.weight",), transpose=transpose)
    return (weight, LayoutRow(f"{physical}.bias", (f"{canonical}.bias",)))


_L = "model.layers.{i}."
_LLAMA_ROWS = (
    LayoutRow("model.embed_tokens.weight", ("embed.weight",)),
    *_pair(f"{_L}input_layernorm", "layers.{i}.attn_norm"),
    *_pair(f"{_L}self_attn.q_proj", "layers.{i}.attn.q"),
    *_pair(f"{_L}self_attn.k_proj", "layers.{i}.attn.k"),
    *_pair(f"{_L}self_attn.v_proj", "layers.{i}.attn.v"),
    LayoutRow(f"{_L}self_attn.q_norm.weight", ("layers.{i}.attn.q_norm.weight",)),
    LayoutRow(f"{_L}self_attn.k_norm.weight", ("layers.{i}.attn.k_norm.weight",)),
    *_pair(f"{_L}self_attn.o_proj", "layers.{i}.attn.o"),
    *_pair(f"{_L}post_attention_layernorm", "layers.{i}.mlp_norm"),
    *_pair(f"{_L}mlp.gate_proj", "layers.{i}.mlp.gate"),
    *_pair(f"{_L}mlp.up_proj", "layers.{i}.mlp.up"),
    *_pair(f"{_L}mlp.down_proj", "layers.{i}.mlp.down"),
    *_pair("model.norm", "final_norm"),
    LayoutRow("lm_head.weight", ("head.weight",)),
)
_G = "transformer.h.{i}."
_QKV = ("layers.{i}.attn.q", "layers.{i}.attn.k", "layers.{i}.attn.v")
_GPT2_ROWS = (
    LayoutRow("transformer.wte.weight", ("embed.weight",)),
    LayoutRow("transformer.wpe.weight", ("pos_embed.weight",)),
    *_pair(f"{_G}ln_1", "layers.{i}.attn_norm"),
    LayoutRow(f"{_G}attn.c_attn.weight", tuple(f"{name}.weight" for name in _QKV), "concat", transpose=True),
    LayoutRow(f"{_G}attn.c_attn.bias", tuple(f"{name}.bias" for name in _QKV), "concat"),
    *_pair(f"{_G}attn.c_proj", "layers.{i}.attn.o", transpose=True),
    *_pair(f"{_G}ln_2", "layers.{i}.mlp_norm"),
    *_pair(f"{_G}mlp.c_fc", "layers.{i}.mlp.up", transpose=True),
    *_pair(f"{_G}mlp.c_proj", "layers.{i}.mlp.down", transpose=True),
    *_pair("transformer.ln_f", "final_norm"),
    LayoutRow("lm_head.weight", ("head.weight",)),
)
ROWS: dict[str, tuple[LayoutRow, ...]] = {
    "llama": _LLAMA_ROWS,
    "mistral": _LLAMA_ROWS,
    "qwen2": _LLAMA_ROWS,
    "qwen3": _LLAMA_ROWS,
    "gpt2": _GPT2_ROWS,
}
"""The table of each family."""

_PREFIX = {"gpt2": "transformer."}


def detect(path: str) -> bool:
    """Tells whether a folder looks like a Hugging Face checkpoint."""
    if is_remote(path):
        return True
    folder = Path(path)
    return (folder / "config.json").is_file() and (
        (folder / INDEX).is_file() or any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin*"))
    )


def open_source(path: str) -> Source:
    """Reads the configuration, the index and the headers of a folder or of a URL.

    Raises:
        CheckpointError: A file is missing or damaged, or a tensor is missing, unknown or of the wrong shape.
    """
    pool = FilePool()
    identity: dict[str, str] = {}
    where = join(path, "config.json")
    raw = _read_json(pool, where, identity)
    config = read_config(raw, where=where)
    extents = _read_headers(pool, path, identity)
    tensors = bind(config, extents, path)
    if config.tied and "lm_head.weight" in extents:
        check_tied(pool, extents["lm_head.weight"], tensors["embed.weight"])
    if config.attn_scale_by_layer:
        tensors = fold_layer_scale(tensors)
        config = dataclasses.replace(config, attn_scale_by_layer=False)
    return Source(
        format="hf",
        path=path,
        config=config,
        tensors=tensors,
        side_files=side_files(pool, path),
        hf_config=raw,
        details={"files": sorted({extent.file.rpartition("/")[2] for extent in extents.values()})},
        identity=identity,
        licence=read_licence(pool, path),
        pool=pool,
    )


def bind(config: ModelConfig, extents: Mapping[str, Extent], where: str) -> dict[str, StoredTensor]:
    """Turns named arrays into canonical tensors.

    Args:
        config: The model.
        extents: Arrays by Hugging Face name; the ``model.`` or ``transformer.`` prefix may be absent.
        where: Path for messages.

    Raises:
        CheckpointError: A tensor is missing, unknown, of the wrong shape, or of a type no weight has.
    """
    prefix = _PREFIX.get(config.family, "model.")
    head = next(row.physical for row in ROWS[config.family] if row.parts == ("head.weight",))
    if extents and not any(name.startswith(prefix) for name in extents):
        extents = {name if name == head else prefix + name: extent for name, extent in extents.items()}
    wanted = list(physical_tensors(ROWS[config.family], config))
    ignored = (*_IGNORED, re.escape(head)) if config.tied else _IGNORED
    if not config.tied and head not in extents and extents:
        raise CheckpointError(
            f"{where}: {head} is missing.",
            fix="If the head is the embedding, set tie_word_embeddings to true in config.json.",
        )
    check_names(extents, (tensor.name for tensor in wanted), where=where, ignored=ignored, config=config)
    tensors: dict[str, StoredTensor] = {}
    for tensor in wanted:
        extent = extents[tensor.name]
        check_shape(tensor.name, extent.shape, tensor.shape(), where=extent.file)
        if extent.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{extent.file}: tensor {tensor.name} is quantised or no weight.",
                got=extent.dtype,
                fix="Use the unquantised checkpoint.",
            )
        mapped = tensor.map(whole(extent))
        for part in tensor.parts:
            tensors[part.name] = StoredTensor(part.shape, extent.dtype, mapped[part.name])
    return {name: tensors[name] for name in tensor_table(config)}


def fold_layer_scale(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Divides the query projection of block i by i + 1, which makes blocks independent of their position.

    GPT-2's ``scale_attn_by_inverse_layer_idx`` divides the attention logits, which are linear in the queries.
    """
    folded = dict(tensors)
    for name, stored in tensors.items():
        found = re.fullmatch(r"layers\.(\d+)\.attn\.q\.(weight|bias)", name)
        if found and int(found[1]):
            folded[name] = dataclasses.replace(stored, decode=_divide(stored, int(found[1]) + 1))
    return folded


def _divide(stored: StoredTensor, divisor: int) -> Decode:
    def apply(values: np.ndarray) -> np.ndarray:
        exact = cast(values, stored.dtype, "F64") / divisor
        return cast(exact.astype(np.float32), "F32", stored.dtype)

    return Decode("scale", {"factor": f"1/{divisor}"}, stored.shape, stored.dtype, apply)


def make_sink(config: ModelConfig, dtypes: Mapping[str, str], options: SinkOptions) -> Sink:
    """Lays a folder out: files of at most ``options.max_shard_bytes``, tensors in the family's order.

    Args:
        config: The model.
        dtypes: Type of each canonical tensor.
        options: ``hf_config`` is written as it is (default: made from ``config``), ``side_files`` are copied.

    Raises:
        CheckpointError: ``config.json`` has no place for something of the model.
    """
    wanted = list(physical_tensors(ROWS[config.family], config))
    shards = _cut_into_files(wanted, dtypes, options.max_shard_bytes)
    files = shard_names(len(shards))
    heads, extents, sizes = {}, {}, {}
    for file, entries in zip(files, shards, strict=True):
        heads[file], places, sizes[file] = build_header(entries)
        extents.update({name: Extent.dense(file, places[name][0], dtype, shape) for name, dtype, shape in entries})
    tensors = {}
    for tensor in wanted:
        extent = extents[tensor.name]
        for name, pieces in tensor.map(whole(extent)).items():
            shape = next(part.shape for part in tensor.parts if part.name == name)
            tensors[name] = StoredTensor(shape, extent.dtype, pieces)
    raw = config_file(config, options.hf_config, next(iter(dtypes.values())))
    index = _index(extents) if len(files) > 1 else None

    def prepare(folder: Path) -> None:
        for file in files:
            create_file(folder / file, sizes[file], heads[file])

    def finish(folder: Path) -> None:
        if index is not None:
            write_json(folder / INDEX, index)
        write_side_files(folder, options.side_files)
        write_json(folder / "config.json", raw)

    return Sink("hf", config, tensors, sizes, prepare, finish)


def _cut_into_files(
    tensors: Iterable[PhysicalTensor], dtypes: Mapping[str, str], most: int
) -> list[list[tuple[str, str, tuple[int, ...]]]]:
    """Fills files in order, each with ``most`` bytes at most or one tensor; an entry has name, dtype and shape."""
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for tensor in tensors:
        dtype = _common_dtype(tensor.name, {dtypes[part.name] for part in tensor.parts})
        size = dense_tensor("", 0, dtype, tensor.shape()).nbytes
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append((tensor.name, dtype, tensor.shape()))
        filled += size
    return shards


def shard_names(count: int) -> list[str]:
    """Names the files of a folder."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def side_files(pool: FilePool, path: str) -> tuple[SideFile, ...]:
    """Lists the tokenizer, licence and generation files of a folder."""
    return tuple(SideFile(name, join(path, name)) for name in pool.names(path, SIDE_FILES))


def read_licence(pool: FilePool, path: str) -> str:
    """Gives the ``license:`` line of the model card's header, or an empty string."""
    try:
        text = pool.read_all(join(path, "README.md"), limit=1 << 24).decode(errors="replace")
    except MissingFileError:
        return ""
    head = text.split("---")[1] if text.startswith("---") and text.count("---") > 1 else ""
    found = re.search(r"^license:\s*(\S+)", head, re.MULTILINE)
    return found[1].strip("'\"") if found else ""


def _read_headers(pool: FilePool, path: str, identity: dict[str, str]) -> dict[str, Extent]:
    """Reads the arrays of all files the index names, or of the single file."""
    files, weight_map = _files(pool, path, identity)
    if any(file.endswith((".bin", ".pth")) for file in files):
        from megatron_inherit.checkpoint.formats.hf_bin import read_bin

        extents = {}
        for file in files:
            found = read_bin(pool, join(path, file))
            content = [(name, one.offset, one.dtype, one.shape, one.strides) for name, one in found.items()]
            identity[file] = xxhash.xxh3_128_hexdigest(repr(content).encode())
            extents.update(found)
        return extents
    extents = {}
    for file in files:
        found, identity[file] = read_header(pool, join(path, file))
        for name, extent in found.items():
            if weight_map.get(name, file) == file:
                extents[name] = extent
    for name, file in weight_map.items():
        if name not in extents:
            raise CheckpointError(
                f"{join(path, file)}: tensor {name} is missing, though {INDEX} says that it is there.",
                fix="Copy or download the checkpoint again.",
            )
    return extents


def _files(pool: FilePool, path: str, identity: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    for single, index in ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json")):  # as transformers
        if pool.exists(join(path, single)):
            return [single], {}
        if pool.exists(join(path, index)):
            return _read_index(pool, path, index, identity)
    found = [] if is_remote(path) else sorted(entry.name for entry in Path(path).glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(
            f"{path} has no weights that can be found.",
            got=f"{len(found)} safetensors files and no index",
            expected=f"{SINGLE} or {INDEX}",
        )
    return found, {}


def _read_index(pool: FilePool, path: str, index: str, identity: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    where = join(path, index)
    weight_map = _read_json(pool, where, identity).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} has no weight_map.")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and not re.search(r"[/\\\0]|^\.", file)
        if not plain or not file.endswith((".safetensors", ".bin")):
            raise CheckpointError(
                f"{where}: the file of tensor {name} is no plain name of a weight file in this folder.", got=repr(file)
            )
    return sorted(set(weight_map.values())), weight_map


def _read_json(pool: FilePool, file: str, identity: dict[str, str]) -> dict[str, Any]:
    data = pool.read_all(file, limit=_JSON_LIMIT)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON.", got=str(error)[:200]) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} does not hold a JSON object.")
    identity[file.rpartition("/")[2]] = xxhash.xxh3_128_hexdigest(data)
    return value


def _common_dtype(name: str, dtypes: set[str]) -> str:
    if len(dtypes) > 1:
        raise CheckpointError(f"The parts of {name} have different dtypes.", got=sorted(dtypes), fix="Pass --dtype.")
    return dtypes.pop()


def _index(extents: Mapping[str, Extent]) -> dict[str, Any]:
    total = sum(extent.nbytes for extent in extents.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: extent.file for name, extent in sorted(extents.items())},
    }
