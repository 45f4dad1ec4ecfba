"""The sections of a recipe about stages of shared weights and teachers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from megatron_inherit.config.section import Count, Part, Positive, Rate, Real, Section, Text


def _plan(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Plan = Annotated[Text, BeforeValidator(_plan)]
"""A stage plan as ``sharing.stage_plan.parse_plan`` reads it; YAML takes ``8`` for a number."""


class UntieStep(Section):
    """When shared stages are split; a step, or a patience.

    Attributes:
        plan: The finer stage plan.
        step: After so many steps.
        patience: After so many evaluations in a row without a better validation loss.
        improvement: Nats by which a loss must be lower to be better.
    """

    plan: Plan
    step: Positive | None = None
    patience: Positive | None = None
    improvement: Real = 0.0


class SoftTieSection(Section):
    """Pulls the layers of an ordinary model towards the mean of their stage.

    Attributes:
        plan: Which layers belong together.
        weight: Of the penalty.
        kind: ``l2`` of the distances, or ``group_lasso``, which makes whole differences vanish.
        fade_steps: Steps in which the weight falls to nothing; 0 keeps it.
    """

    plan: Plan
    weight: Rate
    kind: Literal["l2", "group_lasso"] = "l2"
    fade_steps: Count = 0


class SharingSection(Section):
    """Layers that apply the same weights (SWS); a learngene as ``model.path`` brings its own plan.

    Attributes:
        plan: Stage plan, for instance ``3,3,4,3,3``; default that of the model. A stage starts as its first layer.
        allow_cross_rank: A stage may lie on several pipeline ranks, at the price of an all-reduce a step.
        gradient: ``sum`` is what a weight used k times gets; ``mean`` divides by k before clipping.
        guard_every_steps: Steps between comparisons of the copies of a stage on several ranks.
        untie: Splits of the stages while the run goes on, coarse to fine.
        gates: Each layer learns a factor for its attention and one for its MLP.
        low_rank: Rank of the factors that each layer adds to its stage's matrices.
        soft_tie: A pull between the layers of a descendant, or none.
        keep_zeros: A pruned learngene's zeros stay zero in training.
    """

    plan: Plan | None = None
    allow_cross_rank: bool = False
    gradient: Literal["sum", "mean"] = "sum"
    guard_every_steps: Positive = 100
    untie: tuple[UntieStep, ...] = ()
    gates: bool = False
    low_rank: Count = 0
    soft_tie: SoftTieSection | None = None
    keep_zeros: bool = False


class DistillSection(Section):
    """A teacher to learn from; without one the next token is learnt.

    Attributes:
        teacher: Folder of any checkpoint format.
        cache: Its targets made by ``minherit share cache``, instead of running it.
        alpha: Share of the divergence, the rest is cross-entropy; 1 is the SWS paper's.
        alpha_end, alpha_steps: Share to which alpha moves in a straight line, and in how many steps.
        temperature: Softens both distributions.
        kind: ``forward`` KL(teacher, student), ``reverse`` or ``jsd``.
        hidden_weight: Of the distance of hidden states at the ends of the stages.
        hidden_kind: That distance.
    """

    teacher: Text | None = None
    cache: Text | None = None
    alpha: Part = 1.0
    alpha_end: Part | None = None
    alpha_steps: Count = 0
    temperature: Rate = 1.0
    kind: Literal["forward", "reverse", "jsd"] = "forward"
    hidden_weight: Real = 0.0
    hidden_kind: Literal["mse", "cosine"] = "mse"
