"""What benchmarks/kernels.py measures: each operation, its shapes, its cost and everyone's implementation of it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_inherit.kernels import dispatch, rivals
from megatron_inherit.kernels.activation import kernel as activation
from megatron_inherit.kernels.head import Shard
from megatron_inherit.kernels.norm import kernel as norm
from megatron_inherit.kernels.rope import kernel as rope

EPS = 1e-5
Inputs = dict[str, torch.Tensor]
Function = Callable[[Inputs], torch.Tensor | tuple[torch.Tensor, ...]]
Draw = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Operation:
    """One row group of the results.

    Attributes:
        name: Of the operation.
        shape: For the table.
        inputs: ``draw, rows -> inputs``; names that start with ``_`` need no gradient.
        rows: Tokens.
        forward_bytes, backward_bytes: Least traffic of an element-wise operation, whole call.
        flops: Matrix products' operations, forward and backward together; 0 for element-wise operations.
        implementations: By name; the first is ours, ``eager`` is also the float64 truth.
    """

    name: str
    shape: str
    inputs: Callable[[Draw, int], Inputs]
    rows: int
    implementations: dict[str, Function]
    forward_bytes: int = 0
    backward_bytes: int = 0
    flops: int = 0


def installed(package: str) -> str:
    """Gives a package's version, or an empty string."""
    if importlib.util.find_spec(package.replace("-", "_").partition(".")[0]) is None:
        return ""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _with_rivals(ours: Function, eager: Function, name: str, call: Callable) -> dict[str, Function]:
    found: dict[str, Function] = {"ours": ours, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    for rival in ("liger", "quack"):
        if name in rivals.FUNCTIONS[rival] and (module := _rival(rival)) is not None:
            found[rival] = functools.partial(call, module)
    return found


def _rival(name: str):
    try:
        return rivals.load(name)
    except (ImportError, RuntimeError):
        return None


def norm_operations(rows: int, width: int) -> list[Operation]:
    def inputs(draw: Draw, count: int) -> Inputs:
        return {"x": draw(count, width), "residual": draw(count, width), "weight": draw(width), "bias": draw(width)}

    def plain(draw: Draw, count: int) -> Inputs:
        return {"x": draw(count, width), "weight": draw(width)}

    def add_rms(module, t):
        return module.add_rms_norm(t["x"], t["residual"], t["weight"], EPS)

    def rms(module, t):
        return module.rms_norm(t["x"], t["weight"], EPS)

    def eager_add_rms(t):
        summed = t["x"] + t["residual"]
        return F.rms_norm(summed, (width,), t["weight"], EPS), summed

    def eager_add_layer(t):
        summed = t["x"] + t["residual"]
        return F.layer_norm(summed, (width,), t["weight"], t["bias"], EPS), summed

    def eager_rms(t):
        return F.rms_norm(t["x"], (width,), t["weight"], EPS)

    tensor, shape = 2 * rows * width, f"{rows}x{width}"
    added = _with_rivals(functools.partial(add_rms, norm), eager_add_rms, "add_rms_norm", add_rms)
    single = _with_rivals(functools.partial(rms, norm), eager_rms, "rms_norm", rms)
    single |= _apex_and_te()
    return [
        Operation("rms_norm", shape, plain, rows, single, 2 * tensor, 3 * tensor),
        Operation("add_rms_norm", shape, without(inputs, "bias"), rows, added, 4 * tensor, 4 * tensor),
        Operation(
            "add_layer_norm", shape, inputs, rows,
            {
                "ours": lambda t: norm.add_layer_norm(t["x"], t["residual"], t["weight"], t["bias"], EPS),
                "eager": eager_add_layer,
                "compile": torch.compile(eager_add_layer, dynamic=False),
            },
            4 * tensor, 4 * tensor,
        ),
    ]  # fmt: skip


def without(inputs: Callable[[Draw, int], Inputs], name: str) -> Callable[[Draw, int], Inputs]:
    """Gives the same inputs less one."""
    return lambda draw, count: {key: value for key, value in inputs(draw, count).items() if key != name}


def _apex_and_te() -> dict[str, Function]:
    found: dict[str, Function] = {}
    if importlib.util.find_spec("apex") and importlib.util.find_spec("fused_layer_norm_cuda"):
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        found["apex"] = lambda t: fused_rms_norm_affine(t["x"], t["weight"], t["weight"].shape, EPS)
    if importlib.util.find_spec("transformer_engine"):
        from transformer_engine.pytorch import RMSNorm

        @functools.cache
        def module(width: int, dtype: torch.dtype) -> torch.nn.Module:
            return RMSNorm(width, eps=EPS, params_dtype=dtype, device="cuda")

        def run(t: Inputs) -> torch.Tensor:
            layer = module(t["x"].shape[-1], t["x"].dtype)
            return torch.func.functional_call(layer, {"weight": t["weight"]}, (t["x"],))

        found["transformer_engine"] = run
    return found


def activation_operations(rows: int, ffn: int) -> list[Operation]:
    def eager_swiglu(t):
        gate, up = t["packed"].chunk(2, dim=-1)
        return F.silu(gate) * up

    def eager_gelu(t):
        return F.gelu(t["x"] + t["bias"], approximate="tanh")

    def call(module, t):
        return module.swiglu(t["packed"])

    tensor = 2 * rows * ffn
    return [
        Operation(
            "swiglu", f"{rows}x2x{ffn}", lambda draw, count: {"packed": draw(count, 2 * ffn)}, rows,
            _with_rivals(functools.partial(call, activation), eager_swiglu, "swiglu", call), 3 * tensor, 5 * tensor,
        ),
        Operation(
            "bias_gelu", f"{rows}x{ffn}", lambda draw, count: {"x": draw(count, ffn), "bias": draw(ffn)}, rows,
            {
                "ours": lambda t: activation.gelu_tanh(t["x"], t["bias"]),
                "eager": eager_gelu,
                "compile": torch.compile(eager_gelu, dynamic=False),
            },
            2 * tensor, 3 * tensor,
        ),
    ]  # fmt: skip


def rope_operations(rows: int, heads: int, groups: int, head_dim: int, pad: int) -> list[Operation]:
    packed_width, out_width = (heads + 2 * groups) * head_dim, (heads + 2 * groups) * pad
    sizes = {"num_heads": heads, "num_kv_heads": groups, "head_dim": head_dim, "pad_to": pad}

    def inputs(draw: Draw, count: int) -> Inputs:
        length = min(2048, count)
        angles = draw(length, head_dim // 2).float()
        return {"qkv": draw(length, count // length, packed_width), "_cos": angles.cos(), "_sin": angles.sin()}

    def turn(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        cos, sin = cos[:, None, None].to(x.dtype), sin[:, None, None].to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def eager(t):
        grouped = t["qkv"].unflatten(-1, (groups, heads // groups + 2, head_dim))
        q, k, v = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
        q, k = turn(q, t["_cos"], t["_sin"]), turn(k, t["_cos"], t["_sin"])
        return tuple(F.pad(part, (0, pad - head_dim)) for part in (q, k, v))

    def call(module, t):
        return module.rope_qkv(t["qkv"], t["_cos"], t["_sin"], **sizes)

    moved = 2 * rows * (packed_width + out_width)
    everyone = _with_rivals(functools.partial(call, rope), eager, "rope_qkv", call)
    shape = f"{rows} tokens, {heads}/{groups} heads of {head_dim} to {pad}"
    return [Operation("rope_qkv", shape, inputs, rows, everyone, moved, moved)]


def head_operations(rows: int, hidden: int, vocab: int, teacher: int) -> list[Operation]:
    def inputs(draw: Draw, count: int) -> Inputs:
        labels = (draw(count).float().abs() * vocab).long() % vocab
        return {"hidden": draw(count, hidden), "weight": draw(vocab, hidden) * 0.02, "_labels": labels}

    def both(draw: Draw, count: int) -> Inputs:
        more = {"_teacher_hidden": draw(count, teacher), "_teacher_weight": draw(vocab, teacher) * 0.02}
        return inputs(draw, count) | more

    def whole(t: Inputs) -> torch.Tensor:
        logits = F.linear(t["hidden"], t["weight"])
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), t["_labels"])

    def whole_kl(t: Inputs) -> torch.Tensor:
        student, target = F.linear(t["hidden"], t["weight"]), F.linear(t["_teacher_hidden"], t["_teacher_weight"])
        wide = torch.promote_types(student.dtype, torch.float32)
        log_q, log_p = student.to(wide).log_softmax(-1), target.to(wide).log_softmax(-1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def fused_kl(t: Inputs) -> torch.Tensor:
        return dispatch.linear_kl(t["hidden"], t["weight"], t["_teacher_hidden"], t["_teacher_weight"]).mean()

    def whole_head(t: Inputs) -> dict:
        everything = torch.ones_like(t["_labels"], dtype=torch.bool)
        shard = Shard(start=0, valid=vocab, vocab_size=vocab, group=None)
        return {"counted": everything, "shard": shard, "per_token_grad": False}

    def rival(module, t: Inputs) -> torch.Tensor:
        return module.linear_cross_entropy(t["hidden"], t["weight"], t["_labels"], z_loss=0.0, **whole_head(t)).mean()

    def rival_kl(module, t: Inputs) -> torch.Tensor:
        return module.linear_kl(
            t["hidden"], t["weight"], t["_teacher_hidden"], t["_teacher_weight"],
            temperature=1.0, kind="forward", alpha=1.0, **whole_head(t),
        ).mean()  # fmt: skip

    def fused(t: Inputs) -> torch.Tensor:
        return dispatch.linear_cross_entropy(t["hidden"], t["weight"], t["_labels"]).mean()

    shape = f"{rows}x{hidden}x{vocab}"
    products = 6 * rows * hidden * vocab
    heads = _with_rivals(fused, whole, "linear_cross_entropy", rival)
    kls: dict[str, Function] = {"ours": fused_kl, "eager": whole_kl, "compile": torch.compile(whole_kl, dynamic=False)}
    if (liger := _rival("liger")) is not None:
        kls["liger"] = functools.partial(rival_kl, liger)
    return [
        Operation("linear_cross_entropy", shape, inputs, rows, heads, flops=products),
        Operation(
            "linear_kl", f"{shape}, teacher {teacher}", both, rows, kls, flops=products + 2 * rows * teacher * vocab
        ),
    ]
