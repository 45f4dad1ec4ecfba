"""Optimizer state in files of a local disk (ZeRO-Infinity): what it needs, and where its values lie between steps.

DeepSpeed keeps fp32 masters and moments of a large group of weights in one raw file a tensor, reads them for the step
and writes them back; between steps the tensors are empty. A group of less than a megabyte stays in memory. It names its
files alike in every run, so that each process gives it a folder of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_inherit.base.errors import ConfigError, DiskError, MinheritError
from megatron_inherit.base.quantities import format_bytes
from megatron_inherit.base.temporary import lock, sweep, temporary_beside
from megatron_inherit.engines.deepspeed.async_io import operation_problem
from megatron_inherit.engines.parts import MOMENTS

ELEMENT_BYTES = 16
"""Of master, two moments and gradient, all fp32."""


class OwnFolder:
    """This process's folder on a local disk, which goes with it; what killed processes left there goes first.

    Args:
        disk: Folder of a local disk.

    Attributes:
        path: The new folder.

    Raises:
        OSError: It cannot be made, or DeepSpeed could not write in it.
    """

    def __init__(self, disk: Path) -> None:
        sweep(disk / "minherit", several=True)
        self.path = temporary_beside(disk / "minherit")
        self.path.mkdir()
        held = os.open(self.path, os.O_RDONLY)
        lock(held)
        self.remove = weakref.finalize(self, _remove, self.path, held)
        probe = os.open(self.path / "probe", os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0))
        os.close(probe)


def claim_folder(disk: str, elements: int, gather_text: Callable[[str], list[str]]) -> OwnFolder:
    """Makes this process's folder, or says on all ranks together why one of them cannot have it.

    Args:
        disk: ``deepspeed.nvme_path``, a folder that is there.
        elements: Weights whose optimizer state this rank keeps.
        gather_text: Gives every rank's text on every rank; all ranks call this function together.

    Raises:
        ConfigError: The folder is missing or cannot be written, or DeepSpeed's asynchronous reads cannot be built.
        DiskError: There is no room for the state of the ranks that share the disk.
    """
    folder, problem = _make_folder(Path(disk))
    problem = problem or operation_problem()
    mine = {"problem": problem, "bytes": ELEMENT_BYTES * elements, "host": socket.gethostname(), "device": 0, "free": 0}
    if not problem:
        mine |= {"device": os.stat(disk).st_dev, "free": shutil.disk_usage(disk).free}
    ranks = [json.loads(text) for text in gather_text(json.dumps(mine))]
    error = _first_problem(ranks) or _lack_of_room(disk, ranks)
    if folder is None or error is not None:
        if folder is not None:
            folder.remove()
        raise error or AssertionError("a rank without a folder has a problem")
    return folder


def _first_problem(ranks: list[dict[str, Any]]) -> MinheritError | None:
    for rank in ranks:
        if rank["problem"]:
            what, _, fix = rank["problem"].partition("\n")
            return ConfigError(what, fix=fix)
    return None


def _lack_of_room(disk: str, ranks: list[dict[str, Any]]) -> MinheritError | None:
    for place in sorted({(rank["host"], rank["device"]) for rank in ranks}):
        there = [rank for rank in ranks if (rank["host"], rank["device"]) == place]
        # one rank may have looked while another still removed what is left of a killed run
        needed, free = sum(rank["bytes"] for rank in there), max(rank["free"] for rank in there)
        if free < needed:
            return DiskError(
                f"deepspeed.nvme_path: not enough space on the file system of {disk} on {place[0]}.",
                got=f"{format_bytes(free)} free",
                expected=f"at least {format_bytes(needed)}",
                fix="Free space, name another disk, or use more nodes.",
            )
    return None


def _make_folder(disk: Path) -> tuple[OwnFolder | None, str]:
    where, fix = f"on {socket.gethostname()}", "Name a folder of a local disk that every node has, or leave it out."
    if not disk.is_dir():
        return None, f"deepspeed.nvme_path: {disk} is not a folder {where}.\n{fix}"
    try:
        return OwnFolder(disk), ""
    except OSError as error:
        return None, f"deepspeed.nvme_path: {disk} cannot be written {where}: {error.strerror}.\n{fix}"


def _remove(path: Path, held: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(held)


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


def _swapped(optimizer: Any, flat: Any) -> Any:
    swapper = getattr(optimizer, "optimizer_swapper", None)
    return None if swapper is None else swapper.swap_params_info.get(flat.ds_id)


def _mapped(path: str, numel: int) -> torch.Tensor:
    return torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r+", shape=(numel,)))
