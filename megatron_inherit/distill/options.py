"""What a distillation needs before there is a model: the mixture, and a teacher's checkpoint or cached targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_inherit.distill.losses import Mix, require_pairs_on_one_rank

if TYPE_CHECKING:
    from megatron_inherit.checkpoint.stream import Source
    from megatron_inherit.distill.cache import CachedTargets
    from megatron_inherit.distill.objective import Distillation
    from megatron_inherit.model.language_model import LanguageModel
    from megatron_inherit.sharing.partition import Partition
    from megatron_inherit.sharing.stage_plan import StagePlan


@dataclass(frozen=True, kw_only=True)
class Distill:
    """A distillation to come; exactly one of teacher and cache is given.

    Attributes:
        mix: Weights of the terms.
        teacher: Opened checkpoint of the teacher.
        cache: Targets that it made before.
    """

    mix: Mix = field(default_factory=Mix)
    teacher: Source | None = None
    cache: CachedTargets | None = None

    def build_teacher(
        self, parallel: Any, groups: Any, device: Any, *, layout: Partition, **fields: Any
    ) -> list[LanguageModel] | None:
        """Builds this rank's part of the teacher, cut where its student is; None with a cache.

        Args:
            parallel: How the student is cut.
            groups: Its process groups.
            device: Where the teacher lives.
            layout: The student's pipeline chunks.
            fields: ``dtype`` and further fields of the model's configuration.
        """
        if self.teacher is None:
            return None
        from megatron_inherit.distill.teacher import build_teacher, teacher_partition

        cut = teacher_partition(self.teacher.config.num_layers, layout)
        if self.mix.hidden_weight:
            require_pairs_on_one_rank(layout, cut)
        return build_teacher(self.teacher, parallel, groups, device, partition=cut, **fields)

    def objective(
        self, student: Sequence[LanguageModel], teacher: list[LanguageModel] | None, plan: StagePlan | None
    ) -> Distillation:
        """Makes what the engine minimises, with its comparisons in the student's layers."""
        from megatron_inherit.distill.objective import Distillation

        made = Distillation(self.mix, teacher=teacher, cache=self.cache, plan=plan)
        made.attach(student)
        return made
