"""Validation loss over fixed windows, with the standard error that its finite number of windows leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_inherit.base.errors import DataError


@dataclass(frozen=True)
class ValLoss:
    """What an evaluation over fixed windows gave.

    Attributes:
        loss: Mean next-token loss in nats a token.
        stderr: Standard error of ``loss`` over the windows, or None with fewer than two.
        bits_per_byte: Loss in bits a byte of text, comparable across tokenizers; None without the number of bytes.
        perplexity: exp(loss).
        windows: Number of windows.
    """

    loss: float
    stderr: float | None
    bits_per_byte: float | None
    perplexity: float
    windows: int

    def to_json(self) -> dict[str, float | int | None]:
        """Gives the fields of an ``eval`` row of metrics.jsonl."""
        return asdict(self)


def summarize(losses: Sequence[float], counts: Sequence[int], num_bytes: int | None) -> ValLoss:
    """Reduces the windows of an evaluation to its figures.

    The loss is the ratio of two sums; its standard error is that of the ratio estimator (Cochran, Sampling Techniques,
    1977, section 2.11), without finite population correction: windows count as a sample of more text.

    Args:
        losses: Summed loss of each window in nats.
        counts: Predicted tokens of each window.
        num_bytes: Bytes of the text that all predicted tokens stand for, or None if unknown.

    Raises:
        DataError: The two lists differ in length, or no token is predicted.
    """
    if len(losses) != len(counts):
        raise DataError("Losses and token counts of the windows differ in number.", got=(len(losses), len(counts)))
    tokens = sum(counts)
    if tokens <= 0:
        raise DataError("The evaluation windows predict no token.", fix="Build them from a longer text.")
    total = math.fsum(losses)
    loss = total / tokens
    return ValLoss(
        loss=loss,
        stderr=_ratio_stderr(losses, counts, loss),
        bits_per_byte=total / math.log(2) / num_bytes if num_bytes else None,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        windows=len(losses),
    )


def _ratio_stderr(losses: Sequence[float], counts: Sequence[int], ratio: float) -> float | None:
    number = len(losses)
    if number < 2:
        return None
    squares = math.fsum((loss - ratio * count) ** 2 for loss, count in zip(losses, counts, strict=True))
    return math.sqrt(squares / (number * (number - 1))) / (sum(counts) / number)


def difference_stderr(first: Sequence[float], second: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Compares two models on the same windows, window by window.

    Args:
        first: Summed losses of the first model.
        second: Summed losses of the second model.
        counts: Predicted tokens of each window.

    Returns:
        Mean difference (first less second) in nats a token, and its standard error; pairing takes the difficulty of
        the windows out of it. The error is NaN with fewer than two windows.
    """
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    mean = math.fsum(gaps) / sum(counts)
    error = _ratio_stderr(gaps, counts, mean)
    return mean, math.nan if error is None else error
