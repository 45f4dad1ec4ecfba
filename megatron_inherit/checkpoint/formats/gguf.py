"""GGUF files, read only: llama.cpp's quantised tensors are dequantised exactly as its own reference does.

What quantisation lost stays lost. llama.cpp stores the query and key rows of LLaMA models with the rotated halves
interleaved; the layout table undoes it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_inherit.arch.model_config import ModelConfig, Rope
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.base.optional import require
from megatron_inherit.checkpoint.extents import Extent, whole
from megatron_inherit.checkpoint.files import FilePool, is_remote
from megatron_inherit.checkpoint.formats.gguf_file import GgufHeader, GgufTensor, read_gguf
from megatron_inherit.checkpoint.formats.gguf_tokenizer import generation_config, token_ids, tokenizer_files
from megatron_inherit.checkpoint.formats.hf import side_files
from megatron_inherit.checkpoint.formats.hf_config import write_config
from megatron_inherit.checkpoint.layout import (
    Fuse,
    LayoutRow,
    PhysicalTensor,
    check_names,
    check_shape,
    physical_tensors,
)
from megatron_inherit.checkpoint.provenance import provenance_file
from megatron_inherit.checkpoint.stream import Decode, SideFile, Source, StoredTensor

_PLAIN = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
_B = "blk.{i}."


def _pair(physical: str, canonical: str, fuse: Fuse = "one") -> tuple[LayoutRow, ...]:
    return tuple(LayoutRow(f"{physical}.{end}", (f"{canonical}.{end}",), fuse) for end in ("weight", "bias"))


def _rows(rope: Fuse) -> tuple[LayoutRow, ...]:
    return (
        LayoutRow("token_embd.weight", ("embed.weight",)),
        LayoutRow("position_embd.weight", ("pos_embed.weight",)),
        *_pair(f"{_B}attn_norm", "layers.{i}.attn_norm"),
        *_pair(f"{_B}attn_q", "layers.{i}.attn.q", rope),
        *_pair(f"{_B}attn_k", "layers.{i}.attn.k", rope),
        *_pair(f"{_B}attn_v", "layers.{i}.attn.v"),
        LayoutRow(f"{_B}attn_q_norm.weight", ("layers.{i}.attn.q_norm.weight",)),
        LayoutRow(f"{_B}attn_k_norm.weight", ("layers.{i}.attn.k_norm.weight",)),
        *_pair(f"{_B}attn_output", "layers.{i}.attn.o"),
        *_pair(f"{_B}ffn_norm", "layers.{i}.mlp_norm"),
        *_pair(f"{_B}ffn_gate", "layers.{i}.mlp.gate"),
        *_pair(f"{_B}ffn_up", "layers.{i}.mlp.up"),
        *_pair(f"{_B}ffn_down", "layers.{i}.mlp.down"),
        *_pair("output_norm", "final_norm"),
        LayoutRow("output.weight", ("head.weight",)),
    )


ROWS = {"llama": _rows("rope_interleaved"), "qwen2": _rows("one"), "qwen3": _rows("one")}
"""The table of each architecture; llama.cpp calls Mistral models ``llama`` too."""


def detect(path: str) -> bool:
    """Tells whether a path is a GGUF file."""
    return path.endswith(".gguf") and Path(path).is_file()


def open_source(path: str) -> Source:
    """Reads the metadata and the tensor table of a file.

    Raises:
        CheckpointError: The file is damaged, or of an architecture or type that is not known.
    """
    pool = FilePool()
    header = read_gguf(pool, path)
    config = _config(header, path)
    kinds = Counter(tensor.kind for tensor in header.tensors.values())
    wanted = list(physical_tensors(ROWS[config.family], config))
    check_names(header.tensors, (tensor.name for tensor in wanted), where=path, config=config)
    size = pool.size(path)
    tensors = {}
    for tensor in wanted:
        stored = header.tensors[tensor.name]
        check_shape(tensor.name, stored.shape, tensor.shape(), where=path)
        tensors[tensor.parts[0].name] = _tensor(tensor, stored, path, size)
    names = {kind: _type_name(kind) for kind in kinds}
    licence = str(header.metadata.get("general.license", ""))
    tokenizer, why = tokenizer_files(header.metadata, config.max_positions)
    hf_config = write_config(config, next(iter(tensors.values())).dtype) | token_ids(header.metadata)
    return Source(
        format="gguf",
        path=path,
        config=config,
        tensors=tensors,
        side_files=(
            *tokenizer,
            generation_config(header.metadata),
            provenance_file(_note(path, kinds), licence),
            *_licence_files(pool, path),
        ),
        hf_config=hf_config,
        details={
            "types": {names[kind]: count for kind, count in kinds.most_common()},
            **({"tokenizer": why} if why else {}),
        },
        identity={path.rpartition("/")[2]: xxhash.xxh3_128_hexdigest(pool.read(path, 0, header.length))},
        licence=licence,
        pool=pool,
    )


def _tensor(tensor: PhysicalTensor, stored: GgufTensor, path: str, size: int) -> StoredTensor:
    """Describes one tensor: as it lies there, or as rows of quantised blocks with the function that undoes them."""
    part = tensor.parts[0]
    if stored.kind in _PLAIN:
        extent = Extent.dense(path, stored.offset, _PLAIN[stored.kind], stored.shape)
        decode = None
    else:
        extent = Extent.dense(path, stored.offset, "U8", _byte_shape(stored, path))
        decode = Decode("dequantise", {"type": _type_name(stored.kind)}, extent.shape, "U8", _dequantiser(stored.kind))
    if extent.end > size:
        raise CheckpointError(
            f"{path} is truncated: tensor {stored.name} does not fit.", got=f"{size} bytes", expected=extent.end
        )
    pieces = tensor.map(whole(extent))[part.name]
    return StoredTensor(part.shape, extent.dtype if decode is None else "F32", pieces, decode)


def _byte_shape(stored: GgufTensor, path: str) -> tuple[int, ...]:
    sizes = require("gguf", "GGUF files").GGML_QUANT_SIZES
    kinds = {int(kind): size for kind, size in sizes.items()}
    if stored.kind not in kinds:
        raise CheckpointError(f"{path}: tensor {stored.name} has an unknown type.", got=stored.kind)
    block, count = kinds[stored.kind]
    if stored.shape[-1] % block:
        raise CheckpointError(f"{path}: rows of tensor {stored.name} are no whole blocks.", got=stored.shape)
    return (*stored.shape[:-1], stored.shape[-1] // block * count)


def _dequantiser(kind: int) -> Any:
    def apply(rows: np.ndarray) -> np.ndarray:
        gguf = require("gguf", "GGUF files")
        return gguf.dequantize(rows, gguf.GGMLQuantizationType(kind)).astype(np.float32, copy=False)

    return apply


def _type_name(kind: int) -> str:
    if kind in _PLAIN:
        return _PLAIN[kind]
    return require("gguf", "GGUF files").GGMLQuantizationType(kind).name


def _config(header: GgufHeader, path: str) -> ModelConfig:
    metadata = header.metadata
    arch = metadata.get("general.architecture")
    if arch not in ROWS:
        raise CheckpointError(f"{path}: unknown architecture.", got=arch, expected=f"one of {', '.join(ROWS)}")
    if "rope_freqs.weight" in header.tensors or f"{arch}.rope.scaling.type" in metadata:
        raise CheckpointError(
            f"{path}: scaled rotary positions cannot be read from a GGUF file.",
            fix="Use the model's safetensors folder, whose config.json has the scaling.",
        )
    if f"{arch}.expert_count" in metadata:
        raise CheckpointError(f"{path}: mixture-of-experts models are not supported.")
    try:
        return _fields(metadata, arch, header)
    except KeyError as error:
        raise CheckpointError(f"{path}: the metadata lacks {error}.") from error


def _fields(metadata: Mapping[str, Any], arch: str, header: GgufHeader) -> ModelConfig:
    heads, hidden = metadata[f"{arch}.attention.head_count"], metadata[f"{arch}.embedding_length"]
    dim = metadata.get(f"{arch}.attention.key_length", hidden // heads)
    rotated = metadata.get(f"{arch}.rope.dimension_count", dim)
    epsilon = np.float32(metadata[f"{arch}.attention.layer_norm_rms_epsilon"])
    return ModelConfig(
        family=arch,
        num_layers=metadata[f"{arch}.block_count"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=metadata.get(f"{arch}.attention.head_count_kv", heads),
        head_dim=dim,
        ffn_size=metadata[f"{arch}.feed_forward_length"],
        vocab_size=header.tensors["token_embd.weight"].shape[0],
        max_positions=metadata[f"{arch}.context_length"],
        norm_eps=float(str(epsilon)),
        tied="output.weight" not in header.tensors,
        rope=Rope(theta=float(metadata.get(f"{arch}.rope.freq_base", 10000.0)), fraction=rotated / dim),
        qkv_bias="blk.0.attn_q.bias" in header.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in header.tensors,
    )


def _note(path: str, kinds: Mapping[int, int]) -> str:
    """Says what the weights are: the file's name without its type, and the commonest quantised type."""
    quantised = {kind: count for kind, count in kinds.items() if kind not in _PLAIN}
    if not quantised:
        return ""
    name = _type_name(max(quantised, key=lambda kind: quantised[kind]))
    stem = re.sub(rf"[.\-_]{name}$", "", Path(path).stem, flags=re.IGNORECASE)
    return f"{stem}, dequantised from {name}"


def _licence_files(pool: FilePool, path: str) -> tuple[SideFile, ...]:
    if is_remote(path):
        return ()
    beside = side_files(pool, str(Path(path).parent))
    return tuple(side for side in beside if re.match(r"LICEN|COPYING|NOTICE", side.name))
