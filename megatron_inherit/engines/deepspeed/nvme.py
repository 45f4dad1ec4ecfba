"""Optimizer state in files of a local disk (ZeRO-Infinity): what it needs, and where its values lie between steps.

DeepSpeed keeps fp32 masters and moments of a large group of weights in one raw file a tensor, reads them for the step
and writes them back; between steps the tensors are empty. A group of less than a megabyte stays in memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.engines.parts import MOMENTS


def require_nvme(path: str, gather_text: Callable[[str], list[str]]) -> None:
    """Makes sure that every rank can write its files and has DeepSpeed's asynchronous reads and writes.

    Args:
        path: Folder of this run within ``deepspeed.nvme_path``; it is made.
        gather_text: Tells every rank's text to every rank, so that all stop together.

    Raises:
        ConfigError: The folder is missing or cannot be written, or the operation cannot be built.
    """
    problems = [text for text in gather_text(_folder_problem(Path(path)) or _operation_problem()) if text]
    if problems:
        what, _, fix = problems[0].partition("\n")
        raise ConfigError(what, fix=fix)


def _folder_problem(path: Path) -> str:
    where, fix = f"on {socket.gethostname()}", "Name a folder of a local disk that every node has, or leave it out."
    if not path.parent.is_dir():
        return f"deepspeed.nvme_path: {path.parent} is not a folder {where}.\n{fix}"
    try:
        path.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"probe")
    except OSError as error:
        return f"deepspeed.nvme_path: {path.parent} cannot be written {where}: {error.strerror}.\n{fix}"
    return ""


def _operation_problem() -> str:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    fix = (
        "Install libaio's headers (apt-get install libaio-dev), a C++ compiler and ninja, "
        "or leave deepspeed.nvme_path out."
    )
    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        return f"deepspeed.nvme_path: DeepSpeed's async_io operation needs libaio, which was not found.\n{fix}"
    try:
        builder.load(verbose=False)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        return f"deepspeed.nvme_path: DeepSpeed's async_io operation cannot be built: {reason}.\n{fix}"
    return ""


def stored_values(optimizer: Any, flat: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """Gives the values of a group of weights, views of its files that can be written too; None if they are in memory.

    Args:
        optimizer: DeepSpeed's.
        flat: The group's fp32 masters.
    """
    info = _swapped(optimizer, flat)
    if info is None:
        return None
    files = {id(context.compute_tensor): context.swap_path for context in info.tensors}
    state = optimizer.optimizer.state.get(flat, {})
    tensors = {"fp32": flat} | {kind: state[kind] for kind in MOMENTS if kind in state}
    return {kind: _mapped(files[id(tensor)], info.numel()) for kind, tensor in tensors.items()}


@contextlib.contextmanager
def fresh_state(optimizer: Any, flat: torch.Tensor) -> Iterator[None]:
    """Brings the masters of a group into memory, without moments; what the block makes is written to files after it."""
    info = _swapped(optimizer, flat)
    if info is None:
        yield
        return
    optimizer.optimizer.state.pop(flat, None)
    del info.tensors[1:]
    info.has_state_tensors = False
    optimizer.optimizer_swapper.swap_in_optimizer_state(flat)
    yield
    optimizer.optimizer_swapper.swap_out_optimizer_state(flat)


def remove_files(optimizer: Any) -> None:
    """Deletes this rank's files, and the folders that no other rank uses any more."""
    swapper = getattr(optimizer, "optimizer_swapper", None)
    if swapper is None:
        return
    folder = Path(swapper.swap_folder)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        for parent in list(folder.parents)[:3]:  # optimizer, zero_stage_3 and the run's
            os.rmdir(parent)


def _swapped(optimizer: Any, flat: Any) -> Any:
    swapper = getattr(optimizer, "optimizer_swapper", None)
    return None if swapper is None else swapper.swap_params_info.get(flat.ds_id)


def _mapped(path: str, numel: int) -> torch.Tensor:
    return torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r+", shape=(numel,)))
