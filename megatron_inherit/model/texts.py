"""Texts between ranks; needs torch alone."""

from __future__ import annotations

import torch
import torch.distributed as dist


def gather_text(text: str, device: torch.device, group: dist.ProcessGroup | None = None) -> list[str]:
    """Gives every rank's text on every rank of a group (None: all); bytes travel, never a pickle."""
    data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([data.numel()], dtype=torch.int64, device=device), group=group)
    longest = max(int(size.item()) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    texts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(texts, padded, group=group)
    raw = [bytes(t[: int(size.item())].cpu().numpy()) for t, size in zip(texts, sizes, strict=True)]
    return ["" if one == b"\0" else one.decode() for one in raw]
