"""What ranks tell each other outside the model: sums, flags, texts."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
import xxhash

from megatron_inherit.model.texts import gather_text

__all__ = ["any_rank", "gather_text", "hash_tensors", "make_deterministic", "sum_over"]


def make_deterministic() -> None:
    """Makes torch choose algorithms that give the same bits in every run, or raise where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)


def sum_over(values: Sequence[float], group: dist.ProcessGroup | None, device: torch.device) -> list[float]:
    """Adds values over a group (None: all ranks) in float64."""
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return total.tolist()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Tells whether the flag is set on any rank."""
    value = torch.tensor([int(flag)], dtype=torch.int32, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def hash_tensors(tensors: Sequence[torch.Tensor]) -> str:
    """Hashes the bytes of tensors in order: xxh3 with 128 bits, hexadecimal."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
