"""Small models as canonical arrays, written to and read from any format without the planner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_inherit.arch.model_config import ModelConfig, Rope
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.checkpoint.detect import format_module
from megatron_inherit.checkpoint.dtypes import CARRIERS, cast
from megatron_inherit.checkpoint.files import FilePool
from megatron_inherit.checkpoint.gather import scatter
from megatron_inherit.checkpoint.stream import Sink, SinkOptions, Source

Arrays = dict[str, np.ndarray]


def llama(**changes) -> ModelConfig:
    """A tiny LLaMA whose query heads are not the square of its groups."""
    base = {
        "family": "llama",
        "num_layers": 4,
        "hidden_size": 32,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 4,
        "ffn_size": 48,
        "vocab_size": 130,
        "max_positions": 64,
        "norm_eps": 1e-5,
        "tied": False,
        "rope": Rope(),
    }
    return ModelConfig(**(base | changes))


def gpt2(**changes) -> ModelConfig:
    """A tiny GPT-2."""
    base = {
        "family": "gpt2",
        "num_layers": 4,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 8,
        "ffn_size": 128,
        "vocab_size": 130,
        "max_positions": 16,
        "norm_eps": 1e-5,
        "tied": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "norm_bias": True,
    }
    return ModelConfig(**(base | changes))


FAMILIES = {
    "llama": llama(),
    "llama-mha-tied": llama(num_kv_heads=8, tied=True),
    "mistral": llama(family="mistral", num_kv_heads=4, sliding_window=32),
    "qwen2": llama(family="qwen2", qkv_bias=True, tied=True),
    "qwen3": llama(family="qwen3", qk_norm=True, head_dim=8),
    "gpt2": gpt2(),
}


def random_arrays(config: ModelConfig, *, dtype: str = "F32", seed: int = 0) -> Arrays:
    """Draws every canonical tensor; values are plausible weights, norms near one."""
    generator = np.random.default_rng(seed)
    arrays = {}
    for spec in enumerate_tensors(config):
        values = generator.normal(0, 0.02, spec.shape).astype(np.float32)
        if spec.init == "ones":
            values = 1 + values
        arrays[spec.name] = cast(values, "F32", dtype)
    return arrays


def numbered_arrays(config: ModelConfig) -> Arrays:
    """Numbers all elements of the model, so that none can stand for another (F32, exact below 2^24)."""
    arrays, at = {}, 0
    for spec in enumerate_tensors(config):
        arrays[spec.name] = np.arange(at, at + spec.numel, dtype=np.float32).reshape(spec.shape)
        at += spec.numel
    assert at < 1 << 24
    return arrays


def fill(sink: Sink, folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to the places a sink gives."""
    folder.mkdir(parents=True, exist_ok=True)
    sink.prepare(folder)
    pool = FilePool()
    for key, stored in sink.rooted(folder).items():
        values = np.ascontiguousarray(arrays[key])
        assert values.dtype == CARRIERS[stored.dtype]
        scatter(pool, stored.pieces, (0,) * values.ndim, values)
    pool.close()
    sink.finish(folder)
    for name, size in sink.sizes.items():
        assert (folder / name).stat().st_size == size, name


def write_checkpoint(
    folder: Path, config: ModelConfig, arrays: Mapping[str, np.ndarray], format: str, *, dtype: str = "F32", **options
) -> Path:
    """Writes a model in a format; options are those of ``SinkOptions``."""
    dtypes = dict.fromkeys(arrays, dtype)
    fill(format_module(format).make_sink(config, dtypes, SinkOptions(**options)), folder, arrays)
    return folder


def read_arrays(source: Source, *, optimizer: bool = False) -> Arrays:
    """Reads every tensor of a source."""
    keys = [*source.tensors, *(source.optimizer if optimizer else ())]
    return {key: source.read(key).array() for key in keys}


def assert_equal(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Compares two models bit for bit, names in order."""
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].shape == values.shape, name
        assert found[name].tobytes() == values.tobytes(), name
