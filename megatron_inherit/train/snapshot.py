"""Copies of an engine's parts in host memory, from which a thread can write while training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from megatron_inherit.checkpoint.formats.native import StoredPart

if TYPE_CHECKING:
    import torch

    from megatron_inherit.engines.base import Part

RNG = "rng"
_Key = tuple[str, str, tuple[int, ...], tuple[int, int] | None]


class Snapshots:
    """Takes parts, into buffers that are used again by the next save.

    Args:
        copy: False refers to the live tensors, for a save during which nothing trains; those of a GPU are then brought
            over one by one as they are written.
    """

    def __init__(self, *, copy: bool) -> None:
        self.copy = copy
        self._buffers: dict[_Key, torch.Tensor] = {}

    def take(self, parts: Iterable[Part]) -> list[StoredPart]:
        """Gives the parts, and this rank's random state after them, ready to be written."""
        import torch

        before, self._buffers = self._buffers, {}  # of parts that a split of stages replaced nothing is kept
        taken = [self._stored(part, self._kept(part, before)) for part in parts]
        if self.copy and torch.cuda.is_available():
            torch.cuda.synchronize()
        return taken + random_state()

    def _kept(self, part: Part, before: Mapping[_Key, torch.Tensor]) -> torch.Tensor:
        tensor = part.tensor.detach()
        if not self.copy:
            return tensor
        key = (part.kind, part.name, part.start, part.flat)
        buffer = before.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            import torch

            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)

    def _stored(self, part: Part, tensor: torch.Tensor) -> StoredPart:
        return StoredPart(
            name=part.name,
            kind=part.kind,
            global_shape=tuple(part.global_shape),
            start=tuple(part.start),
            shape=tuple(part.shape),
            flat=part.flat,
            dtype=dtype_name(tensor.dtype),
            data=lambda: as_bytes(tensor),
        )


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Gives a tensor's bytes, row-major, as a one-dimensional uint8 array; a view where it lies so in host memory."""
    import torch

    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


def dtype_name(dtype: torch.dtype) -> str:
    """Gives the safetensors name of a torch dtype."""
    import torch

    names = {
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.float64: "F64",
        torch.uint8: "U8",
    }
    return names[dtype]


def random_state() -> list[StoredPart]:
    """Takes torch's random state of this process, and of its GPU."""
    import torch

    states = {f"{RNG}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{RNG}.cuda"] = torch.cuda.get_rng_state()
    return [_extra(name, state.numpy().copy()) for name, state in states.items()]


def restore_random_state(extras: dict[str, np.ndarray]) -> None:
    """Sets what ``random_state`` took."""
    import torch

    if f"{RNG}.cpu" in extras:
        torch.set_rng_state(torch.from_numpy(extras[f"{RNG}.cpu"].copy()))
    if f"{RNG}.cuda" in extras and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(extras[f"{RNG}.cuda"].copy()))


def _extra(name: str, data: np.ndarray) -> StoredPart:
    shape = (data.nbytes,)
    return StoredPart(name, "extra", shape, (0,), shape, None, "U8", lambda: data)
