"""Compares the ranks with each other: who is slow, and whose weights are not what they must be."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import socket
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_inherit.train.profiling import quiet_profiler

if TYPE_CHECKING:
    from megatron_inherit.engines.base import Engine

FEWEST_STEPS = 3
"""A look at fewer steps, just after a start, would take a warm-up for slowness."""
RECORDED_STEPS = 3
"""Steps before a look whose collectives are recorded."""
LOOKS_PER_RECORD = 10
"""Recording costs time, so that only one look in so many has it."""
MOST_TOLD = 8
"""Of a whole slow cluster only the slowest are named."""


@dataclass(frozen=True)
class Straggler:
    """A rank for which the others wait.

    Attributes:
        score: Share of a step that would be left if this rank were as fast as the fastest.
        own_seconds: What it spends by itself around a step, on data or logging for instance; the median of some steps.
        forward_seconds: What its passes through the model take a step, the least of some; 0 where they wait for others.
        busy_seconds: What a step takes it without waiting for others, the least of some; 0 where it is not measured.
        probe_seconds: What a fixed product of matrices takes on its device; 0 where it is not measured.
    """

    rank: int
    host: str
    score: float
    own_seconds: float
    forward_seconds: float
    busy_seconds: float
    probe_seconds: float

    def __str__(self) -> str:
        inside = self.busy_seconds or self.forward_seconds
        words = f"{self.own_seconds:.3f} s around a step" + (f", {inside:.3f} s in it" if inside else "")
        words += f", {1e3 * self.probe_seconds:.3f} ms for a product of matrices" if self.probe_seconds else ""
        return f"Rank {self.rank} on {self.host} is slow (score {self.score:.2f}): {words}."


class Pace:
    """Keeps where this rank's time goes between two looks at all ranks.

    Ranks wait for each other inside a step, so that all take equally long for it. What tells them apart is the time
    each spends on its own around the step (data, logging, Python, a stolen core); the time of its passes through the
    model, among the ranks of the same pipeline stage; and on a GPU the time of a fixed product of matrices, which shows
    a throttled device. Of the first the median counts, of the second the least, so that no step that something else on
    the machine held up makes a slow rank.

    A GPU's collectives do not hold up the host that starts them. Those of gloo do: where a pass waits for others
    (tensor and context parallelism, gathered weights), the rank that is late has the shortest passes. There, torch's
    record of what gloo did in a few steps tells a rank's own time from its waiting.

    Args:
        score: Below which a rank is slow.
        every_steps: Steps between two looks.
        tensor_ranks: Tensor parallel size; the ranks of a pipeline stage have equal work.
        waiting: Passes wait for others on the host, so that their length tells nothing.
        recorded: What gloo does is recorded now and then; not while something else records this process.
    """

    def __init__(
        self,
        score: float,
        *,
        every_steps: int = 1,
        tensor_ranks: int = 1,
        waiting: bool = False,
        recorded: bool = False,
    ) -> None:
        self.score, self.every_steps, self.tensor_ranks = score, every_steps, tensor_ranks
        self.waiting, self.recorded = waiting, recorded
        self._steps: collections.deque[tuple[float, float, float]] = collections.deque(
            maxlen=max(every_steps, FEWEST_STEPS)
        )
        self._busy: list[float] = []
        self._looks = 0

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Holds the common work of a step; all ranks record the same few steps before a look."""
        soon = -step % self.every_steps < RECORDED_STEPS
        if not (self.recorded and soon and self._looks % LOOKS_PER_RECORD == 0):
            yield
            return
        profiler = quiet_profiler()
        with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as record:
            began = time.perf_counter()
            yield
            whole = time.perf_counter() - began
        spans = ((e.time_range.start / 1e6, e.time_range.end / 1e6) for e in record.events() if "gloo:" in e.name)
        self._busy.append(whole - covered(spans))

    def add(self, *, own: float, forward: float, whole: float) -> None:
        """Counts a step.

        Args:
            own: Seconds before and after ``train_step``.
            forward: Seconds of its passes through the model.
            whole: Seconds of the whole step, both included.
        """
        self._steps.append((own, forward, whole))

    def stragglers(self, engine: Engine) -> list[Straggler]:
        """Compares all ranks over the last steps; all ranks call this together.

        Returns:
            The slow ones, the slowest first, ``MOST_TOLD`` at most; none after fewer than ``FEWEST_STEPS`` steps.
        """
        busy = min(self._busy, default=0.0)
        self._busy.clear()
        if len(self._steps) < FEWEST_STEPS:
            return []
        self._looks += 1
        own, forward, whole = zip(*self._steps, strict=True)
        mine = {
            "own": statistics.median(own),
            "forward": 0.0 if self.waiting else min(forward),
            "busy": busy,
            "whole": statistics.median(whole),
            "probe": _probe(),
            "host": socket.gethostname(),
            "stage": engine.topology.model_rank // self.tensor_ranks,
        }
        ranks = [json.loads(text) for text in engine.gather_text(json.dumps(mine))]
        found = [
            Straggler(rank, r["host"], score, r["own"], r["forward"], r["busy"], r["probe"])
            for rank, (r, score) in enumerate(zip(ranks, _scores(ranks), strict=True))
            if score < self.score
        ]
        return sorted(found, key=lambda slow: slow.score)[:MOST_TOLD]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Gives the length of what spans of (start, end) cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _scores(ranks: Sequence[Mapping[str, Any]]) -> list[float]:
    """Gives, for each rank, the share of a step that would be left if it were as fast as the fastest."""
    work = "busy" if all(rank["busy"] for rank in ranks) else "forward"
    own = min(rank["own"] for rank in ranks)
    probe = min((rank["probe"] for rank in ranks if rank["probe"]), default=0.0)
    least: dict[int, float] = {}
    for rank in ranks:
        least[rank["stage"]] = min(rank[work], least.get(rank["stage"], math.inf))
    scores = []
    for rank in ranks:
        behind = rank["own"] - own + rank[work] - least[rank["stage"]]
        device = probe / rank["probe"] if rank["probe"] else 1.0
        scores.append(max(0.0, min(1 - behind / max(rank["whole"], 1e-9), device)))
    return scores


def unequal_ranks(engine: Engine) -> list[int]:
    """Compares the weights of ranks that must hold the same ones; all ranks call this together.

    Returns:
        The ranks that differ from most others of their ``model_rank``; of two that differ both.
    """
    place = {"part": engine.topology.model_rank, "hash": engine.weight_hash()}
    ranks = [json.loads(text) for text in engine.gather_text(json.dumps(place))]
    unequal = []
    for part in {r["part"] for r in ranks}:
        group = [(rank, r["hash"]) for rank, r in enumerate(ranks) if r["part"] == part]
        hashes = [digest for _, digest in group]
        most = max(set(hashes), key=hashes.count)
        if hashes.count(most) * 2 <= len(hashes):
            unequal += [rank for rank, _ in group]
        else:
            unequal += [rank for rank, digest in group if digest != most]
    return sorted(unequal)


def _probe() -> float:
    """Times a fixed product on a GPU: the fastest of five, in seconds; 0 on a CPU, whose cores ranks share.

    It is 0 too where the device's memory is so full that the product has no room: the run matters more.
    """
    import torch

    if not torch.cuda.is_available():
        return 0.0
    try:
        a = torch.ones(2048, 2048, dtype=torch.bfloat16, device="cuda")
        product = torch.empty_like(a)
    except torch.OutOfMemoryError:
        return 0.0
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(5)]
    for begin, end in marks:
        begin.record()
        torch.matmul(a, a, out=product)
        end.record()
    torch.cuda.synchronize()
    return min(begin.elapsed_time(end) for begin, end in marks) / 1000
