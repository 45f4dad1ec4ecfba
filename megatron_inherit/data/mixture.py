"""Shares of domains: reads them, divides a token budget by them exactly, and checks what was drawn against them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_inherit.base.errors import DataError
from megatron_inherit.data.layouts import LLAMA_WEIGHTS


def parse_weights(text: str, available: Mapping[str, int]) -> dict[str, float]:
    """Reads domain shares and scales them to sum 1.

    Args:
        text: ``natural`` (shares of the tokens there are), ``llama`` (table 1 of Touvron et al., 2023) or
            ``NAME=SHARE,...``; 0 leaves a domain out.
        available: Domain to its tokens.

    Raises:
        DataError: A share is no number, or a domain has no share, or a share no domain: nothing is left out silently.
    """
    if text == "natural":
        weights = {name: float(tokens) for name, tokens in available.items()}
    elif text == "llama":
        weights = dict(LLAMA_WEIGHTS)
    else:
        weights = parse_numbers(text, "a share")
    unknown, forgotten = sorted(set(weights) - set(available)), sorted(set(available) - set(weights))
    if unknown or forgotten:
        raise DataError(
            "The weights and the domains are not the same.",
            got=f"weights without a domain: {unknown or 'none'}; domains without a weight: {forgotten or 'none'}",
            fix="Give every domain a weight; 0 leaves it out.",
        )
    total = math.fsum(weights.values())
    if total <= 0 or min(weights.values()) < 0:
        raise DataError(f"The weights {text!r} do not add up to something positive.")
    return {name: weights[name] / total for name in sorted(weights)}


def parse_numbers(text: str, what: str) -> dict[str, float]:
    """Reads ``NAME=NUMBER,...``.

    Raises:
        DataError: An entry has another form, or a name comes twice.
    """
    out: dict[str, float] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = entry.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or name in out or not math.isfinite(value):
            raise DataError(f"{entry!r} is not {what}.", expected="NAME=NUMBER, each name once")
        out[name] = value
    return out


def divide(budget: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Divides a budget by shares so that the parts sum to it exactly (largest remainders, ties by name)."""
    exact = {name: budget * weight for name, weight in weights.items()}
    parts = {name: math.floor(value) for name, value in exact.items()}
    left = budget - sum(parts.values())
    for name in sorted(weights, key=lambda name: (parts[name] - exact[name], name))[:left]:
        parts[name] += 1
    return parts


def check_drawn(drawn: Mapping[str, int], weights: Mapping[str, float], *, sequence_length: int) -> list[str]:
    """Compares the tokens a run drew with the intended shares.

    A run that stops inside an epoch has a random part of it, so a domain may be off by what chance allows (4 standard
    deviations of that many sequences), by 0.1 percentage points, or by one sequence, whichever is largest.

    Returns:
        One sentence for each domain that is further off; none if all is well.
    """
    total = sum(drawn.values())
    if not total:
        return []
    problems = []
    sequences = max(1, total // sequence_length)
    for name, weight in weights.items():
        share = drawn.get(name, 0) / total
        chance = 4 * math.sqrt(weight * (1 - weight) / sequences)
        if abs(share - weight) > max(0.001, sequence_length / total, chance):
            problems.append(f"{name}: {100 * share:.2f}% of the tokens drawn, {100 * weight:.2f}% intended")
    return problems
