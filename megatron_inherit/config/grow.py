"""The section of a recipe about growing a student until it matches its teacher."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_inherit.config.section import Positive, Real, Section


class GrowSection(Section):
    """Read by ``minherit grow`` only; the recipe's model is the teacher, its other sections say how models are trained.

    Attributes:
        mode: What a round's student starts from: the teacher's first blocks again (``restart``), the student of the
            round before with the teacher's next blocks behind it (``continue``), or the first round's student in which
            the teacher's blocks replace groups from the end, without training (``patch``).
        start: Blocks of the first student; default half of the teacher's.
        increment: Blocks that each round adds.
        tolerance: Nats a token by which a student may be worse than the teacher and match it.
        control: Trains a random student of the first size too, to see that the teacher's depth is worth something.
        margin: Nats by which the teacher must beat that one.
        when_vacuous: What is done where it does not.
        student: Keys of a recipe in which the students and the control differ from the teacher, such as
            ``optimizer.lr``; any ``distill`` key makes the teacher the one that is distilled.
    """

    mode: Literal["restart", "continue", "patch"] = "restart"
    start: Positive | None = None
    increment: Positive = 2
    tolerance: Real = 0.02
    control: bool = True
    margin: Real = 0.03
    when_vacuous: Literal["stop", "continue"] = "stop"
    student: dict[str, Any] = Field(default_factory=dict)

    @field_validator("student")
    @classmethod
    def _comparable(cls, keys: dict[str, Any]) -> dict[str, Any]:
        for key in keys:
            if key.partition(".")[0] in _SHARED:
                raise ValueError(f"{key} must be the same for the teacher and its students")
        return keys


_SHARED = ("run", "model", "data", "eval", "grow")
