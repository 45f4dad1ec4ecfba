"""Which teacher blocks a student takes: the ``--layers`` language, and the roles of ``--reset``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_inherit.arch.families import ROLES, Role
from megatron_inherit.base.errors import UsageError

EXAMPLES = "first:8, last:8, every:2, 0-7, 0,2,4,4 or 0-3,8-11"


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Reads a choice of blocks; order and repeats are kept.

    ``first:N`` and ``last:N`` take N blocks from an end, ``every:K`` takes 0, K, 2K, ..., ``all`` takes all; else a
    list of numbers and ranges, both ends included; ``7-0`` counts down.

    Args:
        text: The choice.
        num_layers: Blocks of the teacher.

    Returns:
        The teacher's block for each block of the student.

    Raises:
        UsageError: The choice is not understood, empty, or names a block the teacher does not have.
    """
    text = text.strip()
    if text == "all":
        return tuple(range(num_layers))
    named = re.fullmatch(r"(first|last|every):(-?\d+)", text)
    layers = _named(named[1], int(named[2]), num_layers) if named else _listed(text)
    if not layers:
        raise UsageError(f"--layers {text} selects no layer.", expected=f"at least one, for instance {EXAMPLES}")
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise UsageError(
                f"--layers {text} names layer {layer}, which the teacher does not have.",
                got=layer,
                expected=f"0 to {num_layers - 1}",
            )
    return tuple(layers)


def parse_auto(text: str, num_layers: int) -> tuple[str, int]:
    """Reads ``auto:METRIC:N``, the choice that a measurement makes.

    Returns:
        (metric, number of blocks).

    Raises:
        UsageError: It is not understood, or the teacher has fewer blocks.
    """
    found = re.fullmatch(r"auto:([a-z-]+):(\d{1,6})", text.strip())
    if found is None:
        raise UsageError(f"--layers {text} is not understood.", expected="auto:METRIC:N, for instance auto:ppl:8")
    count = int(found[2])
    if not 1 <= count <= num_layers:
        raise UsageError(f"--layers {text}: {count} blocks cannot be chosen.", expected=f"1 to {num_layers}")
    return found[1], count


def parse_roles(words: Iterable[str]) -> tuple[Role, ...]:
    """Reads ``--reset``: roles separated by commas, or ``all``; the result is in the order of ``ROLES``.

    Raises:
        UsageError: A role is unknown.
    """
    chosen = {word.strip() for text in words for word in text.split(",") if word.strip()}
    if "all" in chosen:
        return ROLES
    for word in sorted(chosen - set(ROLES)):
        raise UsageError(f"--reset: unknown role {word!r}.", expected=f"all, or some of {', '.join(ROLES)}")
    return tuple(role for role in ROLES if role in chosen)


def _named(word: str, number: int, num_layers: int) -> list[int]:
    if number < 1:
        raise UsageError(f"--layers {word}:{number} selects no layer.", expected="a number of at least 1")
    if word == "every":
        return list(range(0, num_layers, number))
    if number > num_layers:
        raise UsageError(
            f"--layers {word}:{number} asks for more layers than the teacher has.", expected=f"at most {num_layers}"
        )
    return list(range(number)) if word == "first" else list(range(num_layers - number, num_layers))


def _listed(text: str) -> list[int]:
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if found is None:
            raise UsageError(f"--layers {text!r} is not understood.", expected=f"for instance {EXAMPLES}")
        low, high = int(found[1]), int(found[2] or found[1])
        layers += range(low, high + 1) if low <= high else range(low, high - 1, -1)
    return layers
