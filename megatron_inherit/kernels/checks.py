"""Checks of shapes, dtypes and devices, made once at the door so that no kernel has to."""

from __future__ import annotations

import torch

from megatron_inherit.kernels.errors import KernelTypeError, KernelValueError
from megatron_inherit.kernels.head import HeadOptions, Shard

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRITON_FLOATS = (torch.float32, torch.bfloat16)
"""What the Triton kernels take; the reference takes all of ``FLOATS``."""

Named = dict[str, torch.Tensor | None]


def same_device(function: str, tensors: Named) -> None:
    """Refuses tensors on different devices, naming the first that differs."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, reference = next(iter(present.items()))
    for name, tensor in present.items():
        if tensor.device != reference.device:
            raise KernelValueError(
                f"{function}: {name!r} and {first!r} are on different devices.",
                got=f"{name} on {tensor.device}",
                expected=str(reference.device),
            )


def same_dtype(function: str, tensors: Named, *, or_float32: tuple[str, ...] = ()) -> None:
    """Refuses dtypes that are no floats or differ from the first tensor's.

    Args:
        function: Name for the message.
        tensors: By name; None is skipped.
        or_float32: Names that may be float32 whatever the first tensor is (norm weights kept in full precision).
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, reference = next(iter(present.items()))
    if reference.dtype not in FLOATS:
        raise KernelTypeError(f"{function}: {first!r} is not a float tensor.", got=reference.dtype, expected=FLOATS)
    for name, tensor in present.items():
        if tensor.dtype != reference.dtype and not (name in or_float32 and tensor.dtype == torch.float32):
            raise KernelTypeError(
                f"{function}: {name!r} and {first!r} differ in dtype.", got=tensor.dtype, expected=reference.dtype
            )


def shape(function: str, name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape; -1 in ``expected`` fits anything."""
    fits = tensor.ndim == len(expected) and all(
        want in (-1, have) for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        raise KernelValueError(
            f"{function}: {name!r} has the wrong shape.", got=tuple(tensor.shape), expected=tuple(expected)
        )


def norm(
    function: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """Checks a norm's tensors."""
    tensors: Named = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    same_device(function, tensors)
    same_dtype(function, tensors, or_float32=("weight", "bias"))
    shape(function, "weight", weight, x.shape[-1:])
    if bias is not None:
        shape(function, "bias", bias, x.shape[-1:])
    if residual is not None:
        shape(function, "residual", residual, tuple(x.shape))


def rope(
    function: str,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    head_dim: int,
    rotary_dim: int | None = None,
) -> None:
    """Checks what is rotated and its tables."""
    same_device(function, {"x": x, "cos": cos, "sin": sin})
    same_dtype(function, {"x": x})
    same_dtype(function, {"cos": cos, "sin": sin})
    length, batch = x.shape[:2]
    shape(function, "cos", cos, (length, -1) if cos.ndim == 2 else (length, batch, -1))
    shape(function, "sin", sin, tuple(cos.shape))
    rotated = 2 * cos.shape[-1]
    if rotated > head_dim or rotary_dim not in (None, rotated):
        raise KernelValueError(
            f"{function}: 'cos' rotates another number of dimensions than a head has to rotate.",
            got=f"{rotated} dimensions",
            expected=rotary_dim or f"at most {head_dim}",
        )


def packed_heads(
    function: str, qkv: torch.Tensor, num_heads: int, num_kv_heads: int, head_dim: int, pad_to: int | None
) -> None:
    """Checks that a packed projection holds the heads it is said to hold."""
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise KernelValueError(
            f"{function}: the query heads do not divide into the key/value heads.",
            got=f"{num_heads} and {num_kv_heads}",
        )
    shape(function, "qkv", qkv, (-1, -1, (num_heads + 2 * num_kv_heads) * head_dim))
    if pad_to is not None and pad_to < head_dim:
        raise KernelValueError(f"{function}: 'pad_to' is narrower than a head.", got=pad_to, expected=f">= {head_dim}")


def head(
    function: str, hidden: torch.Tensor, weight: torch.Tensor, options: HeadOptions
) -> tuple[Shard, dict[str, bool]]:
    """Checks hidden states, a head and its options; gives its place in the vocabulary and how gradients flow."""
    unknown = options.keys() - HeadOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {min(unknown)!r}")
    gradients = {
        "per_token_grad": options.get("per_token_grad", False),
        "reduce_hidden_grad": options.get("reduce_hidden_grad", True),
    }
    return _shard(function, hidden, weight, options), gradients


def _shard(function: str, hidden: torch.Tensor, weight: torch.Tensor, options: HeadOptions) -> Shard:
    vocab_size, vocab_start = options.get("vocab_size"), options.get("vocab_start", 0)
    group = options.get("tp_group")
    same_device(function, {"hidden": hidden, "weight": weight})
    same_dtype(function, {"hidden": hidden, "weight": weight})
    shape(function, "weight", weight, (-1, hidden.shape[-1]))
    rows = weight.shape[0]
    if group is None and vocab_start:
        raise KernelValueError(f"{function}: a shard of the vocabulary needs 'tp_group'.", got=f"start {vocab_start}")
    if group is not None and vocab_size is None:
        raise KernelValueError(f"{function}: a shard of the vocabulary needs 'vocab_size', the true number of tokens.")
    total = rows if vocab_size is None else vocab_size
    if group is not None and group.size() > 1:
        if vocab_start != group.rank() * rows or group.size() * rows < total:
            raise KernelValueError(
                f"{function}: 'weight' is not this rank's shard of the vocabulary.",
                got=f"{rows} rows from {vocab_start} on rank {group.rank()} of {group.size()}",
                expected=f"equal shards of at least {total} rows in all, in rank order",
            )
    elif total > rows:
        raise KernelValueError(
            f"{function}: 'weight' has fewer rows than the vocabulary.", got=rows, expected=f"at least {total}"
        )
    group = group if group is not None and group.size() > 1 else None
    return Shard(start=vocab_start, valid=max(0, min(rows, total - vocab_start)), vocab_size=total, group=group)


def labels(
    function: str,
    hidden: torch.Tensor,
    values: torch.Tensor | None,
    ignore_index: int,
    mask: torch.Tensor | None,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks labels and mask and gives them flat: int64 labels [N] (zeros if None) and bool ``counted`` [N]."""
    leading = tuple(hidden.shape[:-1])
    tensors: Named = {"hidden": hidden, "labels": values, "mask": mask}
    same_device(function, tensors)
    counted = torch.ones(leading, dtype=torch.bool, device=hidden.device)
    if values is not None:
        shape(function, "labels", values, leading)
        if values.dtype not in (torch.int64, torch.int32):
            raise KernelTypeError(f"{function}: 'labels' are no token ids.", got=values.dtype, expected=torch.int64)
        counted = values != ignore_index
    if mask is not None:
        shape(function, "mask", mask, leading)
        counted = counted & (mask != 0)
    flat = counted.new_zeros(leading, dtype=torch.int64) if values is None else values.to(torch.int64)
    flat, counted = flat.reshape(-1), counted.reshape(-1)
    if hidden.device.type == "cpu":
        _in_vocabulary(function, "labels", flat[counted], vocab_size)
    return flat, counted


def _in_vocabulary(function: str, name: str, ids: torch.Tensor, vocab_size: int) -> None:
    if ids.numel() and not 0 <= int(ids.amin()) <= int(ids.amax()) < vocab_size:
        raise KernelValueError(
            f"{function}: {name!r} holds ids outside the vocabulary.",
            got=f"{int(ids.amin())} to {int(ids.amax())}",
            expected=f"0 to {vocab_size - 1}",
        )


def poison_foreign(losses: torch.Tensor, ids: torch.Tensor, counted: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Gives NaN for rows [N] with ids [N] or [N, k] outside the vocabulary on a GPU: to look would wait for it."""
    return losses if losses.device.type == "cpu" else losses.masked_fill(foreign(ids, counted, vocab_size), torch.nan)


def foreign(ids: torch.Tensor, counted: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Tells of each row [N] whether it counts and one of its ids, [N] or [N, k], lies outside the vocabulary."""
    outside = (ids < 0) | (ids >= vocab_size)
    return counted & (outside if ids.ndim == 1 else outside.any(1))


def teacher(
    function: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    shard: Shard,
) -> None:
    """Checks that a teacher's head speaks of the same rows and tokens as the student's."""
    same_device(function, {"hidden": hidden, "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight})
    same_dtype(function, {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight})
    shape(function, "teacher_hidden", teacher_hidden, (*hidden.shape[:-1], -1))
    shape(function, "teacher_weight", teacher_weight, (-1, teacher_hidden.shape[-1]))
    if teacher_weight.shape[0] < shard.valid:
        raise KernelValueError(
            f"{function}: the teacher's vocabulary shard is smaller than the student's.",
            got=f"{teacher_weight.shape[0]} rows",
            expected=f"at least {shard.valid}",
        )
    if shard.group is not None and teacher_weight.shape[0] != weight.shape[0]:
        raise KernelValueError(
            f"{function}: the teacher's vocabulary is cut at other tokens than the student's.",
            got=f"{teacher_weight.shape[0]} rows a process",
            expected=f"{weight.shape[0]}",
        )


def divergence(function: str, kind: str, temperature: float, alpha: float, labels: torch.Tensor | None) -> None:
    """Checks the numbers of a distillation loss."""
    if kind not in ("forward", "reverse", "jsd"):
        raise KernelValueError(f"{function}: unknown divergence.", got=repr(kind), expected="forward, reverse or jsd")
    if not temperature > 0:
        raise KernelValueError(f"{function}: 'temperature' must be positive.", got=temperature)
    if not 0 <= alpha <= 1 or (alpha < 1 and labels is None):
        raise KernelValueError(
            f"{function}: 'alpha' does not fit.", got=alpha, expected="0 to 1, and labels where it is below 1"
        )


def topk(
    function: str,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    ghost_log_prob: torch.Tensor,
    counted: torch.Tensor,
    vocab_size: int,
) -> None:
    """Checks a cached teacher's targets, the ids of the rows that count (bool [N]) only."""
    same_device(function, {"hidden": hidden, "topk_ids": ids, "topk_logprobs": log_probs, "ghost": ghost_log_prob})
    same_dtype(function, {"topk_logprobs": log_probs})
    shape(function, "topk_ids", ids, (*hidden.shape[:-1], -1))
    shape(function, "topk_logprobs", log_probs, tuple(ids.shape))
    shape(function, "ghost_logprob", ghost_log_prob, tuple(hidden.shape[:-1]))
    if hidden.device.type == "cpu":
        _in_vocabulary(function, "topk_ids", ids.reshape(-1, ids.shape[-1])[counted], vocab_size)
