"""What a distillation minimises: a mixture of divergence, cross-entropy and distance of hidden states.

The divergences themselves are ``kernels.dispatch.linear_kl`` and ``linear_topk_kl``, which never hold whole logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_inherit.base.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from megatron_inherit.sharing.partition import Partition
    from megatron_inherit.sharing.stage_plan import StagePlan

Divergence = Literal["forward", "reverse", "jsd"]
Distance = Literal["mse", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Weights of the terms, a mean over the unmasked tokens: (1 - alpha) CE + alpha divergence + hidden_weight hidden.

    The defaults are the paper's: alpha 1 (no cross-entropy at all), temperature 1. The divergence is multiplied by the
    square of the temperature (Hinton et al. 2015), so that the gradient of the logits is tau (q - p) / n.

    Attributes:
        alpha: Share of the divergence at the start.
        alpha_end: Share at the end, reached in a straight line; None keeps ``alpha``.
        alpha_steps: Steps of the line.
        temperature: Softens both distributions in the divergence.
        kind: ``forward`` KL(teacher, student), ``reverse`` KL(student, teacher), ``jsd`` Jensen-Shannon.
        hidden_weight: Of the hidden states at the ends of the stages, averaged over the stages.
        hidden_kind: Their distance.
    """

    alpha: float = 1.0
    alpha_end: float | None = None
    alpha_steps: int = 0
    temperature: float = 1.0
    kind: Divergence = "forward"
    hidden_weight: float = 0.0
    hidden_kind: Distance = "mse"

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("alpha_end", self.alpha_end)):
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"distill.{name} must lie between 0 and 1.", got=value)
        if self.temperature <= 0:
            raise ConfigError("distill.temperature must be positive.", got=self.temperature)
        if self.alpha_end is not None and self.alpha_steps < 1:
            raise ConfigError(
                "distill.alpha_end needs the number of steps to reach it.", fix="Set distill.alpha_steps."
            )

    def alpha_at(self, step: int) -> float:
        """Gives the divergence's share at an optimizer step."""
        if self.alpha_end is None:
            return self.alpha
        return self.alpha + (self.alpha_end - self.alpha) * min(1.0, step / self.alpha_steps)


def hidden_distance(student: torch.Tensor, teacher: torch.Tensor, kind: Distance = "mse") -> torch.Tensor:
    """Compares hidden states: mean squared difference over the width, or one minus the cosine, a value a token.

    Args:
        student: [..., width].
        teacher: [..., width]; no gradient flows into it.
        kind: Which distance.

    Raises:
        ConfigError: The widths differ.
    """
    import torch

    if student.shape != teacher.shape:
        raise ConfigError(
            "Hidden states of student and teacher differ in shape.",
            got=f"{tuple(student.shape)} and {tuple(teacher.shape)}",
            fix="Match hidden states only between models of equal width, or set distill.hidden_weight to 0.",
        )
    wide, fixed = student.float(), teacher.detach().float()
    if kind == "cosine":
        return 1 - torch.cosine_similarity(wide, fixed, dim=-1)
    return (wide - fixed).square().mean(dim=-1)


def stage_ends(counts: Sequence[int], teacher_layers: int) -> tuple[int, ...]:
    """Gives the number of teacher layers that each stage's end is compared with: the same share of the depth, rounded.

    Args:
        counts: Repeats of each stage, in order.
        teacher_layers: Depth of the teacher.

    Returns:
        From 1 to ``teacher_layers`` for each stage.
    """
    depth, passed, ends = sum(counts), 0, []
    for count in counts:
        passed += count
        ends.append(max(1, round(teacher_layers * passed / depth)))
    return tuple(ends)


def hidden_pairs(plan: StagePlan, teacher_layers: int) -> tuple[tuple[int, int], ...]:
    """Pairs the ends of a student's stages with a teacher's layers, both as numbers of layers passed.

    Args:
        plan: The student's; where its stages do not follow one another every layer is an end.
        teacher_layers: Depth of the teacher.
    """
    counts = plan.counts if plan.contiguous else (1,) * plan.num_layers
    return tuple(zip(itertools.accumulate(counts), stage_ends(counts, teacher_layers), strict=True))


def require_pairs_on_one_rank(student: Partition, teacher: Partition) -> None:
    """Refuses pipelines on which a stage's end and the teacher's layer that it is compared with are on two ranks.

    Raises:
        ConfigError: They are, so that the comparison would be left out.
    """
    for mine, theirs in hidden_pairs(student.plan, teacher.plan.num_layers):
        if student.rank_of(mine - 1) != teacher.rank_of(theirs - 1):
            raise ConfigError(
                f"distill.hidden_weight: the stage that ends after layer {mine} is compared with the teacher after its "
                f"layer {theirs}, which lies on another pipeline rank.",
                got=f"pipeline ranks {student.rank_of(mine - 1)} and {teacher.rank_of(theirs - 1)}",
                fix="Set parallel.pp lower, take a deeper teacher, or set distill.hidden_weight to 0.",
            )
