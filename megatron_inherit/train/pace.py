"""Compares the ranks with each other: who is slow, and whose weights are not what they must be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_inherit.engines.base import Engine


@dataclass(frozen=True)
class Straggler:
    """A rank for which the others wait.

    Attributes:
        score: Share of a step that would be left if this rank were as fast as the fastest.
        own_seconds: What it spends a step by itself, outside the step's common work.
        probe_seconds: What a fixed product of matrices takes on its device; 0 where it is not measured.
    """

    rank: int
    host: str
    score: float
    own_seconds: float
    probe_seconds: float


class Pace:
    """Adds up where this rank's time goes between two looks at all ranks.

    Ranks wait for each other inside a step, so that all take equally long for it. What tells them apart is the time
    each spends on its own before the step (data, Python, a stolen core), and on a GPU the time of a fixed product of
    matrices, which shows a throttled device.
    """

    def __init__(self, score: float) -> None:
        self.score = score
        self._own = self._whole = 0.0
        self._steps = 0

    def add(self, *, own: float, whole: float) -> None:
        """Counts a step.

        Args:
            own: Seconds before ``train_step`` began.
            whole: Seconds of the whole step, ``own`` included.
        """
        self._own, self._whole, self._steps = self._own + own, self._whole + whole, self._steps + 1

    def stragglers(self, engine: Engine) -> list[Straggler]:
        """Compares all ranks over the steps since the last look; all ranks call this together."""
        import socket

        steps = max(1, self._steps)
        mine = {"own": self._own / steps, "whole": self._whole / steps, "probe": _probe(), "host": socket.gethostname()}
        self._own = self._whole = 0.0
        self._steps = 0
        ranks = [json.loads(text) for text in engine.gather_text(json.dumps(mine))]
        fastest, probe = min(r["own"] for r in ranks), min(r["probe"] for r in ranks)
        found = []
        for rank, r in enumerate(ranks):
            host_score = 1 - (r["own"] - fastest) / max(r["whole"], 1e-9)
            device_score = probe / r["probe"] if r["probe"] else 1.0
            score = min(host_score, device_score)
            if score < self.score:
                found.append(Straggler(rank, r["host"], score, r["own"], r["probe"]))
        return found


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
