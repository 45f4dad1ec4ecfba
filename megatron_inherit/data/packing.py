"""How a stream of documents is cut into sequences: packed end to end, or one document at a time."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from megatron_inherit.data.spans import Spans

Boundary = Literal["packed", "reset", "none"]
"""``packed``: documents follow each other, attention sees across; ``reset``: packed, but positions restart at each
document, attention stays inside it and no label crosses its end; ``none``: a sequence holds one document, what is left
of it is padding that no loss and no budget counts."""


class Cutter(Protocol):
    """Numbered windows over a stream."""

    count: int

    def ranges(self, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives first stream position and length (at most sequence + 1), int64 [n] each, of windows, int64 [n]."""
        ...


class PackedCutter:
    """Window w takes ``sequence`` tokens from ``w * sequence`` on and the label of the last one."""

    def __init__(self, spans: Spans, sequence: int) -> None:
        self._sequence = sequence
        self.count = max(0, (spans.num_tokens - 1) // sequence)

    def ranges(self, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All windows have the same length."""
        return window * self._sequence, np.full(len(window), self._sequence + 1, np.int64)


class DocumentCutter:
    """Each document gets windows of its own; the table of their numbers takes 8 bytes a document in memory."""

    def __init__(self, spans: Spans, sequence: int) -> None:
        self._sequence, self._spans = sequence, spans
        lengths = np.diff(spans.ends, prepend=0)
        self._last = np.cumsum(-(-np.maximum(lengths - 1, 0) // sequence))
        self.count = int(self._last[-1]) if len(self._last) else 0

    def ranges(self, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The last window of a document is shorter."""
        span = np.searchsorted(self._last, window, "right")
        before = np.maximum(span - 1, 0)
        number = window - np.where(span > 0, self._last[before], 0)
        opens = np.where(span > 0, self._spans.ends[before], 0)
        first = opens + number * self._sequence
        return first, np.minimum(self._sequence + 1, self._spans.ends[span] - first)


def make_cutter(spans: Spans, sequence: int, boundary: Boundary) -> Cutter:
    """Gives the cutter of a boundary option."""
    return DocumentCutter(spans, sequence) if boundary == "none" else PackedCutter(spans, sequence)
