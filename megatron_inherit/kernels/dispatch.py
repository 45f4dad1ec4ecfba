"""The operations of this package, each run by the implementation that ``MINHERIT_KERNELS`` asks for.

``auto`` (the default) is Triton on CUDA and plain torch on a CPU; ``reference``, ``triton``, ``liger`` and ``quack``
ask for one. What an implementation cannot do runs as the reference, with one line in the log.
"""

from __future__ import annotations

from typing import Unpack

import torch

from megatron_inherit.kernels import checks
from megatron_inherit.kernels.choice import implementation
from megatron_inherit.kernels.errors import KernelValueError
from megatron_inherit.kernels.head import HeadOptions


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises the last dimension by its root mean square.

    Args:
        x: [..., H].
        weight: [H], of ``x``'s dtype or float32.
        eps: Added to the mean square.

    Returns:
        A tensor of ``x``'s shape and dtype.

    Raises:
        KernelValueError: Shapes or devices do not fit.
        KernelTypeError: Dtypes do not fit.
    """
    checks.norm("rms_norm", x, weight)
    return implementation("norm", "rms_norm", x).rms_norm(x, weight, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Normalises the last dimension to mean zero and variance one, then scales and shifts; else as ``rms_norm``."""
    checks.norm("layer_norm", x, weight, bias=bias)
    return implementation("norm", "layer_norm", x).layer_norm(x, weight, bias, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the residual stream and normalises, in one pass over memory.

    Args:
        x: [..., H], a block's output.
        residual: The stream, of ``x``'s shape and dtype.
        weight: [H].
        eps: Added to the mean square.

    Returns:
        The norm of the sum, and the sum.
    """
    checks.norm("add_rms_norm", x, weight, residual=residual)
    return implementation("norm", "add_rms_norm", x).add_rms_norm(x, residual, weight, eps)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the residual stream and applies LayerNorm; as ``add_rms_norm``."""
    checks.norm("add_layer_norm", x, weight, bias=bias, residual=residual)
    module = implementation("norm", "add_layer_norm", x)
    return module.add_layer_norm(x, residual, weight, bias, eps)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first ``2 * cos.shape[-1]`` dimensions of each head, halves paired as Hugging Face and Megatron do.

    Args:
        x: [s, b, heads, head_dim].
        cos: float32 [s, rotated / 2] or [s, b, rotated / 2], with any scaling factor in it.
        sin: As ``cos``.

    Returns:
        A tensor of ``x``'s shape and dtype.
    """
    checks.rope("rope", x, cos, sin, head_dim=x.shape[-1])
    return implementation("rope", "rope", x, width=x.shape[-1]).rope(x, cos, sin)


def rope_qkv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int | None = None,
    pad_to: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits Megatron's packed projection, rotates queries and keys and pads every head with zeros, in one pass.

    The zeros change neither scores nor values as long as attention keeps its scale at ``1 / sqrt(head_dim)``; cut them
    off its output.

    Args:
        qkv: [s, b, groups * (queries a group + 2) * head_dim]: for each key/value group its queries, key, value.
        cos: As for ``rope``.
        sin: As for ``rope``.
        num_heads: Query heads in ``qkv`` (of this tensor-parallel rank).
        num_kv_heads: Groups in ``qkv``.
        head_dim: Width of a head.
        rotary_dim: Rotated dimensions of a head; must agree with ``cos``. Default: ``2 * cos.shape[-1]``.
        pad_to: Width of a head in the result. Default: ``head_dim``.

    Returns:
        q [s, b, num_heads, pad_to], k and v [s, b, num_kv_heads, pad_to].
    """
    checks.rope("rope_qkv", qkv, cos, sin, head_dim=head_dim, rotary_dim=rotary_dim)
    checks.packed_heads("rope_qkv", qkv, num_heads, num_kv_heads, head_dim, pad_to)
    pad_to = pad_to or head_dim
    return implementation("rope", "rope_qkv", qkv, width=pad_to).rope_qkv(
        qkv, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, pad_to=pad_to
    )


def swiglu(packed: torch.Tensor) -> torch.Tensor:
    """Gives ``silu(gate) * up`` of the packed projection [..., 2F], gate first: [..., F]."""
    checks.same_dtype("swiglu", {"packed": packed})
    if packed.ndim == 0 or packed.shape[-1] % 2:
        raise KernelValueError(
            "swiglu: 'packed' is no gate and up of equal width.", got=tuple(packed.shape), expected="[..., 2F]"
        )
    return implementation("activation", "swiglu", packed).swiglu(packed)


def gelu_tanh(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Gives GELU of ``x + bias`` by the tanh approximation, [..., F]; ``bias`` is [F] or None."""
    checks.same_device("gelu_tanh", {"x": x, "bias": bias})
    checks.same_dtype("gelu_tanh", {"x": x, "bias": bias}, or_float32=("bias",))
    if bias is not None:
        checks.shape("gelu_tanh", "bias", bias, x.shape[-1:])
    return implementation("activation", "gelu_tanh", x).gelu_tanh(x, bias)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    mask: torch.Tensor | None = None,
    z_loss: float = 0.0,
    **options: Unpack[HeadOptions],
) -> torch.Tensor:
    """Gives the next-token loss of each row without ever holding all logits.

    Args:
        hidden: [..., H].
        weight: [V, H], the head, or this process's rows of it.
        labels: int64 [...], global token ids.
        ignore_index: Rows with this label give zero and no gradient.
        mask: [...], rows where it is zero give zero and no gradient.
        z_loss: Adds ``z_loss * logsumexp^2`` (PaLM's is 1e-4).
        options: See ``head.HeadOptions``.

    Returns:
        float32 [...] (float64 for float64 input), in nats.

    Raises:
        KernelValueError: Shapes, devices or vocabulary bounds do not fit, or (on a CPU) a label is out of range.
        KernelTypeError: Dtypes do not fit.
    """
    name = "linear_cross_entropy"
    shard, gradients = checks.head(name, hidden, weight, options)
    flat, counted = checks.labels(name, hidden, labels, ignore_index, mask, shard.vocab_size)
    losses = implementation("linear_cross_entropy", name, hidden).linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        flat,
        counted=counted,
        shard=shard,
        z_loss=z_loss,
        **gradients,
    )
    return checks.poison_foreign(losses, flat, counted, shard.vocab_size).view(labels.shape)


def linear_kl(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    temperature: float = 1.0,
    kind: str = "forward",
    alpha: float = 1.0,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    mask: torch.Tensor | None = None,
    **options: Unpack[HeadOptions],
) -> torch.Tensor:
    """Gives ``alpha * divergence + (1 - alpha) * cross-entropy`` of each row without holding either head's logits.

    Args:
        student_hidden: [..., H].
        student_weight: [V, H], the student's head, or this process's rows of it.
        teacher_hidden: [..., H of the teacher]; no gradient flows into it.
        teacher_weight: The teacher's head, the same tokens in the same order; no gradient flows into it.
        temperature: Softens both distributions; the divergence is multiplied by its square.
        kind: ``forward`` KL(teacher, student), ``reverse`` KL(student, teacher) or ``jsd``, Jensen-Shannon.
        alpha: Share of the divergence; below 1 ``labels`` are needed.
        labels: int64 [...], global token ids, for the cross-entropy (at temperature 1).
        ignore_index: Rows with this label give zero and no gradient.
        mask: [...], rows where it is zero give zero and no gradient.
        options: See ``head.HeadOptions``.

    Returns:
        float32 [...] (float64 for float64 input), in nats.

    Raises:
        KernelValueError, KernelTypeError: Shapes, devices, vocabulary bounds, dtypes or options do not fit.
    """
    name = "linear_kl"
    shard, gradients = checks.head(name, student_hidden, student_weight, options)
    checks.teacher(name, student_hidden, student_weight, teacher_hidden, teacher_weight, shard)
    checks.divergence(name, kind, temperature, alpha, labels)
    flat, counted = checks.labels(name, student_hidden, labels, ignore_index, mask, shard.vocab_size)
    losses = implementation("linear_kl", name, student_hidden).linear_kl(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        teacher_hidden.reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight[: student_weight.shape[0]],
        labels=flat if alpha < 1 else None,
        counted=counted,
        shard=shard,
        temperature=temperature,
        kind=kind,
        alpha=alpha,
        **gradients,
    )
    checked = losses if alpha == 1 else checks.poison_foreign(losses, flat, counted, shard.vocab_size)
    return checked.view(student_hidden.shape[:-1])


def linear_topk_kl(
    student_hidden: torch.Tensor,
    weight: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_logprobs: torch.Tensor,
    ghost_logprob: torch.Tensor,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    **options: Unpack[HeadOptions],
) -> torch.Tensor:
    """Gives the forward divergence of each row from a cached teacher: k tokens and one ghost that holds the rest.

    Args:
        student_hidden: [..., H].
        weight: [V, H], the student's head, or this process's rows of it.
        topk_ids: int64 [..., k], global token ids, no id twice in a row. On a GPU a row that counts and has an id
            outside the vocabulary gives NaN, as a label outside it does.
        topk_logprobs: [..., k], the teacher's log-probabilities at ``temperature``.
        ghost_logprob: [...], the log-probability of all other tokens together; -inf for none.
        temperature: The one the cache was made with; the divergence is multiplied by its square.
        mask: [...], rows where it is zero give zero and no gradient.
        options: See ``head.HeadOptions``.

    Returns:
        float32 [...] (float64 for float64 input), in nats.

    Raises:
        KernelValueError: Shapes, devices or vocabulary bounds do not fit, or (on a CPU) an id is out of range.
        KernelTypeError: Dtypes do not fit.
    """
    name = "linear_topk_kl"
    shard, gradients = checks.head(name, student_hidden, weight, options)
    checks.divergence(name, "forward", temperature, 1.0, None)
    _, counted = checks.labels(name, student_hidden, None, 0, mask, shard.vocab_size)
    checks.topk(name, student_hidden, topk_ids, topk_logprobs, ghost_logprob, counted, shard.vocab_size)
    ids = topk_ids.reshape(-1, topk_ids.shape[-1])
    losses = implementation("linear_kl", name, student_hidden).linear_topk_kl(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        weight,
        ids,
        topk_logprobs.reshape(ids.shape).detach(),
        ghost_logprob.reshape(-1).detach(),
        counted=counted,
        shard=shard,
        temperature=temperature,
        **gradients,
    )
    return checks.poison_foreign(losses, ids, counted, shard.vocab_size).view(student_hidden.shape[:-1])
