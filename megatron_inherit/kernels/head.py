"""A linear head and a loss over its vocabulary, a chunk of rows at a time: the logits never stand in memory whole.

Each chunk's logits are made by one matrix product, turned in place into their gradient by a *row pass*, and used up by
the two products of the backward pass. So the gradients of hidden states and weight are finished when the forward pass
ends, nothing is computed twice, and the backward pass is one multiplication by the incoming gradient. Chunks are large
(thousands of rows) because a thin matrix product, not the loss, is what costs time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_inherit.kernels.errors import KernelValueError

RowPass = Callable[[torch.Tensor, slice, torch.Tensor | None], torch.Tensor]
"""``(logits [n, columns], rows, scale [n] or None) -> losses [n]``.

With a scale the pass leaves each row's gradient times its scale in ``logits``; without one it may leave anything there.
Columns beyond the vocabulary hold garbage and must be left zero or finite by a pass with a scale.
"""

MAX_ROWS = 4096
MIN_ROWS = 64
BUFFER_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
"""Largest chunk of logits: 4096 rows of a vocabulary of 128k in bfloat16 on a GPU, what still streams well on a CPU."""


class HeadOptions(TypedDict, total=False):
    """What every operation on a linear head takes besides its own arguments; each may be left out.

    Attributes:
        vocab_size: True number of tokens; rows of the head from there on are padding and take no part. Default: all.
        vocab_start: Global id of the head's first row. Default: 0.
        tp_group: Processes that hold the other rows; each gives the same hidden states and labels. Default: None.
        reduce_hidden_grad: Adds up the gradient of the hidden states over ``tp_group``. False where the caller does
            (sequence parallelism: the reduce-scatter behind its all-gather). Default: True.
        per_token_grad: The gradient that comes back may differ from row to row. False, the default, is right for a sum
            or a mean over the rows that count, and one matrix product cheaper; a gradient that differs then raises on a
            CPU and gives NaN on a GPU.
    """

    vocab_size: int | None
    vocab_start: int
    tp_group: dist.ProcessGroup | None
    reduce_hidden_grad: bool
    per_token_grad: bool


@dataclass(frozen=True)
class Shard:
    """The part of the vocabulary that this process holds.

    Attributes:
        start: Global id of the first row of the weight.
        valid: Rows of the weight that are tokens; those after them pad the vocabulary and take no part.
        vocab_size: True number of tokens over all shards.
        group: Processes that hold the other parts, or None.
    """

    start: int
    valid: int
    vocab_size: int
    group: dist.ProcessGroup | None

    def local(self, ids: torch.Tensor) -> torch.Tensor:
        """Gives the columns of global token ids, -1 for those that are held elsewhere."""
        columns = ids - self.start
        return torch.where((columns >= 0) & (columns < self.valid), columns, -1)

    def gather(self, statistics: torch.Tensor) -> torch.Tensor:
        """Gives every process's copy of a small tensor, [processes, ...], in one collective."""
        if self.group is None:
            return statistics[None]
        pieces = [torch.empty_like(statistics) for _ in range(self.group.size())]
        dist.all_gather(pieces, statistics.contiguous(), group=self.group)
        return torch.stack(pieces)


@dataclass(frozen=True)
class Head:
    """How a head is worked through.

    Attributes:
        row_pass: The loss.
        counted: bool [N], rows whose loss is not zero by definition.
        padding: Every row of logits is padded to a multiple of this many columns, and by one column at least unless
            this is 1, so that kernels load whole vectors.
        per_token_grad: The incoming gradient may differ from token to token.
        reduce_hidden_grad: The gradient of the hidden states is added up over ``group``.
        group: Processes that hold the other parts of the vocabulary, or None.
    """

    row_pass: RowPass
    counted: torch.Tensor
    padding: int
    per_token_grad: bool = False
    reduce_hidden_grad: bool = True
    group: dist.ProcessGroup | None = None


def losses(hidden: torch.Tensor, weight: torch.Tensor, head: Head) -> torch.Tensor:
    """Runs a head over all rows.

    Args:
        hidden: [N, H].
        weight: [V, H], the local shard of the head.
        head: The loss and how to go through it.

    Returns:
        [N], float32 (float64 for float64 input), differentiable once in ``hidden`` and ``weight``.
    """
    needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    result: torch.Tensor = _ChunkedHead.apply(hidden, weight, head, needed)
    return result


def chunk_rows(num_rows: int, columns: int, itemsize: int, device: str) -> int:
    """Gives the rows of a chunk: all that fit the device's buffer, 4096 at most, 64 at least."""
    fitting = BUFFER_BYTES["cuda" if device == "cuda" else "cpu"] // (columns * itemsize)
    return min(num_rows, max(MIN_ROWS, min(MAX_ROWS, fitting // MIN_ROWS * MIN_ROWS)))


def _columns(num_tokens: int, padding: int) -> int:
    return num_tokens if padding == 1 else (num_tokens // padding + 1) * padding


def row_buffer(hidden: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
    """Allocates the logits of one chunk, [rows, columns]."""
    columns = _columns(weight.shape[0], padding)
    rows = chunk_rows(hidden.shape[0], columns, hidden.element_size(), hidden.device.type)
    return hidden.new_empty(rows, columns)


def _chunks(hidden: torch.Tensor, weight: torch.Tensor, padding: int) -> Iterator[tuple[slice, torch.Tensor]]:
    if hidden.shape[0] == 0:
        return
    buffer = row_buffer(hidden, weight, padding)
    for start in range(0, hidden.shape[0], buffer.shape[0]):
        rows = slice(start, min(start + buffer.shape[0], hidden.shape[0]))
        logits = buffer[: rows.stop - start]
        torch.mm(hidden[rows], weight.t(), out=logits[:, : weight.shape[0]])
        yield rows, logits


def _accumulate(total: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor, *, first: bool) -> None:
    """Adds ``grad.t() @ hidden`` to a total of float32 or wider."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), hidden, beta=0 if first else 1)
    elif grad.is_cuda:
        torch.addmm(total, grad.t(), hidden, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(grad.t() @ hidden)
    else:
        total.add_(grad.t() @ hidden)


def _gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    head: Head,
    scale: torch.Tensor,
    needed: tuple[bool, bool],
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gives the gradients of ``(losses * scale).sum()`` and, in ``out``, the losses."""
    hidden_grad = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed[0] else None
    wide = torch.promote_types(weight.dtype, torch.float32)
    fill = torch.zeros if hidden.shape[0] == 0 else torch.empty
    weight_grad = fill(weight.shape, dtype=wide, device=weight.device) if needed[1] else None
    for rows, logits in _chunks(hidden, weight, head.padding):
        values = head.row_pass(logits, rows, scale[rows])
        if out is not None:
            out[rows] = values
        grad = logits[:, : weight.shape[0]]
        if hidden_grad is not None:
            torch.mm(grad, weight, out=hidden_grad[rows])
        if weight_grad is not None:
            _accumulate(weight_grad, grad, hidden[rows], first=rows.start == 0)
    return hidden_grad, weight_grad


def _one_scale(grad: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Gives the one number that all counted rows' gradients are; zero where no row counts.

    On a GPU, where asking would wait for the device, gradients that differ give NaN in place of an error.
    """
    if counted.numel() == 0:
        return grad.new_zeros(())
    low = torch.where(counted, grad, torch.inf).amin()
    high = torch.where(counted, grad, -torch.inf).amax()
    if grad.device.type == "cpu" and low < high:
        raise KernelValueError(
            "The gradient of a fused head's losses differs from token to token.",
            got=f"{low.item():.6g} to {high.item():.6g}",
            expected="one number for all counted tokens, or per_token_grad=True",
        )
    return torch.where(low > high, 0.0, torch.where(low == high, low, torch.nan))


def _scaled(saved: torch.Tensor | None, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if saved is None or scale is None:
        return saved if saved is None else saved.to(dtype)
    return torch.mul(saved, scale, out=torch.empty_like(saved, dtype=dtype))


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, head: Head, needed: bool) -> torch.Tensor:
        ctx.head, ctx.dtypes = head, (hidden.dtype, weight.dtype)
        values = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
        if needed and not head.per_token_grad:
            ctx.save_for_backward(
                *_gradients(hidden, weight, head, torch.ones_like(values), ctx.needs_input_grad[:2], values)
            )
            return values
        for rows, logits in _chunks(hidden, weight, head.padding):
            values[rows] = head.row_pass(logits, rows, None)
        ctx.save_for_backward(hidden, weight)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        head: Head = ctx.head
        scale = None
        if head.per_token_grad:
            hidden, weight = ctx.saved_tensors
            hidden_grad, weight_grad = _gradients(hidden, weight, head, grad, ctx.needs_input_grad[:2])
        else:
            hidden_grad, weight_grad = ctx.saved_tensors
            scale = _one_scale(grad, head.counted)
        hidden_grad, weight_grad = (
            _scaled(saved, scale, dtype) for saved, dtype in zip((hidden_grad, weight_grad), ctx.dtypes, strict=True)
        )
        if hidden_grad is not None and head.group is not None and head.reduce_hidden_grad:
            dist.all_reduce(hidden_grad, group=head.group)
        return hidden_grad, weight_grad, None, None
