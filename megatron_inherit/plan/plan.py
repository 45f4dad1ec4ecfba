"""The transfer plan: everything that will happen to every tensor, as a value that is checked before a byte is read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import tensor_table
from megatron_inherit.base.errors import PlanError
from megatron_inherit.checkpoint.extents import ITEM_SIZES
from megatron_inherit.plan.functions import function
from megatron_inherit.plan.ops import Compute, Copy, Op, Tie, op_from_json

VERSION = 1
_STEP_FOLDER = re.compile(r"step_0*(\d+)")


def checkpoint_name(path: str) -> str:
    """Names a checkpoint for people: ``RUN/checkpoints/step_00000600`` is ``RUN at step 600``."""
    *above, last = path.rstrip("/").split("/")
    step = _STEP_FOLDER.fullmatch(last)
    if step is None or len(above) < 2:
        return last
    run = above[-2] if above[-1] == "checkpoints" else above[-1]
    return f"{run} at step {step[1]}"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint a plan reads.

    Attributes:
        path: As the user named it.
        format: Its format.
        config: Its model.
        identity: Hash of each header, index and configuration that was read.
        licence: Its licence, if it tells.
        tensors: Shape of every tensor it holds, by canonical name.
    """

    path: str
    format: str
    config: ModelConfig
    identity: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Last part of the path; for a checkpoint of a run, the run's folder and the step."""
        return checkpoint_name(self.path)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the output is laid out; ``checkpoint.stream.SinkOptions`` says what each field means."""

    format: str = "hf"
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    vocab_multiple: int = 128
    max_shard_bytes: int = 5_000_000_000
    dialect: str = ""
    iteration: int = 0
    adam: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """A checkpoint that will be written, tensor by tensor.

    Attributes:
        title: One line for people.
        config: The output's model.
        layout: Its format and parallel layout.
        ops: One operation for each tensor of the output, in its order.
        origin: What is read; None where everything is drawn or comes from files.
        dropped: Tensors of the origin that are left out, with the reason.
        layer_map: The origin's block for each block of the output, where blocks are taken whole.
        stages: The learngene's stage for each block, of a descendant.
        hf_config: ``config.json`` of the output, for formats that carry one.
        seed: Of all draws.
    """

    title: str
    config: ModelConfig
    layout: Layout
    ops: tuple[Op, ...]
    origin: Origin | None = None
    dropped: Mapping[str, str] = field(default_factory=dict)
    layer_map: tuple[int, ...] | None = None
    stages: tuple[int, ...] | None = None
    hf_config: Mapping[str, Any] | None = None
    seed: int = 0

    @property
    def dtypes(self) -> dict[str, str]:
        """Type of each tensor of the output."""
        return {op.target: op.dtype for op in self.ops}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the output's tensors, containers and replicas left out."""
        return sum(math.prod(op.shape) * ITEM_SIZES[op.dtype] for op in self.ops)

    def check(self) -> TransferPlan:
        """Gives the plan itself if it is total.

        Raises:
            PlanError: A tensor of the output has no source or two, one of the origin is unaccounted for, or shapes
                disagree.
        """
        _check_targets(self)
        _check_inputs(self)
        return self

    def fingerprint(self) -> str:
        """Hashes the plan."""
        return hashlib.blake2b(json.dumps(self.to_json(), sort_keys=True).encode(), digest_size=16).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Gives plain values; ``from_json`` reverses it."""
        value = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        value |= {"config": self.config.to_json(), "layout": dataclasses.asdict(self.layout)}
        value |= {"ops": [op.to_json() for op in self.ops], "dropped": dict(self.dropped)}
        if self.origin is not None:
            value["origin"] = dataclasses.asdict(self.origin)
        return {"version": VERSION} | value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TransferPlan:
        """Reads what ``to_json`` gave.

        Raises:
            PlanError: It comes from another version.
        """
        fields = dict(value)
        if fields.pop("version", None) != VERSION:
            raise PlanError("The plan was written by another version.", got=value.get("version"), expected=VERSION)
        fields["config"] = ModelConfig.from_json(fields["config"])
        fields["layout"] = Layout(**{**fields["layout"], "adam": tuple(fields["layout"].get("adam", ()))})
        fields["ops"] = tuple(op_from_json(op) for op in fields["ops"])
        if fields["origin"] is not None:
            origin = dict(fields["origin"]) | {"config": ModelConfig.from_json(fields["origin"]["config"])}
            origin["tensors"] = {name: tuple(shape) for name, shape in origin["tensors"].items()}
            fields["origin"] = Origin(**origin)
        for name in ("layer_map", "stages"):
            fields[name] = None if fields.get(name) is None else tuple(fields[name])
        return cls(**fields)


def describe_layers(layers: Sequence[int]) -> str:
    """Writes a layer list shortly: ``0-7``, ``0-3, 8, 8``."""
    parts: list[str] = []
    first = 0
    for at in range(1, len(layers) + 1):
        if at == len(layers) or layers[at] != layers[at - 1] + 1:
            low, high = layers[first], layers[at - 1]
            parts.append(str(low) if low == high else f"{low}-{high}")
            first = at
    return ", ".join(parts)


def describe_blocks(plan: TransferPlan) -> tuple[str, str] | None:
    """Names where the blocks come from, and writes it; None where they are not taken whole.

    A descendant's are stages in the form that ``--place`` takes: ``0,0,0,1,1,1``.
    """
    if plan.origin is None or plan.layer_map is None:
        return None
    if plan.stages is not None:
        return "stages", ",".join(map(str, plan.stages))
    return "blocks", f"{describe_layers(range(len(plan.layer_map)))} <- {describe_layers(plan.layer_map)}"


def count_kinds(ops: Iterable[Op]) -> dict[str, int]:
    """Counts the operations by kind."""
    return dict(Counter(op.kind for op in ops))


def _check_targets(plan: TransferPlan) -> None:
    table = tensor_table(plan.config)
    seen = Counter(op.target for op in plan.ops)
    for name in table:
        if name not in seen:
            raise PlanError(f"The plan gives {name} of the output no source.")
    for op in plan.ops:
        spec = table.get(op.target.rpartition(":")[2])
        if spec is None:
            raise PlanError(f"The plan writes {op.target}, which is no tensor of the output.")
        if seen[op.target] > 1:
            raise PlanError(f"The plan gives {op.target} of the output {seen[op.target]} sources.")
        if op.shape != spec.shape:
            raise PlanError(f"The plan gives {op.target} the wrong shape.", got=op.shape, expected=spec.shape)


def _check_inputs(plan: TransferPlan) -> None:
    have = dict(plan.origin.tensors) if plan.origin else {}
    weights = {op.target: op for op in plan.ops}
    used: set[str] = set()
    for op in plan.ops:
        for name in op.inputs:
            if name not in have:
                raise PlanError(f"{op.target} asks for {name}, which the source does not have.")
            used.add(name)
        if isinstance(op, Copy):
            shape = have[op.source] if op.box is None else tuple(stop - start for start, stop in op.box)
            if shape != op.shape:
                raise PlanError(f"{op.target} cannot be copied from {op.source}.", got=shape, expected=op.shape)
        elif isinstance(op, Tie):
            other = weights.get(op.to)
            if other is None or isinstance(other, Tie) or other.shape != op.shape:
                raise PlanError(f"{op.target} cannot be the same as {op.to}.")
        elif isinstance(op, Compute):
            function(op.function)
    for name in have:
        if name not in used and name not in plan.dropped:
            raise PlanError(f"Tensor {name} of the source is neither used nor listed as dropped.")
        if name in used and name in plan.dropped:
            raise PlanError(f"Tensor {name} of the source is used and listed as dropped.")
