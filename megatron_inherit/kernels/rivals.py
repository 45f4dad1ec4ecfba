"""Other people's kernels (Liger, QuACK) behind our functions, so that a training run can measure them.

Imported only where ``MINHERIT_KERNELS`` names one of them. What a rival lacks runs as the reference, with one line.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from megatron_inherit.kernels.linear_cross_entropy import reference

PACKAGES = {"liger": "liger_kernel", "quack": "quack"}
FUNCTIONS = {
    "liger": {"rms_norm", "layer_norm", "add_rms_norm", "swiglu", "linear_cross_entropy"},
    "quack": {"rms_norm", "add_rms_norm", "linear_cross_entropy"},
}
_logger = logging.getLogger(__name__)


def refuses(name: str, function: str, x: torch.Tensor) -> str:
    """Gives the reason why a rival cannot run a function on a tensor's device, or nothing."""
    if function not in FUNCTIONS[name]:
        return f"{name} has no such function"
    if importlib.util.find_spec(PACKAGES[name]) is None:
        return f"{name} is not installed (pip install 'megatron-inherit[rivals]')"
    if not (x.is_cuda or (name == "liger" and os.environ.get("TRITON_INTERPRET") == "1")):
        return f"{name} does not run on {x.device.type}"
    return ""


@functools.cache
def load(name: str) -> Any:
    """Imports a rival and gives its functions under our names and signatures."""
    return _liger() if name == "liger" else _quack()


def _liger() -> Any:
    ops = importlib.import_module("liger_kernel.ops")

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return ops.LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        return ops.LigerLayerNormFunction.apply(x, weight, torch.zeros_like(weight) if bias is None else bias, eps)

    def total(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z_loss: float) -> torch.Tensor:
        result = ops.LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, labels, None, None, -100, z_loss, 0.0, "sum"
        )
        return result[0] if isinstance(result, tuple) else result

    def forward_kl(*heads: torch.Tensor) -> torch.Tensor:
        """Gives the mean KL(teacher, student) of two heads: the generalised JSD at 0; benchmarks only."""
        return ops.LigerFusedLinearJSDFunction.apply(*heads, None, 0.0, -100, 1.0)

    return SimpleNamespace(
        forward_kl=forward_kl,
        rms_norm=rms_norm,
        layer_norm=layer_norm,
        add_rms_norm=ops.LigerFusedAddRMSNormFunction.apply,
        swiglu=ops.LigerFusedGateUpSiLUMulFunction.apply,
        linear_cross_entropy=functools.partial(_spread, "liger", total),
    )


def _quack() -> Any:
    norm = importlib.import_module("quack.rmsnorm")
    head = importlib.import_module("quack.linear_cross_entropy")

    def flat(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, x.shape[-1])

    def add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, summed = norm.rmsnorm(flat(x), weight, residual=flat(residual), eps=eps, prenorm=True)
        return y.view(x.shape), summed.view(x.shape)

    def total(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z_loss: float) -> torch.Tensor:
        return head.chunked_linear_cross_entropy(hidden, weight, labels, ignore_index=-100, reduction="sum")

    return SimpleNamespace(
        rms_norm=lambda x, weight, eps: norm.rmsnorm(flat(x), weight, eps=eps).view(x.shape),
        add_rms_norm=add_rms_norm,
        linear_cross_entropy=functools.partial(_spread, "quack", total),
    )


def _spread(
    name: str,
    total: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    counted: torch.Tensor,
    shard: Any,
    z_loss: float,
    per_token_grad: bool,
    **options: Any,
) -> torch.Tensor:
    """Gives a rival's summed loss in equal parts to the rows that count: its fast path knows no loss of a row."""
    if shard.group is not None or per_token_grad or (z_loss and name == "quack"):
        _say_once(f"kernels: {name} has no shards, gradients of rows or (quack) z-loss; the reference runs")
        return reference.linear_cross_entropy(
            hidden,
            weight,
            labels,
            counted=counted,
            shard=shard,
            z_loss=z_loss,
            per_token_grad=per_token_grad,
            **options,
        )
    loss = total(hidden, weight[: shard.valid], torch.where(counted, labels, -100), z_loss)
    return torch.where(counted, loss.float() / counted.sum().clamp(min=1), 0.0)


@functools.cache
def _say_once(message: str) -> None:
    _logger.warning(message)
