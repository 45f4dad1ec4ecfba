"""``pytorch_model*.bin``: the tensors of a Hugging Face folder from before safetensors."""

from __future__ import annotations

from pathlib import Path

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.extents import Extent
from megatron_inherit.checkpoint.files import FilePool, is_remote
from megatron_inherit.checkpoint.formats.pickle_reader import read_torch


def read_bin(_pool: FilePool, file: str) -> dict[str, Extent]:
    """Reads where the tensors of a flat state dictionary lie.

    Args:
        _pool: Unused: the file is mapped, as its directory lies at its end.
        file: Path of the file.

    Raises:
        CheckpointError: The file is remote, damaged, or holds something else than named tensors.
    """
    if is_remote(file):
        raise CheckpointError(f"{file} is not safetensors.", fix="Download the folder and give its path.")
    value = read_torch(Path(file))
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{file} does not hold a dictionary of tensors.")
    for name, tensor in value.items():
        if not isinstance(tensor, Extent):
            raise CheckpointError(f"{file}: {name} is not a tensor.", got=type(tensor).__name__)
    return value
