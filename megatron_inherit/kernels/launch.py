"""How wide a kernel's tile is and how many programs run it."""

from __future__ import annotations

import functools

import torch
import triton

INTERPRETER_PROCESSORS = 2
MAX_WIDTH = 8192
"""Elements that one block holds without spilling registers: a norm walks along longer rows, a head may not be wider."""


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Gives [rows, width] with the last dimension dense, a view wherever the strides allow it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()


def tile(width: int, *, widest: int) -> tuple[int, int]:
    """Gives the rows and columns of a tile of at least 2048 elements: several rows where they are short.

    Args:
        width: Elements of a row.
        widest: Most columns of a tile.
    """
    columns = min(triton.next_power_of_2(width), widest)
    return max(1, 2048 // columns), columns


def warps(elements: int, *, per_thread: int = 16) -> int:
    """Gives the warps for a tile: ``per_thread`` elements a thread, 4 warps at least, 32 at most."""
    return min(32, max(4, elements // (32 * per_thread)))


def resident_programs(device: torch.device, num_warps: int) -> int:
    """Gives a number of programs that all run at once at up to 64 registers a thread: 32 warps a multiprocessor.

    A reduction over rows keeps one partial sum a program, so programs must be few, equal and all resident.
    """
    return _processors(device) * max(1, 32 // num_warps)
