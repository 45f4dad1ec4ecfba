"""Learning rate and batch size as pure functions of the step and of the samples seen.

Step t counts from 1: the t-th update uses ``learning_rate(t)``, the last one exactly the floor. With w the warm-up's
steps, T the last step and p = (t - w) / (T - w)::

    warm-up       lr * t / w                                        t <= w
    cosine        floor + (lr - floor) * (1 + cos(pi p)) / 2
    linear        lr + (floor - lr) * p
    inverse-sqrt  max(floor, lr * sqrt(w / t))                      Vaswani et al. 2017
    wsd           lr, then from lr to the floor over the last steps  Hu et al. 2024 (MiniCPM)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_inherit.config.schema import BatchRamp, RunConfig


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a run; fields as in the recipe's ``schedule`` and ``optimizer`` sections."""

    kind: str
    lr: float
    total_steps: int
    warmup_steps: int = 0
    floor_lr: float = 0.0
    decay_steps: int | None = None
    decay_shape: str = "linear"

    def learning_rate(self, step: int) -> float:
        """Gives the learning rate of an update.

        Args:
            step: From 1; beyond the last step the floor (or the constant) goes on.
        """
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        if self.kind == "constant":
            return self.lr
        if self.kind == "inverse-sqrt":
            return max(self.floor_lr, self.lr * math.sqrt(self.warmup_steps / step))
        if self.kind == "wsd":
            length = self.decay_steps or max(1, self.total_steps // 10)
            start = max(self.warmup_steps, self.total_steps - length)
            return self._fall(self.decay_shape, start, self.total_steps, step)
        return self._fall(self.kind, self.warmup_steps, self.decay_steps or self.total_steps, step)

    def _fall(self, shape: str, start: int, stop: int, step: int) -> float:
        if step >= stop:
            return self.floor_lr
        progress = max(0.0, (step - start) / (stop - start))
        return self.floor_lr + (self.lr - self.floor_lr) * REMAINING[shape](progress)


REMAINING: dict[str, Callable[[float], float]] = {
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "linear": lambda p: 1 - p,
    "sqrt": lambda p: 1 - math.sqrt(p),
}
"""Shape of a fall -> share of it that remains at progress p in [0, 1]."""


@dataclass(frozen=True)
class BatchPlan:
    """The global batch, in sequences, over the samples seen.

    Attributes:
        full: The batch after the ramp.
        ramp: How it grows, or None.
    """

    full: int
    ramp: BatchRamp | None = None

    def size(self, samples: int) -> int:
        """Gives the global batch of the step that starts after ``samples`` sequences.

        The ramp divides its samples evenly over the sizes below the full one, as Megatron-LM's
        ``--rampup-batch-size`` does.
        """
        if self.ramp is None or samples >= self.ramp.samples or self.ramp.start == self.full:
            return self.full
        increments = (self.full - self.ramp.start) // self.ramp.increment
        return self.ramp.start + self.ramp.increment * (samples * increments // self.ramp.samples)

    def samples_after(self, steps: int) -> int:
        """Gives the sequences seen after a number of steps."""
        samples = done = 0
        while done < steps:
            if self.ramp is None or samples >= self.ramp.samples:
                return samples + (steps - done) * self.full
            samples += self.size(samples)
            done += 1
        return samples

    def steps_for(self, samples: int) -> int:
        """Gives the steps that see at least so many sequences."""
        seen = steps = 0
        while seen < samples:
            if self.ramp is None or seen >= self.ramp.samples:
                return steps + -(-(samples - seen) // self.full)
            seen += self.size(seen)
            steps += 1
        return steps


def batch_plan(config: RunConfig) -> BatchPlan:
    """Gives a recipe's batch sizes."""
    return BatchPlan(config.train.global_batch, config.train.batch_ramp)


def total_steps(config: RunConfig) -> int:
    """Gives the steps of a run; a token budget is met by the last whole step that reaches it."""
    if config.train.steps is not None:
        return config.train.steps
    budget = config.train.budget or 0
    return batch_plan(config).steps_for(-(-budget // config.train.sequence_length))


def schedule_of(config: RunConfig) -> Schedule:
    """Gives a recipe's learning rate."""
    section = config.schedule
    return Schedule(
        kind=section.kind,
        lr=config.optimizer.lr,
        total_steps=total_steps(config),
        warmup_steps=section.warmup_steps,
        floor_lr=section.floor_lr,
        decay_steps=section.decay_steps,
        decay_shape=section.decay_shape,
    )
