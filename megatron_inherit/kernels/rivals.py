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
import torch.nn.functional as F

from megatron_inherit.kernels.linear_cross_entropy import reference
from megatron_inherit.kernels.linear_kl import reference as kl_reference

PACKAGES = {"liger": "liger_kernel", "quack": "quack"}
FUNCTIONS = {
    "liger": {"rms_norm", "layer_norm", "add_rms_norm", "rope_qkv", "swiglu", "linear_cross_entropy", "linear_kl"},
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

    def forward_rope(q: torch.Tensor, k: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # it turns contiguous tensors in place: both are copied into its own order first
        physical = [x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(1, 2) for x in (q, k)]
        width = 2 * tables[0].shape[-1]
        turned = ops.LigerRopeFunction.apply(*physical, *(_batch_first(t) for t in tables), None, 1, width)
        return tuple(x.permute(2, 0, 1, 3) for x in turned)

    return SimpleNamespace(
        rms_norm=rms_norm,
        layer_norm=layer_norm,
        add_rms_norm=ops.LigerFusedAddRMSNormFunction.apply,
        rope_qkv=functools.partial(_rope_qkv, forward_rope),
        swiglu=ops.LigerFusedGateUpSiLUMulFunction.apply,
        linear_cross_entropy=functools.partial(_spread, "liger", total),
        linear_kl=functools.partial(_liger_kl, ops.LigerFusedLinearJSDFunction.apply),
    )


def _batch_first(table: torch.Tensor) -> torch.Tensor:
    """Gives a table [s, r] or [s, b, r] as [1 or b, s, r]."""
    return table[None] if table.ndim == 2 else table.transpose(0, 1)


def _rope_qkv(
    turn: Callable[..., tuple[torch.Tensor, ...]],
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    pad_to: int,
) -> tuple[torch.Tensor, ...]:
    """Gives a rival that turns separate queries and keys what ``dispatch.rope_qkv`` gives ours."""
    grouped = qkv.unflatten(-1, (num_kv_heads, num_heads // num_kv_heads + 2, head_dim))
    q, k, v = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
    return tuple(F.pad(x, (0, pad_to - head_dim)) for x in (*turn(q, k, cos, sin), v))


JSD_BETA = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}


def _liger_kl(
    run: Callable[..., torch.Tensor],
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    counted: torch.Tensor,
    shard: Any,
    temperature: float,
    kind: str,
    alpha: float,
    per_token_grad: bool,
    **options: Any,
) -> torch.Tensor:
    """Gives Liger's mean divergence to every row that counts: it knows no loss of a row and no cross-entropy beside."""
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    if shard.group is not None or per_token_grad or alpha < 1:
        _say_once("kernels: liger's divergence has no shards, gradients of rows or cross-entropy; the reference runs")
        return kl_reference.linear_kl(
            *heads,
            counted=counted,
            shard=shard,
            temperature=temperature,
            kind=kind,
            alpha=alpha,
            per_token_grad=per_token_grad,
            **options,
        )
    student_weight, teacher_weight = student_weight[: shard.valid], teacher_weight[: shard.valid]
    ignored = torch.where(counted, 0, -100)
    mean = run(
        student_hidden, student_weight, teacher_hidden, teacher_weight, ignored, JSD_BETA[kind], -100, temperature
    )
    mean = mean[0] if isinstance(mean, tuple) else mean
    return torch.where(counted, mean.float() * temperature**2, 0.0)


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
    lacking = name == "quack" and (z_loss or hidden.shape[0] % 8 or weight.shape[0] % 8)
    if shard.group is not None or per_token_grad or lacking:
        _say_once(
            f"kernels: {name} has no shards or gradients of rows, quack no z-loss or odd sizes; the reference runs"
        )
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
