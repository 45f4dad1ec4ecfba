"""Compares the ranks with each other: who is slow, and whose weights are not what they must be."""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_inherit.train.profiling import quiet_profiler

if TYPE_CHECKING:
    from megatron_inherit.engines.base import Engine

RECORDED_STEPS, RECORDED_LOOKS = 3, 10
"""Steps before a look whose collectives are recorded, and looks of which one is prepared so."""


@dataclass(frozen=True)
class Straggler:
    """A rank for which the others wait.

    Attributes:
        score: Share of a step that would be left if this rank were as fast as the fastest.
        own_seconds: What it spends by itself before a step, on data for instance; the median of some steps.
        forward_seconds: What its passes through the model take a step; the least of some steps.
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


class Pace:
    """Keeps where this rank's time goes between two looks at all ranks.

    Ranks wait for each other inside a step, so that all take equally long for it. What tells them apart is the time
    each spends on its own before the step (data, Python, a stolen core); the time of its passes through the model,
    among the ranks of the same pipeline stage; and on a GPU the time of a fixed product of matrices, which shows a
    throttled device. Of the first the median counts, of the second the least, so that no step that something else on
    the machine held up makes a slow rank.

    A GPU's collectives do not hold up the host that starts them. Those of gloo do: where a pass waits for others
    (tensor and context parallelism, gathered weights), all take as long as the slowest of them. There, torch's record
    of what gloo did in a few steps tells a rank's own time from its waiting.

    Args:
        score: Below which a rank is slow.
        every_steps: Steps between two looks.
        tensor_ranks: Tensor parallel size; the ranks of a pipeline stage have equal work.
        recorded: Passes wait for others, on a CPU, and nothing else records them.
    """

    def __init__(self, score: float, *, every_steps: int = 1, tensor_ranks: int = 1, recorded: bool = False) -> None:
        self.score, self.every_steps, self.tensor_ranks, self.recorded = score, every_steps, tensor_ranks, recorded
        self._steps: list[tuple[float, float, float]] = []
        self._busy: list[float] = []
        self._looks = 0

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Holds the common work of a step; all ranks record the same few steps before a look."""
        soon = -step % self.every_steps < RECORDED_STEPS
        if not (self.recorded and soon and self._looks % RECORDED_LOOKS == 0):
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
            own: Seconds before ``train_step`` began.
            forward: Seconds of its passes through the model.
            whole: Seconds of the whole step, both included.
        """
        self._steps.append((own, forward, whole))

    def stragglers(self, engine: Engine) -> list[Straggler]:
        """Compares all ranks over the steps since the last look; all ranks call this together."""
        own, forward, whole = zip(*self._steps or [(0.0, 0.0, 0.0)], strict=True)
        busy = min(self._busy, default=0.0)
        self._steps.clear()
        self._busy.clear()
        self._looks += 1
        mine = {
            "own": statistics.median(own),
            "forward": min(forward),
            "busy": busy,
            "whole": statistics.median(whole),
            "probe": _probe(),
            "host": socket.gethostname(),
            "stage": engine.topology.model_rank // self.tensor_ranks,
        }
        ranks = [json.loads(text) for text in engine.gather_text(json.dumps(mine))]
        found = []
        for rank, r in enumerate(ranks):
            score = _score(r, ranks)
            if score < self.score:
                found.append(Straggler(rank, r["host"], score, r["own"], r["forward"], r["busy"], r["probe"]))
        return found


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Gives the length of what spans of (start, end) cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _score(rank: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> float:
    """Gives the share of a step that would be left if a rank were as fast as the fastest."""
    behind = rank["own"] - min(other["own"] for other in ranks)
    work = "busy" if all(other["busy"] for other in ranks) else "forward"
    behind += rank[work] - min(other[work] for other in ranks if other["stage"] == rank["stage"])
    device = min(other["probe"] for other in ranks) / rank["probe"] if rank["probe"] else 1.0
    return min(1 - behind / max(rank["whole"], 1e-9), device)


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
        if hashes.count(most) * 2 <= len(hashes) and len(set(hashes)) > 1:
            unequal += [rank for rank, _ in group]
        else:
            unequal += [rank for rank, digest in group if digest != most]
    return sorted(unequal)


def _probe() -> float:
    """Times a fixed product on a GPU: the fastest of five, in seconds; 0 on a CPU, whose cores ranks share."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    a = torch.ones(2048, 2048, dtype=torch.bfloat16, device="cuda")
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(5)]
    for begin, end in marks:
        begin.record()
        a @ a
        end.record()
    torch.cuda.synchronize()
    return min(begin.elapsed_time(end) for begin, end in marks) / 1000
