"""Meta's own LLaMA checkpoints: ``params.json`` and ``consolidated.NN.pth``, one file a model-parallel rank.

Rotated halves of a head lie alternately, for queries and keys; the embedding is cut along the hidden axis (LLaMA 1 and
2) or the vocabulary (LLaMA 3), which the shapes tell. Format: meta-llama/llama (model.py) and meta-llama/llama-models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_inherit.arch.model_config import ModelConfig, Rope
from megatron_inherit.base.atomic import write_json
from megatron_inherit.base.errors import CheckpointError, UsageError
from megatron_inherit.checkpoint.extents import Extent
from megatron_inherit.checkpoint.formats.bind import bind_tensors, common_dtype, in_order
from megatron_inherit.checkpoint.formats.llama3_rope import llama3_scaling, refuse_lost_scaling
from megatron_inherit.checkpoint.formats.pickle_reader import read_torch
from megatron_inherit.checkpoint.formats.pt_writer import Blank, create_archives, lay_out, patch_checksums
from megatron_inherit.checkpoint.layout import LayoutRow, physical_tensors, stack, with_axis
from megatron_inherit.checkpoint.stream import Sink, SinkOptions, Source, StoredTensor, write_side_files

PARAMS = "params.json"
OWN = "inherit_config.json"
"""Our own description, for what Meta's params do not say (tied head, longest sequence)."""

_FILE = re.compile(r"consolidated\.(\d{2})\.pth")
_EMBEDDING = "tok_embeddings.weight"
_L = "layers.{i}."
ROWS = (
    LayoutRow(_EMBEDDING, ("embed.weight",)),
    LayoutRow(f"{_L}attention_norm.weight", ("layers.{i}.attn_norm.weight",)),
    LayoutRow(f"{_L}attention.wq.weight", ("layers.{i}.attn.q.weight",), "rope_interleaved"),
    LayoutRow(f"{_L}attention.wk.weight", ("layers.{i}.attn.k.weight",), "rope_interleaved"),
    LayoutRow(f"{_L}attention.wv.weight", ("layers.{i}.attn.v.weight",)),
    LayoutRow(f"{_L}attention.wo.weight", ("layers.{i}.attn.o.weight",)),
    LayoutRow(f"{_L}ffn_norm.weight", ("layers.{i}.mlp_norm.weight",)),
    LayoutRow(f"{_L}feed_forward.w1.weight", ("layers.{i}.mlp.gate.weight",)),
    LayoutRow(f"{_L}feed_forward.w3.weight", ("layers.{i}.mlp.up.weight",)),
    LayoutRow(f"{_L}feed_forward.w2.weight", ("layers.{i}.mlp.down.weight",)),
    LayoutRow("norm.weight", ("final_norm.weight",)),
    LayoutRow("output.weight", ("head.weight",)),
)
_SCALING_FACTORS = {(2048, 16): 32.0, (3072, 28): 32.0}
"""(width, depth) of the published LLaMA 3.2 models -> their scaling of rotary positions, which no params.json says."""
_SCALING_FACTOR = 8.0
_EMBEDDING_AXES = {"llama2": 1, "llama3": 0}


def detect(path: str) -> bool:
    """Tells whether a folder holds ``params.json`` and ``consolidated.NN.pth``."""
    folder = Path(path)
    return (folder / PARAMS).is_file() and any(folder.glob("consolidated.*.pth"))


def open_source(path: str) -> Source:
    """Reads the parameters and the structure of every shard.

    Raises:
        CheckpointError: A shard is missing, or a tensor is missing, unknown or of the wrong shape.
    """
    folder = Path(path)
    params = _read_json(folder / PARAMS)
    shards = [_read_shard(file) for file in _shard_files(folder)]
    config = _config(params, shards, folder)
    width = shards[0][_EMBEDDING].shape[-1]
    axis = 0 if width == config.hidden_size else 1
    rows = with_axis(ROWS, {_EMBEDDING: axis})
    ignored = (r"rope\.freqs", r"output\.weight") if config.tied else (r"rope\.freqs",)
    tensors = bind_tensors(config, rows, shards, where=path, ignored=ignored)
    content = repr([sorted((name, extent.offset, extent.shape) for name, extent in shard.items()) for shard in shards])
    identity = {
        PARAMS: xxhash.xxh3_128_hexdigest((folder / PARAMS).read_bytes()),
        "consolidated": xxhash.xxh3_128_hexdigest(content.encode()),
    }
    details = {"tp": len(shards), "embedding": "vocab" if axis == 0 else "hidden"}
    return Source("meta", path, config, tensors, details=details, identity=identity)


def make_sink(config: ModelConfig, dtypes: Mapping[str, str], options: SinkOptions) -> Sink:
    """Lays ``options.tp`` shards out.

    Args:
        config: A LLaMA model without biases.
        dtypes: Type of each canonical tensor.
        options: As dialect ``llama2`` (embedding cut along the hidden axis) or ``llama3`` (along the vocabulary);
            default by the size of the vocabulary.

    Raises:
        CheckpointError: The format has no place for a tensor, or a tensor cannot be cut.
    """
    dialect = options.dialect or ("llama3" if config.vocab_size >= 100_000 else "llama2")
    if dialect not in _EMBEDDING_AXES:
        raise UsageError(f"Unknown Meta dialect {dialect!r}.", expected="llama2 or llama3")
    if (
        config.head_dim * config.num_heads != config.hidden_size
        or config.sliding_window
        or config.rope is None
        or config.rope.fraction != 1
    ):
        raise CheckpointError(f"Meta's format has no place for this {config.family} model.", fix="Use --format hf.")
    rows = with_axis(ROWS, {_EMBEDDING: _EMBEDDING_AXES[dialect]})
    wanted = list(physical_tensors(rows, config))
    blanks = {tensor.name: Blank(common_dtype(tensor, dtypes), tensor.shard_shape(options.tp)) for tensor in wanted}
    if config.tied:  # Meta's code has no tied head
        blanks["output.weight"] = Blank(blanks[_EMBEDDING].dtype, _cut(wanted[0].shape(), options.tp, "the vocabulary"))
    archives = {
        f"consolidated.{rank:02d}.pth": lay_out(f"consolidated.{rank:02d}.pth", blanks) for rank in range(options.tp)
    }
    homes = {name: [archive.extents[number] for archive in archives.values()] for number, name in enumerate(blanks)}
    tensors = {}
    for tensor in wanted:
        found = tensor.map(stack(homes[tensor.name], tensor.split_axis), tp=options.tp)
        for part in tensor.parts:
            pieces = found[part.name]
            if config.tied and part.name == "embed.weight":
                pieces += stack(homes["output.weight"], 0)
            tensors[part.name] = StoredTensor(part.shape, blanks[tensor.name].dtype, pieces)
    params = _params(config)

    def prepare(root: Path) -> None:
        for file, archive in archives.items():
            create_archives(root / file, [archive])

    def finish(root: Path) -> None:
        for file, archive in archives.items():
            patch_checksums(root / file, archive.records)
        write_side_files(root, options.side_files)
        write_json(root / OWN, config.to_json())
        write_json(root / PARAMS, params)

    sizes = {file: archive.length for file, archive in archives.items()}
    return Sink("meta", config, in_order(config, tensors), sizes, prepare, finish)


def ffn_width(hidden: int, multiple_of: int, multiplier: float | None) -> int:
    """Gives the MLP width that Meta's code computes: 2/3 of 4 H, scaled, rounded up to a multiple."""
    width = int(2 * 4 * hidden / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def _params(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope or Rope()
    multiple_of, multiplier = _width_rule(config.hidden_size, config.ffn_size)
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        "norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
    }
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if rope.scaling.get("rope_type") == "llama3":
        params["use_scaled_rope"] = True
        params["rope_scaling_factor"] = rope.scaling["factor"]
        refuse_lost_scaling(rope, "Meta's format")
    elif rope.scaling:
        raise CheckpointError("Meta's format knows no rope scaling but LLaMA 3's.", got=dict(rope.scaling))
    return params


def _width_rule(hidden: int, width: int) -> tuple[int, float | None]:
    """Finds ``multiple_of`` and ``ffn_dim_multiplier`` from which Meta's formula gives a width."""
    if ffn_width(hidden, 256, None) == width:
        return 256, None
    multiple_of = width & -width
    inside = width - multiple_of / 2 if multiple_of > 1 else width + 0.5
    return multiple_of, inside / int(2 * 4 * hidden / 3)


def _config(params: Mapping[str, Any], shards: list[dict[str, Extent]], folder: Path) -> ModelConfig:
    tp, first = len(shards), shards[0]
    try:
        hidden, heads = params["dim"], params["n_heads"]
        embedding, gate = first[_EMBEDDING].shape, first["layers.0.feed_forward.w1.weight"].shape
        rows = embedding[0] if embedding[1] != hidden or tp == 1 else embedding[0] * tp
        theta = float(params.get("rope_theta", 10000.0))
        scaled = bool(params.get("use_scaled_rope"))
        published = _SCALING_FACTORS.get((hidden, params["n_layers"]), _SCALING_FACTOR)
        scaling = llama3_scaling(params.get("rope_scaling_factor") or published) if scaled else {}
        config = ModelConfig(
            family="llama",
            num_layers=params["n_layers"],
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=params.get("n_kv_heads") or heads,
            head_dim=params.get("head_dim") or hidden // heads,
            ffn_size=gate[0] * tp,
            vocab_size=rows,
            max_positions=_positions(params, theta, scaled=scaled),
            norm_eps=float(params.get("norm_eps", 1e-5)),
            tied="output.weight" not in first,
            rope=Rope(theta=theta, scaling=scaling),
        )
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{folder / PARAMS} or its shards lack {error}.") from error
    if params.get("moe") or params.get("n_experts"):
        raise CheckpointError(f"{folder / PARAMS}: mixture-of-experts models are not supported.")
    if params.get("vocab_size", -1) not in (-1, rows):
        raise CheckpointError(
            f"{folder}: {_EMBEDDING} does not have the rows that {PARAMS} says.",
            got=rows,
            expected=params["vocab_size"],
        )
    own = folder / OWN
    if own.is_file():
        written = ModelConfig.from_json(_read_json(own))
        same = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size")
        if all(getattr(written, name) == getattr(config, name) for name in same):
            return written
    return config


def _positions(params: Mapping[str, Any], theta: float, *, scaled: bool) -> int:
    """Gives the longest sequence of the published model with such parameters, which no file says."""
    if params.get("max_seq_len"):
        return int(params["max_seq_len"])
    if theta >= 500_000:
        return 131_072 if scaled else 8192
    return 2048 if params.get("norm_eps") == 1e-6 else 4096


def _shard_files(folder: Path) -> list[Path]:
    found = {int(match[1]): entry for entry in folder.iterdir() if (match := _FILE.fullmatch(entry.name))}
    missing = next((number for number in range(max(found) + 1) if number not in found), None)
    if missing is not None:
        raise CheckpointError(f"{folder / f'consolidated.{missing:02d}.pth'} is missing.")
    return [found[number] for number in sorted(found)]


def _read_shard(file: Path) -> dict[str, Extent]:
    value = read_torch(file)
    if not isinstance(value, dict) or not all(isinstance(item, Extent) for item in value.values()):
        raise CheckpointError(f"{file} does not hold a dictionary of tensors.")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes()[: 1 << 20])
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or not valid JSON.", got=str(error)[:200]) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return value


def _cut(shape: tuple[int, ...], tp: int, what: str) -> tuple[int, ...]:
    if shape[0] % tp:
        raise CheckpointError(f"{what} cannot be cut in {tp} shards.", got=shape[0], fix="Choose another --tp.")
    return (shape[0] // tp, *shape[1:])
