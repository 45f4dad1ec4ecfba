"""Fills a model with a checkpoint's values or fresh ones, tensor by tensor, each rank reading only its own boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import TensorSpec, enumerate_tensors
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.model.language_model import LanguageModel
from megatron_inherit.model.pieces import Piece, pieces_of
from megatron_inherit.plan.init import draw

if TYPE_CHECKING:
    from megatron_inherit.checkpoint.stream import Source

Reader = Callable[[TensorSpec, "tuple[slice, ...]"], torch.Tensor]
"""Gives a box of a canonical tensor as a CPU tensor of any float dtype."""

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def to_torch(raw: Any) -> torch.Tensor:
    """Views a source's RawTensor as a torch tensor; copies only where its bytes may not be written or lie unaligned.

    Raises:
        CheckpointError: The dtype is none of the float types.
    """
    if raw.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"A model's weight has dtype {raw.dtype}.", expected=f"one of {', '.join(TORCH_DTYPES)}")
    data, dtype = raw.data.reshape(-1), TORCH_DTYPES[raw.dtype]
    if not data.flags.writeable or data.ctypes.data % dtype.itemsize:
        data = data.copy()
    return torch.from_numpy(data).view(dtype).view(tuple(raw.shape))


def source_reader(source: Source, config: ModelConfig) -> Reader:
    """Reads from a checkpoint, after a check that it has every tensor of the model in the right shape.

    Raises:
        CheckpointError: A tensor is missing or of another shape.
    """
    for spec in enumerate_tensors(config):
        info = source.tensors.get(spec.name)
        if info is None:
            raise CheckpointError(f"{source.path} has no tensor {spec.name}, which the model needs.")
        if tuple(info.shape) != spec.shape:
            raise CheckpointError(
                f"Tensor {spec.name} of {source.path} has another shape than the model's.",
                got=tuple(info.shape),
                expected=spec.shape,
            )
    return lambda spec, box: to_torch(source.read(spec.name, box))


def random_reader(config: ModelConfig, seed: int) -> Reader:
    """Draws fresh values, the same for a tensor whatever part of it a rank holds."""

    def read(spec: TensorSpec, box: tuple[slice, ...]) -> torch.Tensor:
        row = spec.numel // spec.shape[0]
        values = draw(spec, num_layers=config.num_layers, seed=seed, start=box[0].start * row, stop=box[0].stop * row)
        whole = torch.from_numpy(values).view(-1, *spec.shape[1:])
        return whole[(slice(None), *box[1:])]

    return read


def read_flat(piece: Piece, low: int, high: int, read: Reader) -> torch.Tensor:
    """Reads elements ``[low, high)`` of a piece's box in row-major order, and only the rows that hold them."""
    row = piece.numel // piece.shape[0]
    first, last = low // row, -(-high // row)
    rows = slice(piece.start[0] + first, piece.start[0] + last)
    return read(piece.spec, (rows, *piece.box[1:])).reshape(-1)[low - first * row : high - first * row]


@torch.no_grad()
def load_chunk(chunk: LanguageModel, read: Reader) -> None:
    """Sets all parameters of a model chunk; padding rows become zero.

    Args:
        chunk: Its parameters must be whole on this rank (not partitioned by ZeRO-3).
        read: Where the values come from.
    """
    parameters = dict(chunk.named_parameters())
    for name, pieces in pieces_of(chunk).items():
        flat = parameters[name].data.view(-1)
        for piece in (piece for piece in pieces if piece.numel):
            values = read(piece.spec, piece.box)
            flat[piece.offset : piece.offset + piece.numel].view(piece.shape).copy_(values)
        end = pieces[-1].offset + pieces[-1].numel
        flat[end:].zero_()
