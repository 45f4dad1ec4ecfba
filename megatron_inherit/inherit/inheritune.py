"""The planner of ``minherit inherit``: chosen blocks of a teacher, what surrounds them, and what starts afresh.

Inheritune (Sanyal, Shwartz-Ziv, Dimakis, Sanghavi, arXiv:2404.08634) takes the first n blocks, the embeddings and the
head, and trains the student as usual. Here any list of blocks can be taken, and each role can be drawn anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_inherit.arch.families import Role
from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import TensorSpec, enumerate_tensors
from megatron_inherit.base.errors import UsageError
from megatron_inherit.checkpoint.formats.hf_config import write_config
from megatron_inherit.checkpoint.stream import Source
from megatron_inherit.plan.convert import copy_op, optimizer_ops, origin_of, output_config, settle_layout
from megatron_inherit.plan.init import STD
from megatron_inherit.plan.ops import Copy, Init, Op
from megatron_inherit.plan.plan import Layout, TransferPlan, describe_layers


def plan_inheritance(
    source: Source,
    *,
    layers: Sequence[int],
    reset: Sequence[Role] = (),
    as_published: bool = False,
    dtype: str | None = None,
    seed: int = 0,
    std: float = STD,
    layout: Layout | None = None,
    optimizer: bool = False,
) -> TransferPlan:
    """Plans a student.

    Args:
        source: The opened teacher.
        layers: The teacher's block for each block of the student, in any order, repeats allowed.
        reset: Roles that are drawn anew instead of inherited.
        as_published: Resets what the released Inheritune scripts do not copy (everything but the blocks and the head).
        dtype: Type of all weights, safetensors name; default that of each teacher tensor.
        seed: Of the fresh values.
        std: Their standard deviation; residual projections get ``std / sqrt(2 n)`` for n student blocks.
        layout: Format and layout of the output; default a Hugging Face folder.
        optimizer: Takes the optimizer state of inherited tensors along; that of fresh ones starts at zero.

    Raises:
        UsageError: The head is to be reset and is the embedding.
        PlanError: The plan would not be total.
    """
    layout, dtype = settle_layout(layout or Layout(), dtype, source, optimizer=optimizer)
    config = source.config.with_layers(len(layers))
    fresh = set(reset) | set(published_reset(config) if as_published else ())
    if config.tied and "head" in fresh and "embed" not in fresh:
        raise UsageError("--reset head: the head of this teacher is its embedding.", fix="Reset embed to reset both.")
    ops: list[Op] = []
    roles = {spec.role for spec in enumerate_tensors(config)}
    for spec in enumerate_tensors(config):
        origin = source_name(spec, layers)
        type_ = dtype or source.find(origin).dtype
        if spec.role in fresh:
            ops.append(fresh_op(spec, config, dtype=type_, seed=seed, std=std))
        else:
            ops.append(copy_op(spec.name, origin, source, type_))
    copies = {op.target: op.source for op in ops if isinstance(op, Copy)}
    if optimizer:
        ops += optimizer_ops(copies, source)
        ops += _fresh_state([op for op in ops if isinstance(op, Init)], source)
    used = {name for op in ops for name in op.inputs}
    origin_info = origin_of(source, optimizer=optimizer)
    return TransferPlan(
        title=_title(origin_info.name, source.config.num_layers, layers, fresh & roles, as_published),
        config=config,
        layout=layout,
        ops=tuple(ops),
        origin=origin_info,
        dropped={name: _reason(name, layers) for name in origin_info.tensors if name not in used},
        layer_map=tuple(layers),
        hf_config=output_config(source, config, layers, ops[0].dtype),
        seed=seed,
    ).check()


def plan_fresh(
    config: ModelConfig, *, seed: int = 0, dtype: str = "F32", std: float = STD, layout: Layout | None = None
) -> TransferPlan:
    """Plans a randomly initialised model without a teacher.

    Args:
        config: The model.
        seed: Of the values.
        dtype: Type of all weights, safetensors name.
        std: Standard deviation before the residual scaling.
        layout: Format and layout of the output; default a Hugging Face folder.
    """
    ops = tuple(fresh_op(spec, config, dtype=dtype, seed=seed, std=std) for spec in enumerate_tensors(config))
    return TransferPlan(
        title=f"a fresh {config.num_layers}-layer {config.family} model, seed {seed}",
        config=config,
        layout=layout or Layout(),
        ops=ops,
        hf_config=write_config(config, dtype),
        seed=seed,
    ).check()


def published_reset(config: ModelConfig) -> tuple[Role, ...]:
    """Names the roles that the released scripts leave random: they copy the blocks and ``lm_head`` alone.

    A tied embedding comes along as the head; positions and the final norm never do.
    """
    return ("pos_embed", "final_norm") if config.tied else ("embed", "pos_embed", "final_norm")


def source_name(spec: TensorSpec, layers: Sequence[int]) -> str:
    """Gives the teacher's tensor for a student's tensor."""
    if spec.layer is None:
        return spec.name
    return spec.name.replace(f"layers.{spec.layer}.", f"layers.{layers[spec.layer]}.", 1)


def fresh_op(spec: TensorSpec, config: ModelConfig, *, dtype: str, seed: int, std: float = STD) -> Init:
    """Makes the operation that draws a tensor of a model."""
    return Init(
        target=spec.name,
        shape=spec.shape,
        dtype=dtype,
        init=spec.init,
        std=std,
        num_layers=config.num_layers,
        seed=seed,
    )


def _fresh_state(inits: Sequence[Init], source: Source) -> list[Init]:
    """Gives fresh tensors their optimizer state: the same draw as fp32 weight, zero moments."""
    ops = []
    for kind in sorted({"fp32", *(key.partition(":")[0] for key in source.optimizer)}):
        for op in inits:
            fields = {name: getattr(op, name) for name in ("shape", "std", "num_layers", "seed")}
            init = op.init if kind == "fp32" else "zeros"
            ops.append(Init(target=f"{kind}:{op.target}", dtype="F32", init=init, **fields))
    return ops


def _reason(name: str, layers: Sequence[int]) -> str:
    parts = name.rpartition(":")[2].split(".")
    return "layer not chosen" if parts[0] == "layers" and int(parts[1]) not in layers else "reset"


def _title(name: str, depth: int, layers: Sequence[int], fresh: set[Role], as_published: bool) -> str:
    count = f"{len(layers)} block{'' if len(layers) == 1 else 's'}"
    words = [f"{count} out of the {depth} of {name}: {describe_layers(layers)}"]
    if as_published:
        words.append("as in the released Inheritune scripts (blocks and head only)")
    if fresh:
        words.append("fresh: " + ", ".join(sorted(fresh)))
    return "; ".join(words)
