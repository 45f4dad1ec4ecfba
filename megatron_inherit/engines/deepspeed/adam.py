"""AdamW for DeepSpeed: torch's, with the clipping and the guard that ZeRO-0 lacks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


class ClippedAdamW(torch.optim.AdamW):
    """Clips by the norm of the whole gradient and leaves out a step whose gradient is not finite.

    Under ZeRO-0 DeepSpeed calls this optimizer on whole fp32 gradients, reports no norm and looks for no NaN.

    Args:
        groups: Parameter groups.
        clip: Largest norm; 0 leaves the gradient as it is.
        tensor_group: Tensor parallel ranks.
        more: Arguments of AdamW.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, clip: float, tensor_group: dist.ProcessGroup, **more: Any
    ) -> None:
        super().__init__(groups, **more)
        self.clip, self.tensor_group = clip, tensor_group
        self.norm, self.applied = 0.0, True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Applies one update, or none; ``norm`` and ``applied`` tell which."""
        held = [(p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norm = self._global_norm(held)
        self.applied = math.isfinite(self.norm)
        if not self.applied:
            return None
        factor = self.clip / (self.norm + 1e-6) if self.clip else 1.0
        if factor < 1.0:
            torch._foreach_mul_([gradient for _, gradient in held], factor)
        return super().step()

    def _global_norm(self, held: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> float:
        first = self.tensor_group.rank() == 0
        counted = [gradient for p, gradient in held if first or getattr(p, "tensor_model_parallel", False)]
        device = held[0][1].device
        norms = torch._foreach_norm(counted) if counted else (torch.zeros((), device=device),)
        total = torch.stack(list(norms)).double().square().sum()
        if self.tensor_group.size() > 1:
            dist.all_reduce(total, group=self.tensor_group)
        return math.sqrt(float(total)) if math.isfinite(float(total)) else float(total)
