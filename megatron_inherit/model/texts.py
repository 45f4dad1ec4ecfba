"""Texts between ranks; needs torch alone."""

from __future__ import annotations

import torch
import torch.distributed as dist


def gather_text(text: str, device: torch.device, group: dist.ProcessGroup | None = None) -> list[str]:
    """Gives every rank's text on every rank of a group (None: all); bytes travel, never a pickle."""
    data, count = bytearray(text.encode()), dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(count)]
    dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64, device=device), group=group)
    lengths = torch.cat(sizes).tolist()  # one copy from the device, however many ranks there are
    longest = max(1, *lengths)
    padded = torch.frombuffer(data.ljust(longest, b"\0"), dtype=torch.uint8).to(device)
    texts = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(texts, padded, group=group)
    rows = torch.stack(texts).cpu().numpy()
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]
