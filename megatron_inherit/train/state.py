"""Where a run stands: the few numbers that, with the tensors, continue it bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class RunState:
    """A run between two steps.

    Attributes:
        step: Steps done.
        samples: Position in the data: every sample before it was used or skipped for good.
        tokens: Unmasked tokens seen.
        seconds: Wall time of all sessions, what a crash lost left out.
        skipped_steps: Steps whose gradient was not finite.
        bad_steps: Spikes and skipped steps in a row up to now.
        bad_since: First sample of the first of them.
        losses: Last losses, oldest first, from which a spike is told.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    bad_steps: int = 0
    bad_since: int = 0
    losses: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Gives plain values; ``from_json`` reverses it exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunState:
        """Reads what ``to_json`` gave, other keys left out."""
        known = {field.name: value[field.name] for field in fields(cls)}
        return cls(**{**known, "losses": tuple(known["losses"])})


def next_start(position: int, count: int, skipped: Sequence[tuple[int, int]]) -> int:
    """Finds where the next batch begins, beyond ranges of samples that were given up.

    Args:
        position: First sample that was not used yet.
        count: Samples of the batch.
        skipped: Ranges [start, stop) to stay out of.
    """
    for start, stop in sorted(skipped):
        if position < stop and position + count > start:
            position = stop
    return position
