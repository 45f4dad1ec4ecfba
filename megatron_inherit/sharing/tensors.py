"""Names and sizes of what a model with shared stages stores: ``sws.stages.{s}.*`` beside the common tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from megatron_inherit.arch.counts import count_parameters
from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import TensorSpec, enumerate_tensors
from megatron_inherit.checkpoint import stages
from megatron_inherit.checkpoint.stages import PREFIX
from megatron_inherit.sharing.stage_plan import Component, StagePlan, require_cover

if TYPE_CHECKING:
    from collections.abc import Callable


def component_of(inside: str) -> Component:
    """Tells which component's plan a tensor of a block follows, from its name inside the block."""
    return cast("Component", stages.component_of(inside))


def stored_name(name: str, plan: StagePlan) -> str:
    """Gives the stored tensor that a canonical one of the virtual model reads: ``layers.7.*`` -> ``sws.stages.2.*``."""
    return stages.stored_name(name, plan.to_json())


def first_user(name: str, plan: StagePlan) -> str:
    """Gives the canonical tensor of the first layer that reads the stored one; reverses ``stored_name``."""
    if not name.startswith(PREFIX):
        return name
    stage, _, inside = name.removeprefix(PREFIX).partition(".")
    return f"layers.{plan.uses(component_of(inside), int(stage))[0]}.{inside}"


def by_first_layer(read: Callable[..., Any], plan: StagePlan) -> Callable[..., Any]:
    """Turns a reader of canonical tensors into one of stored ones: a stage is what its first layer is.

    Args:
        read: Takes a TensorSpec or a name first, and anything after it.
        plan: The stages that ask, whatever the plan of the checkpoint behind ``read``.
    """

    def stored(what: TensorSpec | str, *more: Any) -> Any:
        if isinstance(what, str):
            return read(first_user(what, plan), *more)  # a layer's own tensors keep their names
        return read(dataclasses.replace(what, name=first_user(what.name, plan)), *more)

    return stored


def restoring(read: Callable[..., Any], plan: StagePlan, *, relaxed: bool) -> Callable[..., Any]:
    """Turns a reader of a stored state (name, kind, box) into one for a model with shared stages.

    Args:
        read: By canonical name.
        plan: The stages that ask.
        relaxed: Layers have something of their own, which must not be folded into the weights.
    """
    stored = by_first_layer(read, plan)
    if not relaxed:
        return stored
    return lambda name, kind, box: stored(name, stages.UNFOLDED if kind == "weight" else kind, box)


def enumerate_stored(config: ModelConfig, plan: StagePlan) -> tuple[TensorSpec, ...]:
    """Lists what an auxiliary model stores, each tensor once, in the order of first use.

    Args:
        config: The virtual model, as deep as the plan.
        plan: Its stages.
    """
    require_cover(plan, config)
    found: dict[str, TensorSpec] = {}
    for spec in enumerate_tensors(config):
        name = stored_name(spec.name, plan)
        found.setdefault(name, dataclasses.replace(spec, name=name))
    return tuple(found.values())


@dataclass(frozen=True)
class SharingCounts:
    """Parameters of a model with shared stages.

    Attributes:
        unique: What is stored, trained and reduced over the replicas.
        virtual: What a token passes; FLOPs and MFU follow it, since sharing saves no compute.
        layer: One layer's parameters.
        outside: Embeddings, final norm and head.
    """

    unique: int
    virtual: int
    layer: int
    outside: int

    @property
    def ratio(self) -> float:
        """Virtual over unique parameters."""
        return self.virtual / self.unique


def count_shared(config: ModelConfig, plan: StagePlan) -> SharingCounts:
    """Counts unique and virtual parameters."""
    unique = sum(spec.numel for spec in enumerate_stored(config, plan))
    virtual = count_parameters(config)
    outside = sum(spec.numel for spec in enumerate_tensors(config) if spec.layer is None)
    return SharingCounts(unique, virtual, (virtual - outside) // config.num_layers, outside)


def count_own(config: ModelConfig, *, gates: bool, low_rank: int) -> int:
    """Counts the parameters that layers have beside their stages: two gates each, and low-rank factors.

    Args:
        config: The virtual model.
        gates: Each layer has them.
        low_rank: Rank of the factors, 0 for none.
    """
    rows, columns = 0, {}
    for spec in enumerate_tensors(config):
        if spec.layer is not None and len(spec.shape) == 2:
            rows += spec.shape[0]
            matrix = spec.name.removeprefix(f"layers.{spec.layer}.").removesuffix(".weight")
            columns[spec.layer, stages.DOWN_OF[matrix]] = spec.shape[1]
    return 2 * gates * config.num_layers + low_rank * (rows + sum(columns.values()))


@dataclass(frozen=True)
class FamilyReport:
    """What a family of descendants costs, each ratio with its denominator.

    Attributes:
        depths: Of the descendants.
        stored: Parameters of the one auxiliary that initialises them all.
        separate: Sum of the descendants' parameters, what storing each pretrained model would take.
        auxiliary_steps, tuning_steps, scratch_steps: Optimizer steps of the auxiliary once, of each descendant, and of
            each model from scratch. The teacher's training and forward passes are in none of them.
    """

    depths: tuple[int, ...]
    stored: int
    separate: int
    auxiliary_steps: int
    tuning_steps: int
    scratch_steps: int

    @property
    def stored_ratio(self) -> float:
        """Parameters of all models stored separately over those of the auxiliary."""
        return self.separate / self.stored

    @property
    def step_ratio(self) -> float:
        """Steps from scratch of all depths over the auxiliary's steps and all tunings."""
        tuned = self.auxiliary_steps + len(self.depths) * self.tuning_steps
        return len(self.depths) * self.scratch_steps / tuned if tuned else float("inf")

    def __str__(self) -> str:
        n = len(self.depths)
        text = (
            f"{n} models of depth {self.depths[0]} to {self.depths[-1]}: {self.separate:,} parameters stored separately"
            f" / {self.stored:,} of the auxiliary = {self.stored_ratio:.2f}x"
        )
        if not self.scratch_steps:
            return text
        return text + (
            f"; steps: {n} x {self.scratch_steps} from scratch / ({self.auxiliary_steps} auxiliary + {n} x"
            f" {self.tuning_steps} tuning) = {self.step_ratio:.2f}x (the teacher's cost is in neither)"
        )


def family_report(
    config: ModelConfig,
    plan: StagePlan,
    depths: tuple[int, ...],
    *,
    auxiliary_steps: int = 0,
    tuning_steps: int = 0,
    scratch_steps: int = 0,
) -> FamilyReport:
    """Counts what a family of depths stores and trains.

    Args:
        config: The auxiliary's virtual model.
        plan: The auxiliary's stages.
        depths: Of the descendants.
        auxiliary_steps: Optimizer steps of the auxiliary's distillation.
        tuning_steps: Optimizer steps of each descendant.
        scratch_steps: Optimizer steps of each model from scratch.
    """
    separate = sum(count_parameters(config.with_layers(depth)) for depth in depths)
    stored = count_shared(config, plan).unique
    return FamilyReport(tuple(depths), stored, separate, auxiliary_steps, tuning_steps, scratch_steps)
