"""Which blocks an arm takes: the words of ``--layers``, places in the middle, and depths as shares of the origin's."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_inherit.base.errors import UsageError
from megatron_inherit.eval.importance import resolve_layers


def resolve(text: str, origin: Path | str, num_layers: int) -> tuple[int, ...]:
    """Gives an arm's blocks.

    ``middle:N`` takes the N blocks around the middle, ``spaced:N`` N blocks at equal distances, the first and the last
    among them. ``4/26`` in the place of N is that share of the origin's depth, rounded, at least one block.

    Args:
        text: The words.
        origin: Checkpoint that ``auto:METRIC:N`` measures.
        num_layers: Its blocks.

    Raises:
        UsageError: They are not understood, or ask for more than there is.
    """
    text = re.sub(r"(?<=:)(\d+)/(\d+)$", lambda found: str(_share(int(found[1]), int(found[2]), num_layers)), text)
    found = re.fullmatch(r"(middle|spaced):(\d+)", text)
    if found is None:
        return resolve_layers(text, origin, num_layers)
    number = int(found[2])
    if not 1 <= number <= num_layers:
        raise UsageError(f"layers {text}: the origin has {num_layers} blocks.", expected=f"1 to {num_layers}")
    if found[1] == "middle":
        first = (num_layers - number) // 2
        return tuple(range(first, first + number))
    gaps = max(1, number - 1)
    return tuple((2 * place * (num_layers - 1) + gaps) // (2 * gaps) for place in range(number))


def _share(part: int, whole: int, num_layers: int) -> int:
    if not 0 < part <= whole:
        raise UsageError("layers: not a share of a depth.", got=f"{part}/{whole}", expected="for instance 13/26")
    return max(1, (2 * part * num_layers + whole) // (2 * whole))
