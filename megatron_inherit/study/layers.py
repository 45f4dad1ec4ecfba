"""Which blocks an arm takes: the words of ``--layers``, places in the middle, and depths as shares of the origin's."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_inherit.base.errors import UsageError
from megatron_inherit.eval.importance import METRICS, resolve_layers
from megatron_inherit.inherit.select import parse_layers

MOST = 10**4
"""Blocks that no model has."""


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


def require_words(text: str) -> None:
    """Refuses words that no origin could satisfy, before one is trained or measured.

    Raises:
        UsageError: They are not understood.
    """
    text = re.sub(r"(?<=:)(\d+)/(\d+)$", lambda found: str(_share(int(found[1]), int(found[2]), MOST)), text)
    if re.fullmatch(r"(middle|spaced):0*[1-9]\d*", text):
        return
    metric = re.fullmatch(r"auto:(.+):0*[1-9]\d*", text)
    if metric is None and text.startswith("auto:"):
        raise UsageError(f"layers {text} is not understood.", expected="auto:METRIC:N, for instance auto:ppl:8")
    if metric is None:
        parse_layers(text, MOST)
    elif metric[1] not in METRICS:
        raise UsageError(f"There is no measure {metric[1]!r} of blocks.", expected=f"one of {', '.join(METRICS)}")


def _share(part: int, whole: int, num_layers: int) -> int:
    if not 0 < part <= whole:
        raise UsageError("layers: not a share of a depth.", got=f"{part}/{whole}", expected="for instance 13/26")
    return max(1, (2 * part * num_layers + whole) // (2 * whole))
