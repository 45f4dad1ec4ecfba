"""When a loss is a spike, when the run rolls back, and when it gives up; pure, so that every rank decides alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_inherit.train.state import RunState

Verdict = Literal["fine", "bad", "rollback"]
FEWEST_LOSSES = 8


@dataclass(frozen=True)
class SpikePolicy:
    """What counts as a spike and how many are borne.

    Attributes:
        window: Losses from which mean and standard deviation are taken; spikes are left out of them.
        sigma: Standard deviations above the mean that make a loss a spike.
        patience: Spikes or steps without a finite gradient in a row that roll the run back.
    """

    window: int = 128
    sigma: float = 6.0
    patience: int = 4

    def is_spike(self, loss: float, losses: Sequence[float]) -> bool:
        """Tells whether a loss lies far above those before it; the first few are never spikes unless not finite."""
        if not math.isfinite(loss):
            return True
        if len(losses) < FEWEST_LOSSES:
            return False
        mean = math.fsum(losses) / len(losses)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in losses) / len(losses))
        return loss > mean + self.sigma * max(deviation, 0.01 * abs(mean))

    def judge(self, state: RunState, loss: float, *, skipped: bool, start: int) -> tuple[RunState, Verdict]:
        """Takes a step's outcome into the state.

        Args:
            state: After the step, with the counters and losses of before.
            loss: Of the step.
            skipped: The gradient was not finite and nothing was updated.
            start: First sample of the step.
        """
        bad = skipped or self.is_spike(loss, state.losses)
        losses = state.losses if bad else (*state.losses, loss)[-self.window :]
        state = dataclasses.replace(
            state,
            losses=losses,
            bad_steps=state.bad_steps + 1 if bad else 0,
            bad_since=state.bad_since if state.bad_steps else start,
            skipped_steps=state.skipped_steps + int(skipped),
        )
        if not bad:
            return state, "fine"
        return state, "rollback" if state.bad_steps >= self.patience else "bad"
