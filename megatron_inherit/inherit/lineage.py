"""Where the tensors of a student came from, as the plan in its folder tells or as a layer list says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.stream import Source
from megatron_inherit.inherit.inheritune import source_name
from megatron_inherit.plan.execute import RECORD
from megatron_inherit.plan.ops import Copy
from megatron_inherit.plan.plan import TransferPlan


@dataclass(frozen=True)
class Lineage:
    """The teacher's tensor behind each tensor of a student.

    Attributes:
        layers: The teacher's block for each block of the student.
        sources: The teacher's tensor by the student's, for what was copied whole.
        others: Tensors of the student that have another origin, with it.
    """

    layers: tuple[int, ...]
    sources: Mapping[str, str]
    others: Mapping[str, str]


def recorded_lineage(teacher: Source, student: str) -> Lineage | None:
    """Reads the lineage from a student's folder.

    Returns:
        None where the folder tells of no plan, or of one that took another model than ``teacher`` or all of it.

    Raises:
        CheckpointError: The record is damaged.
    """
    path = Path(student) / RECORD
    if not path.is_file():
        return None
    try:
        plan = TransferPlan.from_json(json.loads(path.read_text())["plan"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no plan.", got=type(error).__name__) from error
    if plan.layer_map is None or not _is_origin(teacher, plan):
        return None
    weights = [op for op in plan.ops if ":" not in op.target]
    copies = {op.target: op.source for op in weights if isinstance(op, Copy) and op.box is None}
    if all(target == source for target, source in copies.items()) and len(copies) == len(teacher.tensors):
        return None
    others = {op.target: op.describe() for op in weights if op.target not in copies}
    return Lineage(plan.layer_map, copies, others)


def chosen_lineage(config: ModelConfig, layers: Sequence[int]) -> Lineage:
    """Gives the lineage of a student whose every tensor is its teacher's.

    Args:
        config: The student's model.
        layers: The teacher's block for each of its blocks.

    Raises:
        CheckpointError: The student has another number of blocks.
    """
    if len(layers) != config.num_layers:
        raise CheckpointError("The layers do not fit the student.", got=len(layers), expected=config.num_layers)
    return Lineage(tuple(layers), {spec.name: source_name(spec, layers) for spec in enumerate_tensors(config)}, {})


def _is_origin(teacher: Source, plan: TransferPlan) -> bool:
    """Tells whether a plan's teacher is this one, in whatever format: the very files, or a model only it can be."""
    if plan.origin is None:
        return False
    depth = plan.origin.config.num_layers
    same_files = dict(plan.origin.identity) == dict(teacher.identity)
    return same_files or depth == teacher.config.num_layers != plan.config.num_layers
