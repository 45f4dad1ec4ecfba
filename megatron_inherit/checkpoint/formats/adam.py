"""Adam's settings as DeepSpeed and Megatron keep them beside the moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_inherit.checkpoint.formats.pickle_reader import fields


def adam_settings(groups: Any) -> tuple[float, ...]:
    """Gives the betas and epsilon that parameter groups share.

    Args:
        groups: A list of dictionaries, or anything else where there is none.

    Returns:
        Three numbers, or nothing where no group tells them or two differ.
    """
    found = {_of_group(group) for group in groups} - {()} if isinstance(groups, list) else set()
    return found.pop() if len(found) == 1 else ()


def adam_step(groups: Any) -> int:
    """Gives the number of updates that parameter groups tell; 0 where they do not, or not the same one."""
    steps = [fields(group).get("step") for group in groups] if isinstance(groups, list) else []
    numbers = [step for step in steps if isinstance(step, int | float)]
    return int(numbers[0]) if numbers and steps == numbers[:1] * len(steps) else 0


def adam_of_config(config: Any) -> tuple[float, ...]:
    """Gives betas and epsilon of a DeepSpeed configuration; an empty tuple where it does not say them."""
    return _of_group(fields(fields(fields(config).get("optimizer")).get("params")))


def _of_group(group: Any) -> tuple[float, ...]:
    known = fields(group)
    betas, eps = known.get("betas"), known.get("eps")
    numbers = (*betas, eps) if isinstance(betas, Iterable) and not isinstance(betas, str) else ()
    right = len(numbers) == 3 and all(isinstance(number, float | int) for number in numbers)
    return tuple(map(float, numbers)) if right else ()
