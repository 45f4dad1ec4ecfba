"""The decisions of growth: how deep the next student is, what it is made of, and when to stop; no file, no tensor.

The loop is that of Inheritune (Sanyal, Shwartz-Ziv, Dimakis, Sanghavi, arXiv:2404.08634, Algorithm 2): n = k/2, train,
and n += 2 until the student is no worse than its teacher. The papers compare validation losses rounded to two digits;
here the bar is a tolerance, and the standard error of the difference stands beside every decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_inherit.base.errors import ConfigError

Mode = Literal["restart", "continue", "patch"]
Reason = Literal["parity", "all blocks", "vacuous"]
Block = tuple[Literal["student", "teacher"], int]
"""Whose block it is, and which of its blocks."""
CLEAR_ERRORS = 2.0
"""Standard errors between a difference and its bar from which on chance is no explanation."""


@dataclass(frozen=True)
class Gap:
    """A difference of two validation losses on the same windows.

    Attributes:
        nats: First less second, a token.
        stderr: Its standard error over the windows, or None with fewer than two.
    """

    nats: float
    stderr: float | None

    def is_clear(self, bar: float) -> bool:
        """Tells whether the difference lies ``CLEAR_ERRORS`` standard errors or more to one side of a bar."""
        return self.stderr is not None and abs(self.nats - bar) >= CLEAR_ERRORS * self.stderr


@dataclass(frozen=True)
class Rule:
    """How a growth goes on and when it ends.

    Attributes:
        depth: Blocks of the teacher.
        start: Blocks of the first student.
        increment: Blocks that each round adds.
        tolerance: Nats by which a student may be worse than the teacher.
        margin: Nats by which the teacher must beat a random student of the first size.
        through_vacuous: Grows even where it does not.
    """

    depth: int
    start: int
    increment: int = 2
    tolerance: float = 0.02
    margin: float = 0.03
    through_vacuous: bool = False

    def __post_init__(self) -> None:
        if self.depth < 2:
            raise ConfigError("grow: a teacher of one block has no shallower student.", got=self.depth)
        if not 1 <= self.start <= self.depth:
            raise ConfigError(
                "grow.start: not a depth of a student.", got=self.start, expected=f"1 to the teacher's {self.depth}"
            )
        if self.increment < 1:
            raise ConfigError("grow.increment: each round must add a block.", got=self.increment)
        if self.margin < self.tolerance:
            raise ConfigError(
                "grow.margin: below grow.tolerance, so that a random student could match the teacher.",
                got=f"{self.margin} and {self.tolerance}",
                expected="grow.margin of at least grow.tolerance",
            )

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths of all rounds there can be, the last of them the teacher's own."""
        return (*range(self.start, self.depth, self.increment), self.depth)

    def is_vacuous(self, advantage: Gap) -> bool:
        """Tells whether the teacher does not beat the random student, so that matching it means nothing."""
        return not advantage.nats >= self.margin

    def is_parity(self, gap: Gap) -> bool:
        """Tells whether a student that is worse by ``gap`` matches the teacher."""
        return gap.nats <= self.tolerance

    def next(self, rounds: Sequence[tuple[int, Gap]], advantage: Gap | None = None) -> int | Reason:
        """Decides what comes after some rounds.

        Args:
            rounds: Of each so far the student's blocks, and its loss less the teacher's.
            advantage: Loss of the random student less the teacher's; None where that was not asked.

        Returns:
            The blocks of the next student, or why there is none.
        """
        if advantage is not None and self.is_vacuous(advantage) and not self.through_vacuous:
            return "vacuous"
        if not rounds:
            return self.start
        num_layers, gap = rounds[-1]
        if self.is_parity(gap):
            return "parity"
        return min(num_layers + self.increment, self.depth) if num_layers < self.depth else "all blocks"


def first_blocks(mode: Mode, depth: int, num_layers: int) -> tuple[int, ...]:
    """Gives the teacher's block for each block of a first student: its first ones, or in patch mode that of each group.

    Args:
        mode: Of the growth.
        depth: Blocks of the teacher.
        num_layers: Blocks of the student.
    """
    if mode != "patch":
        return tuple(range(num_layers))
    return tuple(group.start for group in groups_of(depth, num_layers))


def groups_of(depth: int, num_layers: int) -> tuple[range, ...]:
    """Shares a teacher's blocks out over those of a student, in order: block i of the student stands for group i.

    The groups end where a distillation compares hidden states (``distill.losses.stage_ends``).
    """
    ends = [round(depth * (block + 1) / num_layers) for block in range(num_layers)]
    return tuple(range(low, high) for low, high in zip([0, *ends], ends, strict=False))


def continued(trained: int, num_layers: int) -> tuple[Block, ...]:
    """Keeps the blocks of a trained student and appends the teacher's next ones."""
    kept: list[Block] = [("student", block) for block in range(trained)]
    return (*kept, *(("teacher", block) for block in range(trained, num_layers)))


def patched(depth: int, trained: int, at_least: int) -> tuple[Block, ...]:
    """Replaces a student's last blocks by the teacher's groups they stand for (Boomerang distillation, 2510.05064).

    Args:
        depth: Blocks of the teacher.
        trained: Blocks of the student.
        at_least: Blocks that the result has at least; as few as possible are replaced, and all for the whole depth.
    """
    groups = groups_of(depth, trained)
    for kept in range(trained if at_least < depth else 0, -1, -1):
        inner = [block for group in groups[kept:] for block in group]
        if kept + len(inner) >= at_least:
            return (*(("student", block) for block in range(kept)), *(("teacher", block) for block in inner))
    raise ConfigError("grow: a patched student cannot be deeper than its teacher.", got=at_least, expected=depth)
