"""Checkpoints of published shapes with random bytes, as large as asked and quickly made."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.checkpoint.detect import format_module
from megatron_inherit.checkpoint.formats import torch_dist_sink
from megatron_inherit.checkpoint.stream import SinkOptions

_BLOCK = 1 << 24


def make_checkpoint(folder: Path, config: ModelConfig, *, dtype: str = "BF16") -> Path:
    """Writes a Hugging Face folder of random bytes, unless it is there.

    Args:
        folder: Where.
        config: The model.
        dtype: Type of all weights.
    """
    if (folder / "config.json").exists():
        return folder
    dtypes = {spec.name: dtype for spec in enumerate_tensors(config)}
    sink = format_module("hf").make_sink(config, dtypes, SinkOptions())
    folder.mkdir(parents=True, exist_ok=True)
    sink.prepare(folder)
    block = os.urandom(_BLOCK)
    for name, size in sink.sizes.items():
        with (folder / name).open("r+b") as file:
            head = 8 + int.from_bytes(file.read(8), "little")
            file.seek(head)
            for at in range(head, size, _BLOCK):
                shift = at // _BLOCK % 4093
                file.write((block[shift:] + block[:shift])[: size - at])
    sink.finish(folder)
    return folder


def make_sparse(folder: Path, config: ModelConfig, *, tp: int = 1, dtype: str = "BF16") -> Path:
    """Writes a torch_dist checkpoint whose tensors are holes: right for all that reads no tensor.

    Args:
        folder: Where.
        config: The model.
        tp: Tensor-parallel size of the files.
        dtype: Type of all weights.
    """
    if folder.exists():
        return folder
    dtypes = {spec.name: dtype for spec in enumerate_tensors(config)}
    sink = format_module("torch_dist").make_sink(config, dtypes, SinkOptions(tp=tp))
    folder.mkdir(parents=True)
    sink.prepare(folder)
    with patch.object(torch_dist_sink, "patch_checksums"):
        sink.finish(folder)
    return folder
