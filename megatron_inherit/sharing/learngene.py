"""Learngenes: planned from a teacher, or taken out of a trained auxiliary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megatron_inherit.arch.tensors import TensorSpec, enumerate_tensors
from megatron_inherit.base.errors import ConfigError, UsageError
from megatron_inherit.checkpoint.formats.hf_config import student_config, write_config
from megatron_inherit.checkpoint.stages import KEY
from megatron_inherit.checkpoint.stream import Source
from megatron_inherit.inherit.inheritune import fresh_op
from megatron_inherit.plan.convert import copy_op, origin_of
from megatron_inherit.plan.ops import Compute, Op, Tie
from megatron_inherit.plan.plan import Layout, TransferPlan
from megatron_inherit.sharing.stage_plan import StagePlan, require_cover
from megatron_inherit.sharing.tensors import component_of, stored_name

Start = Literal["random", "stepwise", "average", "lower", "first"]
STARTS: tuple[Start, ...] = ("random", "stepwise", "average", "lower", "first")


def plan_of(source: Source) -> StagePlan | None:
    """Gives the stage plan of a learngene or of a shared training checkpoint, None for an ordinary model."""
    ids = source.details.get(KEY)
    return None if ids is None else StagePlan.from_json(ids)


def require_plan(source: Source) -> StagePlan:
    """Gives the stage plan of a source.

    Raises:
        UsageError: The source is an ordinary model.
    """
    plan = plan_of(source)
    if plan is None:
        raise UsageError(
            f"{source.path} ({source.format}) has no shared stages.",
            fix="Give a learngene, or a checkpoint of a run that trained one.",
        )
    return plan


def plan_extraction(source: Source, *, dtype: str | None = None) -> TransferPlan:
    """Plans the learngene of a trained auxiliary: its stages, embeddings, final norm, head and plan.

    Args:
        source: A shared training checkpoint, or a learngene.
        dtype: Type of all weights, safetensors name; default the source's.

    Raises:
        UsageError: The source shares nothing.
    """
    plan = require_plan(source)
    if source.own:
        raise ConfigError(
            f"Layers of {source.path} have gates or low-rank factors of their own, which no learngene holds.",
            fix="Expand the run itself: minherit share expand RUN OUT --depth L.",
        )
    title = f"the learngene of {source.path}: {plan.num_stages} stages of {plan}"
    return _planned(source, plan, title, lambda spec: copy_op(spec.name, spec.name, source, dtype))


def plan_auxiliary(
    teacher: Source, plan: StagePlan, *, start: Start = "random", dtype: str | None = None, seed: int = 0
) -> TransferPlan:
    """Plans an auxiliary before its distillation, as a learngene folder.

    ``random`` draws everything, as the paper does. The others take the teacher's embeddings, final norm and head, and
    for each stage the teacher's layer nearest its centre (``stepwise``), the mean of its layers (``average``), the
    first of them (``lower``), or the teacher's first layers in order (``first``, the link to Inheritune). Stepwise and
    average are those of Relaxed Recursive Transformers (Bae et al., ICLR 2025).

    Args:
        teacher: An ordinary model of the auxiliary's width.
        plan: The auxiliary's stages.
        start: Where the stages come from.
        dtype: Type of all weights, safetensors name; default the teacher's.
        seed: Of random values.

    Raises:
        ConfigError: The start is unknown, or the teacher has fewer layers than the plan has stages (``first``).
    """
    if start not in STARTS:
        raise ConfigError(f"Unknown start {start!r} of an auxiliary.", expected=f"one of {', '.join(STARTS)}")
    config = teacher.config.with_layers(plan.num_layers)
    require_cover(plan, config)

    def make(spec: TensorSpec) -> Op:
        if start == "random":
            return fresh_op(spec, config, dtype=dtype or teacher.find("embed.weight").dtype, seed=seed)
        if spec.layer is None:
            return copy_op(spec.name, spec.name, teacher, dtype)
        inside = spec.name.split(".", 2)[2]
        component = component_of(inside)
        physical = plan.ids(component)[spec.layer]
        layers = [physical] if start == "first" else teacher_layers(plan, component, physical, teacher)
        names = [f"layers.{layer}.{inside}" for layer in layers]
        if start != "average" or len(names) == 1:
            chosen = names[(len(names) - 1) // 2] if start == "stepwise" else names[0]
            return copy_op(spec.name, chosen, teacher, dtype)
        kind = dtype or teacher.find(names[0]).dtype
        return Compute(target=spec.name, shape=spec.shape, dtype=kind, function="mean", sources=tuple(names))

    most = max(plan.num_physical(component) for component in ("attn", "mlp", "norm"))
    if start == "first" and most > teacher.config.num_layers:
        raise ConfigError(
            "The plan has more physical layers than the teacher.", got=f"{most} of {teacher.config.num_layers}"
        )
    title = f"an auxiliary of {plan} from {teacher.path}, stages {start}"
    return _planned(teacher, plan, title, make, seed=seed)


def teacher_layers(plan: StagePlan, component: Any, physical: int, teacher: Source) -> list[int]:
    """Lists the teacher's layers at the depths where a physical component is used, ascending."""
    depth, all_layers = plan.num_layers, teacher.config.num_layers
    uses = set(plan.uses(component, physical))
    found = [layer for layer in range(all_layers) if layer * depth // all_layers in uses]
    return found or sorted({use * all_layers // depth for use in uses})


def _planned(source: Source, plan: StagePlan, title: str, make: Any, *, seed: int = 0) -> TransferPlan:
    """Gives each stored tensor its operation once; further layers that use it are tied to the first."""
    config = source.config.with_layers(plan.num_layers)
    first: dict[str, Op] = {}
    ops: list[Op] = []
    for spec in enumerate_tensors(config):
        name = stored_name(spec.name, plan)
        if name in first:
            ops.append(Tie(target=spec.name, shape=spec.shape, dtype=first[name].dtype, to=first[name].target))
        else:
            first[name] = make(spec)
            ops.append(first[name])
    used = {name for op in ops for name in op.inputs}
    origin = origin_of(source)
    return TransferPlan(
        title=title,
        config=config,
        layout=Layout(format="learngene"),
        ops=tuple(ops),
        origin=origin,
        dropped={name: _reason(name) for name in origin.tensors if name not in used},
        hf_config=shared_config(source, plan, ops[0].dtype),
        seed=seed,
    ).check()


def _reason(name: str) -> str:
    return "not taken by a stage" if name.startswith("layers.") else "drawn anew"


def shared_config(source: Source, plan: StagePlan, dtype: str) -> Mapping[str, Any]:
    """Gives the ``config.json`` of a model with shared stages."""
    config = source.config.with_layers(plan.num_layers)
    if source.hf_config is None:
        raw = write_config(config, dtype)
    else:
        depth: Sequence[int] = [layer * source.config.num_layers // plan.num_layers for layer in range(plan.num_layers)]
        raw = student_config(source.hf_config, config, depth, dtype)
    return raw | {KEY: plan.to_json()}
