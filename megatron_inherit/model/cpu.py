"""What Megatron-Core needs to run where torch has no CUDA: the word "cuda" means the CPU while a block is open.

Megatron-Core writes ``device="cuda"``, ``torch.cuda.current_device()`` and ``.cuda()`` in its schedules, gradient
buffers and optimizers. Every call altered here would otherwise raise "Torch not compiled with CUDA enabled", so nothing
that works is changed; where CUDA exists the block does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    return type(device) is int or str(device).startswith("cuda")


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device of torch calls.

    A mode is suspended inside ``backward`` and belongs to one thread: ``current_device`` therefore returns a usable
    device and not an index.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:  # compared with "torch.cuda.FloatTensor"
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs["device"] = _CPU
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], (str, int, torch.device)):
            args = (args[0], _CPU, *args[2:]) if _is_cuda(args[1]) else args
        return func(*args, **(kwargs or {}))


class _NoStream:
    """A stream or event of a device that has none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *args: object) -> None:
        pass


def _get_random_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_random_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


_REPLACED: dict[tuple[Any, str], Any] = {
    (torch.cuda, "current_device"): lambda: _CPU,
    (torch.cuda, "synchronize"): lambda *args, **kwargs: None,
    (torch.cuda, "current_stream"): lambda *args, **kwargs: _NoStream(),
    (torch.cuda, "stream"): lambda stream: contextlib.nullcontext(),
    (torch.cuda, "Stream"): _NoStream,
    (torch.cuda, "Event"): _NoStream,
    (torch.cuda.random, "get_rng_state"): _get_random_state,
    (megatron_random, "_set_cuda_rng_state"): _set_random_state,
}
_depth = 0


@contextlib.contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """Opens a block in which Megatron-Core's CUDA calls reach the CPU; does nothing where CUDA exists; nests."""
    global _depth  # noqa: PLW0603
    if torch.cuda.is_available() or _depth:
        yield
        return
    saved = {place: getattr(*place) for place in _REPLACED}
    for place, value in _REPLACED.items():
        setattr(*place, value)
    _depth += 1
    try:
        with _CudaMeansCpu():
            yield
    finally:
        _depth -= 1
        for place, value in saved.items():
            setattr(*place, value)
