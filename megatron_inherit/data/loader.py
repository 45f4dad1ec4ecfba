"""Samples by index: what a training step reads is a pure function of (seed, epoch, global sample index)."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import xxhash

from megatron_inherit.base.errors import DataError
from megatron_inherit.data.opening import Stream, Verify, beyond_vocabulary, open_stream
from megatron_inherit.data.packing import Boundary, make_cutter
from megatron_inherit.data.permutation import BLOCK, KeyedPermutation, derive_key
from megatron_inherit.data.spans import Pieces, copy_pieces, find_pieces

_COUNT_CHUNK = 1 << 20


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


@dataclass(frozen=True)
class LoaderOptions:
    """What to read and in which order.

    Attributes:
        path: Folder of a subset (``minherit data subset``), folder of tokens (``minherit data tokenize``), or the
            prefix of a Megatron ``.bin/.idx`` pair.
        sequence_length: Tokens a sample.
        seed: Of the order of samples.
        epochs: Passes over the data, each in an order of its own; a sample beyond them is an error. 0: no limit.
        boundary: ``packed``, ``reset`` or ``none``, see :data:`megatron_inherit.data.packing.Boundary`.
        split: ``train``, ``valid`` or ``test`` of a subset; ``all`` for tokens that have no splits.
        shuffle: False gives the windows in stream order.
        vocab_size: The model's; ids beyond it are refused.
        verify: ``quick`` compares sizes and times of all files and hashes those that were touched; ``full`` hashes
            all; ``none`` for the ranks beside the one that verifies.
    """

    path: str
    sequence_length: int
    seed: int = 0
    epochs: int = 1
    boundary: Boundary = "packed"
    split: str = "train"
    shuffle: bool = True
    vocab_size: int | None = None
    verify: Verify = "quick"


class Loader:
    """Fixed-length samples of a stream of documents.

    Sample i is window ``permutation(i mod n)`` of epoch ``i div n``, so that any rank can ask for any sample at any
    time and a resumed run needs no state but its step.

    Args:
        stream: What is read.
        options: How.

    Attributes:
        samples_per_epoch: Samples of one pass.
        num_samples: Samples of all passes, ``sys.maxsize`` without limit.
        fingerprint: Hash of the data and of every option that changes what a sample index means.
    """

    def __init__(self, stream: Stream, options: LoaderOptions) -> None:
        self.stream, self.options = stream, options
        self.sequence_length = options.sequence_length
        self._cutter = make_cutter(stream.spans, options.sequence_length, options.boundary)
        self._pad_id = (stream.tokenizer and stream.tokenizer.eos_id) or 0
        self.samples_per_epoch = self._cutter.count
        if not self.samples_per_epoch:
            raise DataError(
                f"{options.path} ({options.split}) is too small for one sample.",
                got=f"{stream.spans.num_tokens} tokens",
                expected=f"at least {options.sequence_length + 1}",
            )
        self.num_samples = self.samples_per_epoch * options.epochs if options.epochs else sys.maxsize
        self._permutations: dict[int, KeyedPermutation] = {}
        order = (options.sequence_length, options.seed, options.boundary, options.split, options.shuffle)
        self.fingerprint = xxhash.xxh3_128_hexdigest(repr((stream.fingerprint, *order)).encode())

    def batch(self, start: int, count: int) -> Batch:
        """Reads samples ``[start, start + count)``.

        Raises:
            DataError: The samples lie beyond the last epoch, or a token id is beyond the vocabulary.
        """
        self.require(start + count)
        ids = np.arange(start, start + count)
        first, length = self._cutter.ranges(np.array([self._window(one) for one in range(start, start + count)]))
        pieces = find_pieces(self.stream.spans, first, length)
        window = np.full((count, self.sequence_length + 1), self._pad_id, np.int64)
        copy_pieces(self.stream.source, pieces, window)
        self._check_ids(window, pieces)
        if self.options.boundary == "reset":
            positions, segments, mask = _document_ids(pieces, window.shape)
            return Batch(window[:, :-1], window[:, 1:], mask, ids, positions, segments)
        mask = np.arange(1, self.sequence_length + 1) < length[:, None]
        return Batch(window[:, :-1], window[:, 1:], mask, ids)

    def require(self, num_samples: int) -> None:
        """Raises DataError if a run of ``num_samples`` samples would need more data than the options allow."""
        if num_samples <= self.num_samples:
            return
        raise DataError(
            f"{self.options.path} ({self.options.split}) has too few tokens for the run.",
            got=f"{self.samples_per_epoch} samples x {self.options.epochs} epochs of {self.sequence_length} tokens",
            expected=f"{num_samples} samples",
            fix="Take a larger subset, allow more epochs (0: no limit), or train fewer steps.",
        )

    def windows(self, sample_ids: np.ndarray) -> np.ndarray:
        """Maps global sample indices, int64 [n], to window numbers of the stream, int64 [n]."""
        epoch, index = np.divmod(sample_ids, self.samples_per_epoch)
        if not self.options.shuffle:
            return index
        out = np.empty_like(index)
        for number in np.unique(epoch).tolist():
            chosen = epoch == number
            out[chosen] = self._permutation(number)(index[chosen])
        return out

    def _permutation(self, epoch: int) -> KeyedPermutation:
        if epoch not in self._permutations:
            key = derive_key(self.options.seed, "samples", epoch)
            self._permutations = {epoch: KeyedPermutation(self.samples_per_epoch, key)}
        return self._permutations[epoch]

    def _window(self, sample: int) -> int:
        epoch, index = divmod(sample, self.samples_per_epoch)
        if not self.options.shuffle:
            return index
        block, place = divmod(index, BLOCK)
        return int(self._permutation(epoch).block(block)[place])

    def drawn(self, start: int, stop: int) -> dict[str, int]:
        """Counts the tokens of each domain in samples ``[start, stop)``, computed from the order, not from a log."""
        size = self.samples_per_epoch
        first, last = -(-start // size), stop // size
        if first >= last:
            totals = self._drawn(start, stop)
        else:
            totals = self._drawn(start, first * size) + self._drawn(last * size, stop)
            totals += (last - first) * self._drawn_in_epoch()
        names = dict.fromkeys((domain.name for domain in self.stream.domains), 0)
        for domain, total in zip(self.stream.domains, totals.tolist(), strict=True):
            names[domain.name] += total
        return names

    def _drawn(self, start: int, stop: int) -> np.ndarray:
        totals = np.zeros(len(self.stream.domains), np.int64)
        for begin in range(start, stop, _COUNT_CHUNK):
            first, length = self._cutter.ranges(self.windows(np.arange(begin, min(stop, begin + _COUNT_CHUNK))))
            totals += self._overlap(first, first + length - 1)
        return totals

    def _drawn_in_epoch(self) -> np.ndarray:
        if self.options.boundary == "none":
            return self._drawn(0, self.samples_per_epoch)
        return self._overlap(np.zeros(1, np.int64), np.array([self.samples_per_epoch * self.sequence_length]))

    def _overlap(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Counts the stream positions of ranges ``[first, last)`` in each domain."""
        inside = [np.minimum(last, domain.stop) - np.maximum(first, domain.start) for domain in self.stream.domains]
        return np.array([np.maximum(part, 0).sum() for part in inside], np.int64)

    def _check_ids(self, window: np.ndarray, pieces: Pieces) -> None:
        limit = self.options.vocab_size
        if limit is None or window.view(np.uint64).max() < limit:  # a negative id is a huge unsigned one
            return
        row, column = (int(part[0]) for part in np.nonzero((window >= limit) | (window < 0)))
        piece = np.flatnonzero((pieces.row == row) & (pieces.begin <= column) & (column < pieces.end))[0]
        path, offset = self.stream.source.locate(int(pieces.source[piece] + column - pieces.begin[piece]))
        raise beyond_vocabulary(path, offset, int(window[row, column]), limit)


def _document_ids(pieces: Pieces, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives positions within documents, document numbers within the window, and which labels stay in the document."""
    lengths = pieces.end - pieces.begin
    number = (np.arange(len(lengths)) - np.searchsorted(pieces.row, pieces.row)).astype(np.int32)
    position = np.repeat(pieces.begin, lengths).reshape(shape)
    np.subtract(np.arange(shape[1]), position, out=position)
    segment = np.repeat(number, lengths).reshape(shape)
    return position[:, :-1], segment[:, :-1], segment[:, 1:] == segment[:, :-1]


def open_loader(options: LoaderOptions) -> Loader:
    """Opens a subset, a folder of tokens or a Megatron ``.bin/.idx`` prefix for training.

    Raises:
        DataError: Files are missing, damaged or changed, the split does not exist, the data is too small, or its
            token ids go beyond ``options.vocab_size``.
    """
    stream = open_stream(options.path, options.split, vocab_size=options.vocab_size, verify=options.verify)
    return Loader(stream, options)
