"""The index of a subset: which stretch of which token file stands where in the packed stream.

A *span* is one document, or the part of it that a budget left. Span i takes the tokens from ``starts[i]`` of the source
and stands at ``[ends[i-1], ends[i])`` of the stream. The source is all shards laid end to end, so a span is two int64:
16 bytes a document on disk, mapped, never read whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_inherit.data.indexed import map_array


@dataclass(frozen=True)
class ShardFile:
    """A ``.bin`` file as a piece of the source.

    Attributes:
        path: The file.
        dtype: Number type of its tokens.
        num_tokens: Its length.
    """

    path: Path
    dtype: np.dtype
    num_tokens: int


class Source:
    """Token files laid end to end; each is mapped when it is first needed."""

    def __init__(self, files: list[ShardFile]) -> None:
        self.files = files
        self.bases = np.cumsum([0, *(file.num_tokens for file in files)], dtype=np.int64)
        self._maps: list[np.ndarray | None] = [None] * len(files)

    def tokens(self, number: int) -> np.ndarray:
        """Gives the mapped tokens of a file."""
        mapped = self._maps[number]
        if mapped is None:
            file = self.files[number]
            mapped = self._maps[number] = map_array(file.path, file.dtype, file.num_tokens)
        return mapped

    def locate(self, position: int) -> tuple[Path, int]:
        """Names the file and the byte offset of a source position."""
        number = int(np.searchsorted(self.bases, position, "right")) - 1
        file = self.files[number]
        return file.path, (position - int(self.bases[number])) * file.dtype.itemsize


@dataclass(frozen=True)
class Spans:
    """Source positions and stream ends of the spans, int64 [n] each."""

    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def open(cls, prefix: Path, count: int) -> Spans:
        """Maps ``prefix.starts`` and ``prefix.ends``."""
        return cls(*(map_array(prefix.with_name(f"{prefix.name}.{part}"), "<i8", count) for part in ("starts", "ends")))

    @property
    def num_tokens(self) -> int:
        """Length of the stream."""
        return int(self.ends[-1]) if len(self.ends) else 0


@dataclass(frozen=True)
class Pieces:
    """The pieces of spans that a list of stream ranges is made of, in order; int64 [m] each.

    Attributes:
        row: Which range.
        begin, end: Where in the range, in tokens.
        source: First token in the source.
        span: Which span.
    """

    row: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    source: np.ndarray
    span: np.ndarray


def find_pieces(spans: Spans, first: np.ndarray, length: np.ndarray) -> Pieces:
    """Cuts stream ranges at the borders of spans.

    Args:
        spans: The stream.
        first: First stream position of each range, int64 [n].
        length: Tokens of each range, int64 [n], positive and inside the stream.
    """
    low = np.searchsorted(spans.ends, first, "right")
    high = np.searchsorted(spans.ends, first + length - 1, "right")
    counts = high - low + 1
    row = np.repeat(np.arange(len(first)), counts)
    span = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts - low, counts)
    ends = spans.ends[span]
    opens = np.where(span > 0, spans.ends[np.maximum(span - 1, 0)], 0)
    from_stream = np.maximum(opens, first[row])
    to_stream = np.minimum(ends, (first + length)[row])
    source = spans.starts[span] + (from_stream - opens)
    keep = to_stream > from_stream
    return Pieces(*(part[keep] for part in (row, from_stream - first[row], to_stream - first[row], source, span)))


def copy_pieces(source: Source, pieces: Pieces, out: np.ndarray) -> None:
    """Copies the tokens of the pieces into ``out`` [rows, length]."""
    shard = np.searchsorted(source.bases, pieces.source, "right") - 1
    begin_in_shard = pieces.source - source.bases[shard]
    columns = (pieces.row, pieces.begin, pieces.end, shard, begin_in_shard)
    for row, begin, end, number, start in zip(*(column.tolist() for column in columns), strict=True):
        out[row, begin:end] = source.tokens(number)[start : start + end - begin]
