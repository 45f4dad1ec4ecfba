"""How a run shares its layers; what engines and recipes pass on, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.sharing.partition import Partition, partition
from megatron_inherit.sharing.stage_plan import StagePlan
from megatron_inherit.sharing.tensors import count_own, count_shared


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Which layers apply the same weights, and how a pipeline keeps them the same.

    Attributes:
        plan: The stages.
        allow_cross_rank: A stage may lie on several pipeline ranks.
        gradient: ``sum`` is what a weight used k times gets; ``mean`` divides by k before clipping.
        guard_every_steps: Steps between comparisons of the copies of a stage on several ranks.
        gates: Each layer has a learned factor for its attention and one for its MLP.
        low_rank: Rank of the factors that each layer adds to its stage's matrices; 0 for none.
    """

    plan: StagePlan
    allow_cross_rank: bool = False
    gradient: Literal["sum", "mean"] = "sum"
    guard_every_steps: int = 100
    gates: bool = False
    low_rank: int = 0

    @property
    def relaxed(self) -> bool:
        """Tells whether layers have something of their own."""
        return self.gates or self.low_rank > 0

    def parameters(self, config: ModelConfig) -> int:
        """Counts what is stored and trained: each stage once, and what layers have of their own."""
        own = count_own(config, gates=self.gates, low_rank=self.low_rank)
        return count_shared(config, self.plan).unique + own

    def partition(self, pipeline: int, chunks: int = 1) -> Partition:
        """Lays the stages over pipeline ranks.

        Raises:
            ConfigError: A stage would have to be cut where it may not be.
        """
        return partition(self.plan, pipeline, chunks, allow_cross_rank=self.allow_cross_rank)
