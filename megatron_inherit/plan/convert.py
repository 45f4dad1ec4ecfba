"""The planner of ``minherit convert``, and the pieces that all planners share: everything is copied, nothing chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.base.errors import CheckpointError, PlanError, UsageError
from megatron_inherit.checkpoint.formats.hf_config import student_config, write_config
from megatron_inherit.checkpoint.provenance import read_provenance
from megatron_inherit.checkpoint.stream import Source, StoredTensor
from megatron_inherit.plan.ops import Copy
from megatron_inherit.plan.plan import Layout, Origin, TransferPlan

WITH_OPTIMIZER = ("ds_universal", "torch_dist")
"""Formats whose sinks take fp32 weights and moments."""
_FORMAT_WORDS = {"native": "training checkpoint"}


def plan_conversion(
    source: Source, *, layout: Layout | None = None, dtype: str | None = None, optimizer: bool = False
) -> TransferPlan:
    """Plans the same model in another format, layout or type.

    Args:
        source: The opened checkpoint.
        layout: Format and layout of the output; default a Hugging Face folder.
        dtype: Type of all weights, safetensors name; default each tensor's own.
        optimizer: Takes fp32 weights and moments along.

    Raises:
        PlanError: Optimizer state is asked for and the checkpoint has none.
    """
    layout, dtype = settle_layout(layout or Layout(), dtype, source, optimizer=optimizer)
    ops = [copy_op(spec.name, spec.name, source, dtype) for spec in enumerate_tensors(source.config)]
    if optimizer:
        ops += optimizer_ops({op.target: op.source for op in ops}, source)
    origin = origin_of(source, optimizer=optimizer)
    return TransferPlan(
        title=f"the model of {origin.name} ({_FORMAT_WORDS.get(source.format, source.format)}) as {layout.format}",
        config=source.config,
        layout=layout,
        ops=tuple(ops),
        origin=origin,
        layer_map=tuple(range(source.config.num_layers)),
        hf_config=output_config(source, source.config, range(source.config.num_layers), ops[0].dtype),
    ).check()


def settle_layout(layout: Layout, dtype: str | None, source: Source, *, optimizer: bool) -> tuple[Layout, str | None]:
    """Settles what the output's format or the optimizer's state dictates.

    A universal checkpoint holds fp32 weights. Moments are worth nothing without the number of steps behind them, which
    travels as the iteration; Adam's settings go along where they are known.

    Args:
        layout: As asked for.
        dtype: As asked for.
        source: The checkpoint.
        optimizer: Its optimizer state is taken along.

    Raises:
        UsageError: The format has no place for optimizer state, or another number of steps is asked for.
    """
    if optimizer and source.optimizer and layout.format not in WITH_OPTIMIZER:
        raise UsageError(
            f"The format {layout.format} holds weights only.",
            fix=f"Leave --optimizer keep out, or write --format {' or '.join(WITH_OPTIMIZER)}.",
        )
    if layout.format == "ds_universal" and dtype is None:
        dtype = "F32"
    if optimizer:
        step = int(source.details.get("optimizer_step") or source.details.get("iteration") or 0)
        if layout.iteration not in (0, step):
            raise UsageError(
                f"--iteration {layout.iteration} would be taken for the number of updates behind the moments.",
                expected=step,
                fix="Leave --iteration out: the number goes along with the optimizer state.",
            )
        layout = dataclasses.replace(layout, iteration=step, adam=tuple(source.details.get("adam") or ()))
    return layout, dtype


def copy_op(target: str, name: str, source: Source, dtype: str | None, key: str = "") -> Copy:
    """Makes the operation that copies a tensor of a source.

    Args:
        target: Canonical name in the output.
        name: Canonical name in the source.
        source: The checkpoint.
        dtype: Type of the target; default that of the tensor.
        key: Kind of optimizer state, or empty for a weight.
    """
    prefix = f"{key}:" if key else ""
    stored = source.find(prefix + name)
    return Copy(
        target=prefix + target,
        shape=stored.shape,
        dtype=dtype or stored.dtype,
        source=prefix + name,
        source_dtype=stored.dtype,
        decoded=_decoded(stored),
    )


def optimizer_ops(sources: Mapping[str, str], source: Source) -> list[Copy]:
    """Copies the optimizer state of tensors that are copied.

    Args:
        sources: The source's tensor of each target.
        source: The checkpoint.

    Raises:
        PlanError: The source has no optimizer state.
        CheckpointError: It has, in a layout that cannot be taken apart, or of other parameters than the weights.
    """
    kinds = sorted({key.partition(":")[0] for key in source.optimizer})
    if not kinds and source.details.get("optimizer_note"):
        raise CheckpointError(
            f"The optimizer state of {source.path} ({source.format}) cannot be taken along.",
            fix=str(source.details["optimizer_note"]),
        )
    if not kinds:
        raise PlanError(
            f"{source.path} ({source.format}) has no optimizer state that can be taken along.",
            fix="Leave --optimizer keep out, or give a DeepSpeed or Megatron checkpoint that has it.",
        )
    if source.own:
        raise CheckpointError(
            f"The optimizer state of {source.path} is of shared stages and of what layers have beside them.",
            fix="Leave --optimizer keep out: the weights of a layer are both folded together, which have no moments.",
        )
    missing = sorted({"exp_avg", "exp_avg_sq"} - set(kinds))
    if missing:
        raise CheckpointError(
            f"The optimizer state of {source.path} ({source.format}) is not Adam's: it has no {missing[0]}.",
            fix="Leave --optimizer keep out.",
        )
    ops = [copy_op(target, name, source, None, kind) for target, name in sources.items() for kind in kinds]
    if "fp32" in kinds:
        return ops
    masters = (copy_op(target, name, source, "F32") for target, name in sources.items())  # trained in fp32: the same
    return ops + [dataclasses.replace(op, target=f"fp32:{op.target}") for op in masters]


def origin_of(source: Source, *, optimizer: bool = False) -> Origin:
    """Describes a source for a plan."""
    tensors = dict(source.tensors) | (dict(source.optimizer) if optimizer else {})
    return Origin(
        path=source.path,
        format=source.format,
        config=source.config,
        identity=dict(source.identity),
        licence=read_provenance(source)[1],
        tensors={name: stored.shape for name, stored in tensors.items()},
    )


def output_config(source: Source, config: ModelConfig, layers: Any, dtype: str) -> dict[str, Any]:
    """Gives the ``config.json`` of an output: the source's own, rewritten for depth and type, or a new one."""
    if source.hf_config is None:
        return write_config(config, dtype)
    return student_config(source.hf_config, config, list(layers), dtype)


def _decoded(stored: StoredTensor) -> str:
    if stored.decode is None:
        return ""
    arguments = ", ".join(f"{key} {value}" for key, value in stored.decode.arguments.items())
    return f"{stored.decode.name} {arguments}".strip()
