"""Lays a stage plan over pipeline ranks: which layers each holds, how even that is, what ties between ranks cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import ConfigError
from megatron_inherit.base.quantities import format_bytes
from megatron_inherit.sharing.stage_plan import COMPONENTS, Component, StagePlan
from megatron_inherit.sharing.tensors import PREFIX, component_of, enumerate_stored

GRADIENT_BYTES = 4
UNEVEN = 0.9
"""Balance below which the printout says what to do."""


@dataclass(frozen=True)
class Tie:
    """One physical component that several pipeline ranks hold a copy of.

    Attributes:
        component: ``attn``, ``mlp`` or ``norm``.
        physical: Its id in the component's plan.
        ranks: Pipeline ranks that hold it, ascending; the first owns it.
    """

    component: Component
    physical: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Partition:
    """Layers of each pipeline chunk.

    Attributes:
        plan: The stages.
        pipeline: Pipeline ranks.
        chunks: Chunks a rank (virtual pipeline size).
        bounds: First layer of each chunk and the depth at the end; chunk c is on rank c modulo ``pipeline``.
    """

    plan: StagePlan
    pipeline: int
    chunks: int
    bounds: tuple[int, ...]

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Layers ``[start, stop)`` of each chunk, in order of depth."""
        return tuple(zip(self.bounds[:-1], self.bounds[1:], strict=True))

    def layers_of(self, rank: int, chunk: int = 0) -> tuple[int, int]:
        """Gives the layers of one chunk of a rank."""
        return self.segments[chunk * self.pipeline + rank]

    @property
    def loads(self) -> tuple[int, ...]:
        """Virtual layers of each rank."""
        sizes = [stop - start for start, stop in self.segments]
        return tuple(sum(sizes[rank :: self.pipeline]) for rank in range(self.pipeline))

    @property
    def balance(self) -> float:
        """Mean over largest load: the share of time a rank computes, the bubble and the embeddings left out."""
        return sum(self.loads) / len(self.loads) / max(self.loads)

    @property
    def ties(self) -> tuple[Tie, ...]:
        """What more than one rank holds; empty where boundaries are aligned with stages."""
        found = []
        for component in COMPONENTS:
            for physical in range(self.plan.num_physical(component)):
                uses = self.plan.uses(component, physical)
                ranks = {self.rank_of(layer) for layer in uses}
                if len(ranks) > 1:
                    found.append(Tie(component, physical, tuple(sorted(ranks))))
        return tuple(found)

    def rank_of(self, layer: int) -> int:
        """Gives the pipeline rank of a layer."""
        return next(index for index, (_, stop) in enumerate(self.segments) if layer < stop) % self.pipeline

    def bubble(self, micro_batches: int) -> float:
        """Gives the idle share of a step of equal stages: (p - 1) / (v m + p - 1)."""
        return (self.pipeline - 1) / (self.chunks * micro_batches + self.pipeline - 1)

    def tie_bytes(self, config: ModelConfig) -> tuple[int, ...]:
        """Counts the bytes each rank sends a step to sum tied gradients: 2 (r - 1) / r of each tied fp32 tensor."""
        sizes: dict[tuple[str, int], int] = {}
        for spec in enumerate_stored(config, self.plan):
            if spec.name.startswith(PREFIX):
                stage, _, inside = spec.name.removeprefix(PREFIX).partition(".")
                key = (component_of(inside), int(stage))
                sizes[key] = sizes.get(key, 0) + spec.numel
        sent = [0] * self.pipeline
        for tie in self.ties:
            r = len(tie.ranks)
            for rank in tie.ranks:
                sent[rank] += 2 * (r - 1) * sizes[tie.component, tie.physical] * GRADIENT_BYTES // r
        return tuple(sent)

    def layout(self) -> str:
        """Writes the partition as Megatron-Core's pipeline layout: ``Ettt|ttt|tttL``."""
        words = ["t" * (stop - start) for start, stop in self.segments]
        words[0], words[-1] = "E" + words[0], words[-1] + "L"
        return "|".join(words)

    def describe(self, config: ModelConfig | None = None) -> str:
        """Writes the partition as a table, with what ties cost; their bytes where a model is given."""
        lines = ["rank  chunk  layers   stages"]
        for index, (start, stop) in enumerate(self.segments):
            stages = ",".join(str(stage) for stage in dict.fromkeys(self.plan.stages[start:stop]))
            span = f"{start}-{stop - 1}"
            lines.append(f"{index % self.pipeline:>4}  {index // self.pipeline:>5}  {span:<8} {stages}")
        lines.append(f"layout {self.layout()}")
        lines.append(f"balance {self.balance:.0%} (mean {sum(self.loads) / self.pipeline:.3g} / max {max(self.loads)})")
        if self.balance < UNEVEN:
            lines[-1] += ": ranks wait for the longest; equal stages, or several a rank, come out even"
        return "\n".join([*lines, *self._describe_ties(config)])

    def _describe_ties(self, config: ModelConfig | None) -> list[str]:
        if not self.ties:
            return ["tied gradients: none, each stage lies on one rank (0 B sent a rank and step)"]
        groups: dict[tuple[int, ...], list[str]] = {}
        for tie in self.ties:
            groups.setdefault(tie.ranks, []).append(f"{tie.component} {tie.physical}")
        lines = [f"tied on ranks {','.join(map(str, r))}: {', '.join(names)}" for r, names in sorted(groups.items())]
        if config is None:
            return [*lines, "tied gradients: their bytes need a model"]
        return [*lines, f"tied gradients: at most {format_bytes(max(self.tie_bytes(config)))} sent a rank and step"]

    def to_json(self, config: ModelConfig | None = None) -> dict[str, Any]:
        """Gives plain values for JSON: chunks, balance, ties, and with a model the bytes each rank sends a step."""
        chunks = [
            {"rank": i % self.pipeline, "chunk": i // self.pipeline, "layers": list(segment)}
            for i, segment in enumerate(self.segments)
        ]
        ties = [{"component": tie.component, "physical": tie.physical, "ranks": list(tie.ranks)} for tie in self.ties]
        found = {"chunks": chunks, "layout": self.layout(), "balance": self.balance, "ties": ties}
        return found if config is None else found | {"tie_bytes": list(self.tie_bytes(config))}


def aligned_cuts(plan: StagePlan) -> tuple[int, ...]:
    """Lists the depths at which nothing is shared between the layers before and after."""
    cuts = []
    for cut in range(1, plan.num_layers):
        pairs = ((set(plan.ids(c)[:cut]), set(plan.ids(c)[cut:])) for c in COMPONENTS)
        if all(before.isdisjoint(after) for before, after in pairs):
            cuts.append(cut)
    return tuple(cuts)


def partition(plan: StagePlan, pipeline: int, chunks: int = 1, *, allow_cross_rank: bool = False) -> Partition:
    """Chooses the boundaries with the smallest largest chunk, at stage boundaries unless told otherwise.

    Args:
        plan: The stages.
        pipeline: Pipeline ranks.
        chunks: Chunks a rank (interleaved schedule).
        allow_cross_rank: A stage may lie on several ranks: its gradient is then all-reduced over them every step.

    Raises:
        ConfigError: There are fewer aligned pieces than chunks and crossing is not allowed or not possible.
    """
    pieces = pipeline * chunks
    aligned = aligned_cuts(plan)
    if pieces > plan.num_layers:
        raise ConfigError("There are more pipeline chunks than layers.", got=f"{pieces} for {plan.num_layers} layers")
    if len(aligned) + 1 < pieces or (allow_cross_rank and chunks == 1):
        if not allow_cross_rank or chunks > 1:
            raise _too_few(plan, pipeline, chunks, len(aligned) + 1)
        cuts: Sequence[int] = range(1, plan.num_layers)
    else:
        cuts = aligned
    return Partition(plan, pipeline, chunks, _even_bounds(plan.num_layers, pieces, cuts, frozenset(aligned)))


def _too_few(plan: StagePlan, pipeline: int, chunks: int, most: int) -> ConfigError:
    fix = f"Let pp x vpp be at most {most}, or take a plan with more stages"
    if chunks > 1:
        return ConfigError(
            "A stage would lie in several chunks of an interleaved pipeline, which is not supported.",
            got=f"{pipeline} x {chunks} chunks for {most} separable pieces of {plan}",
            fix=fix + ".",
        )
    return ConfigError(
        "A stage would lie on several pipeline ranks.",
        got=f"{pipeline} ranks for {most} separable pieces of {plan}",
        fix=fix + ", or allow it with sharing.allow_cross_rank=true (--allow-cross-rank).",
    )


def _even_bounds(depth: int, pieces: int, cuts: Sequence[int], aligned: frozenset[int]) -> tuple[int, ...]:
    """Minimises (largest piece, cuts through a stage, sum of squares) over all choices of ``pieces - 1`` cuts."""
    best: dict[int, tuple[tuple[int, int, int], tuple[int, ...]]] = {0: ((0, 0, 0), (0,))}
    for piece in range(pieces):
        stops = (depth,) if piece == pieces - 1 else tuple(cuts)
        reached: dict[int, tuple[tuple[int, int, int], tuple[int, ...]]] = {}
        for stop in stops:
            options = []
            for start, ((largest, crossing, squares), bounds) in best.items():
                if start < stop:
                    crosses = crossing + (stop != depth and stop not in aligned)
                    cost = (max(largest, stop - start), crosses, squares + (stop - start) ** 2)
                    options.append((cost, (*bounds, stop)))
            if options:
                reached[stop] = min(options)
        best = reached
    return best[depth][1]
