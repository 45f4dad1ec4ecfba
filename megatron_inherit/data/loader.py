"""Samples by index: what a training step reads is a pure function of (seed, epoch, global sample index)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Sequences of equal length.

    Attributes:
        tokens: int64 [batch, sequence], the inputs.
        labels: int64 [batch, sequence], each input's next token.
        loss_mask: bool [batch, sequence], True where the label counts.
        sample_ids: int64 [batch], global sample indices.
        position_ids: int64 [batch, sequence], or None where positions run from 0 in every sequence.
        segment_ids: int32 [batch, sequence], which document of the window a token belongs to where attention must not
            cross documents, or None for plain causal attention.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    sample_ids: np.ndarray
    position_ids: np.ndarray | None = None
    segment_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, start: int, stop: int) -> Batch:
        """Gives sequences ``[start, stop)`` as views."""
        cut = slice(start, stop)
        return Batch(
            tokens=self.tokens[cut],
            labels=self.labels[cut],
            loss_mask=self.loss_mask[cut],
            sample_ids=self.sample_ids[cut],
            position_ids=None if self.position_ids is None else self.position_ids[cut],
            segment_ids=None if self.segment_ids is None else self.segment_ids[cut],
        )
