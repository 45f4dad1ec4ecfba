"""Divergence and gradient of one chunk of student and teacher logits in Triton, in place: one program a row."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from megatron_inherit.kernels import row
from megatron_inherit.kernels.head import Shard
from megatron_inherit.kernels.linear_kl.function import fused, fused_topk
from megatron_inherit.kernels.linear_kl.reference import KINDS, topk_terms
from megatron_inherit.kernels.row import PADDING

BLOCK = 4096
WARPS = 8
FORWARD, REVERSE, JSD = (tl.constexpr(index) for index in range(3))
LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _statistics(student, teacher, stride, valid, factor, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Gives both logsumexps and, but for JSD, the mean difference of softened logits under the leading distribution."""
    s_top = tl.full((), -float("inf"), tl.float32)
    t_top = tl.full((), -float("inf"), tl.float32)
    s_total = tl.zeros((), tl.float32)
    t_total = tl.zeros((), tl.float32)
    mean = tl.zeros((), tl.float32)
    for start in range(0, valid, BLOCK):
        x = row.load(student, start, stride, valid, factor, BLOCK)
        z = row.load(teacher, start, stride, valid, factor, BLOCK)
        s_old, t_old = s_top, t_top
        s_top, s_safe, s_total = row.grow(s_top, s_total, x)
        t_top, t_safe, t_total = row.grow(t_top, t_total, z)
        inside = start + tl.arange(0, BLOCK) < valid
        if KIND == FORWARD:
            mean = mean * tl.exp(t_old - t_safe) + tl.sum(tl.where(inside, tl.exp(z - t_safe) * (z - x), 0.0), 0)
        elif KIND == REVERSE:
            mean = mean * tl.exp(s_old - s_safe) + tl.sum(tl.where(inside, tl.exp(x - s_safe) * (x - z), 0.0), 0)
    mean /= tl.maximum(t_total if KIND == FORWARD else s_total, 1e-30)
    return s_top + tl.log(s_total), t_top + tl.log(t_total), mean


@triton.jit
def _log_mixture(log_p, log_q):
    """Gives log((p + q) / 2)."""
    top = tl.maximum(log_p, log_q)
    return top + tl.log(1.0 + tl.exp(tl.minimum(log_p, log_q) - top)) - LOG_2


@triton.jit
def _to_mixture(student, teacher, stride, valid, factor, s_norm, t_norm, BLOCK: tl.constexpr):
    """Gives KL(p, m) and KL(q, m) where m is the mean of both, summed over these columns."""
    from_p = tl.zeros((), tl.float32)
    from_q = tl.zeros((), tl.float32)
    for start in range(0, valid, BLOCK):
        inside = start + tl.arange(0, BLOCK) < valid
        log_q = tl.where(inside, row.load(student, start, stride, valid, factor, BLOCK) - s_norm, 0.0)
        log_p = tl.where(inside, row.load(teacher, start, stride, valid, factor, BLOCK) - t_norm, 0.0)
        log_m = _log_mixture(log_p, log_q)
        from_p += tl.sum(tl.exp(log_p) * (log_p - log_m), 0)
        from_q += tl.sum(tl.exp(log_q) * (log_q - log_m), 0)
    return from_p, from_q


@triton.jit
def divergence(
    STUDENT, TEACHER, COLUMN, SCALE, RESULT, count, student_stride, teacher_stride, valid,
    factor, soft_share, hard_share,
    KIND: tl.constexpr, HARD: tl.constexpr, STATISTICS: tl.constexpr, MIXTURE: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Three steps over a row, in one launch or, with collectives between them, in several.

    RESULT [6, count] holds 0 the student's and 1 the teacher's logsumexp, 2 the mean difference (JSD: KL(p, m)),
    3 JSD's KL(q, m), 4 the student's logsumexp at temperature 1, 5 the label's logit. ``factor`` is 1 / temperature,
    the shares are factors on the gradients of divergence and cross-entropy; HARD: there is a cross-entropy.
    """
    program = tl.program_id(0).to(tl.int64)
    student = STUDENT + program * student_stride
    teacher = TEACHER + program * teacher_stride
    result = RESULT + program
    stride = tl.minimum(student_stride, teacher_stride)
    label = tl.load(COLUMN + program)
    if STATISTICS:
        # read before the barriers of the reductions: behind them another warp may have put the gradient in its place
        target = tl.load(student + label, mask=label >= 0, other=0.0).to(tl.float32)
        s_norm, t_norm, mean = _statistics(student, teacher, stride, valid, factor, KIND, BLOCK)
        tl.store(result, s_norm)
        tl.store(result + count, t_norm)
        tl.store(result + 2 * count, mean)
        hard_norm = row.logsumexp(student, stride, valid, 1.0, BLOCK) if HARD else s_norm
        tl.store(result + 4 * count, hard_norm)
        tl.store(result + 5 * count, target)
    else:
        s_norm, t_norm, mean = tl.load(result), tl.load(result + count), tl.load(result + 2 * count)
        hard_norm = tl.load(result + 4 * count)
    if MIXTURE:
        from_p, from_q = _to_mixture(student, teacher, stride, valid, factor, s_norm, t_norm, BLOCK)
        tl.store(result + 2 * count, from_p)
        tl.store(result + 3 * count, from_q)
    elif KIND == JSD and GRADIENT:
        from_q = tl.load(result + 3 * count)
    if GRADIENT:
        scale = tl.load(SCALE + program)
        for start in range(0, student_stride, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < valid
            raw = row.load(student, start, student_stride, valid, 1.0, BLOCK)
            log_q = tl.where(inside, raw * factor - s_norm, 0.0)
            log_p = tl.where(inside, row.load(teacher, start, stride, valid, factor, BLOCK) - t_norm, 0.0)
            q = tl.exp(log_q)
            if KIND == FORWARD:
                gradient = q - tl.exp(log_p)
            elif KIND == REVERSE:
                gradient = q * (log_q - log_p - (mean - s_norm + t_norm))
            else:
                gradient = 0.5 * q * (log_q - _log_mixture(log_p, log_q) - from_q)
            gradient *= soft_share
            if HARD:
                gradient += hard_share * (tl.exp(raw - hard_norm) - tl.where(column == label, 1.0, 0.0))
            gradient = tl.where(inside, gradient * scale, 0.0)
            tl.store(student + column, gradient.to(STUDENT.dtype.element_ty), mask=column < student_stride)


def rows(
    student: torch.Tensor,
    teacher: torch.Tensor,
    columns: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    shard: Shard,
    kind: str,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """Gives the losses of a chunk and leaves their gradient in ``student``; as ``reference.rows``."""
    count, index = student.shape[0], KINDS.index(kind)
    result = torch.empty(6, count, dtype=torch.float32, device=student.device)
    hard, jsd, gradient = columns is not None, kind == "jsd", scale is not None
    if columns is None:
        columns = torch.full((count,), -1, dtype=torch.int64, device=student.device)
    launch = functools.partial(
        divergence[(count,)], student, teacher, columns, result if scale is None else scale, result, count,
        student.stride(0), teacher.stride(0), shard.valid, 1 / temperature, alpha * temperature, 1 - alpha,
        KIND=index, HARD=hard, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    if shard.group is None:
        launch(STATISTICS=True, MIXTURE=jsd, GRADIENT=gradient)
    else:
        launch(STATISTICS=True, MIXTURE=False, GRADIENT=False)
        _join_statistics(result, kind, shard)
        if jsd:
            launch(STATISTICS=False, MIXTURE=True, GRADIENT=False)
            result[2:4] = shard.gather(result[2:4]).sum(0)
        if gradient:
            launch(STATISTICS=False, MIXTURE=False, GRADIENT=True)
    student_norm, teacher_norm, first, second, hard_norm, target = result
    difference = student_norm - teacher_norm
    value = (first + second) / 2 if jsd else first + (difference if kind == "forward" else -difference)
    loss = value * (alpha * temperature**2)
    return loss + (1 - alpha) * (hard_norm - target) if hard else loss


def _join_statistics(result: torch.Tensor, kind: str, shard: Shard) -> None:
    """Replaces this shard's statistics by those of the whole vocabulary."""
    parts = shard.gather(result)
    leading = parts[:, 1 if kind == "forward" else 0]
    share = torch.softmax(leading, 0)
    result[2] = (share * parts[:, 2]).sum(0)
    for norm in (0, 1, 4):
        result[norm] = torch.logsumexp(parts[:, norm], 0)
    result[5] = parts[:, 5].sum(0)


@triton.jit
def topk_gradient(
    LOGITS, NORMALISER, REST, MASS, GHOST, stride, valid, factor, BLOCK: tl.constexpr
):  # fmt: skip
    """Replaces logits by ``mass * q - ghost * (q among the tokens outside the k)``; the k are -inf and give zero."""
    program = tl.program_id(0).to(tl.int64)
    base = LOGITS + program * stride
    normaliser, mass = tl.load(NORMALISER + program), tl.load(MASS + program)
    rest, ghost = tl.load(REST + program), tl.load(GHOST + program)
    rest = tl.where(rest == -float("inf"), 0.0, rest)
    for start in range(0, stride, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = row.load(base, start, stride, valid, factor, BLOCK)
        gradient = mass * tl.exp(values - normaliser) - ghost * tl.exp(values - rest)
        tl.store(base + column, gradient.to(LOGITS.dtype.element_ty), mask=column < stride)


@triton.jit
def row_logsumexp(LOGITS, OUT, stride, valid, factor, BLOCK: tl.constexpr):
    """Writes each row's logsumexp of ``factor`` times its logits."""
    program = tl.program_id(0).to(tl.int64)
    tl.store(OUT + program, row.logsumexp(LOGITS + program * stride, stride, valid, factor, BLOCK))


def topk_rows(
    logits: torch.Tensor,
    columns: torch.Tensor,
    log_probs: torch.Tensor,
    ghost_log_prob: torch.Tensor,
    scale: torch.Tensor | None,
    *,
    shard: Shard,
    temperature: float,
) -> torch.Tensor:
    """Gives the divergence from a teacher of k tokens and a ghost; as ``reference.topk_rows``.

    The k logits are read, replaced by -inf so that the rest is summed without cancellation, and written at the end.
    What is held elsewhere goes to the padding column behind the vocabulary, which every buffer has.
    """
    held = columns >= 0
    index = torch.where(held, columns, logits.shape[1] - 1)
    kept = torch.where(held, logits.gather(1, index).float() / temperature, -torch.inf)
    logits.scatter_(1, index, -torch.inf)
    rest = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    tail = (logits.stride(0), shard.valid, 1 / temperature)
    row_logsumexp[(logits.shape[0],)](logits, rest, *tail, BLOCK=BLOCK, num_warps=WARPS)
    terms = topk_terms(kept, rest, log_probs, ghost_log_prob, shard)
    if scale is not None:
        grow = scale * temperature
        topk_gradient[(logits.shape[0],)](
            logits, terms.normaliser, terms.rest, terms.mass * grow, terms.ghost * grow, *tail,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        logits.scatter_(1, index, (terms.kept_gradient * grow[:, None]).to(logits.dtype))
    return terms.value * temperature**2


linear_kl = functools.partial(fused, rows=rows, padding=PADDING)
linear_topk_kl = functools.partial(fused_topk, rows=topk_rows, padding=PADDING)
