"""Fixed evaluation windows: one file with a hash, so that every run of a study is scored on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from megatron_inherit.base.atomic import write_bytes
from megatron_inherit.base.errors import DataError
from megatron_inherit.data.loader import Batch, Loader
from megatron_inherit.data.tokenizer import Tokenizer

_NUM_BYTES = "num_bytes"
_TOKENS = "tokens"
_FINGERPRINT = "fingerprint"


@dataclass(frozen=True)
class EvalWindows:
    """Sequences to predict.

    Attributes:
        tokens: int64 [windows, sequence + 1]; the last ``sequence`` of each are predicted.
        num_bytes: UTF-8 bytes of text that all predicted tokens stand for: bits per byte are the summed loss over
            ``num_bytes * ln 2``.
    """

    tokens: np.ndarray
    num_bytes: int

    @classmethod
    def build(cls, loader: Loader, tokenizer: Tokenizer, *, windows: int) -> EvalWindows:
        """Takes the first samples of a loader, in its order.

        Args:
            loader: Over the held-out split, boundary ``packed``.
            tokenizer: What made the ids.
            windows: How many; fewer if the split is smaller.

        Raises:
            DataError: The tokenizer is not the one that made the ids, or windows would hold padding.
        """
        made_with = loader.stream.tokenizer
        if made_with is not None and made_with.fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"{loader.options.path} was tokenized with another tokenizer.",
                got=f"{tokenizer.path} ({tokenizer.fingerprint})",
                expected=f"{made_with.path} ({made_with.fingerprint})",
            )
        if loader.options.boundary == "none":
            raise DataError("Evaluation windows hold no padding.", got="boundary 'none'", expected="'packed'")
        batch = loader.batch(0, min(windows, loader.samples_per_epoch))
        tokens = np.concatenate([batch.tokens[:, :1], batch.labels], axis=1)
        if tokens.max() >= tokenizer.vocab_size:
            raise DataError(
                f"{loader.options.path} holds ids beyond the vocabulary of {tokenizer.path}.",
                got=int(tokens.max()),
                expected=f"ids below {tokenizer.vocab_size}",
            )
        return cls(tokens, int(tokenizer.byte_lengths()[batch.labels].sum()))

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens and their number of bytes."""
        header = repr((self.tokens.shape, self.num_bytes)).encode()
        return xxhash.xxh3_128_hexdigest(header + np.ascontiguousarray(self.tokens, "<i8").tobytes())

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, start: int, count: int) -> Batch:
        """Gives windows ``[start, start + count)`` as an engine takes them."""
        tokens = self.tokens[start : start + count]
        mask = np.ones((len(tokens), tokens.shape[1] - 1), bool)
        return Batch(tokens[:, :-1], tokens[:, 1:], mask, np.arange(start, start + len(tokens)))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; its metadata holds ``num_bytes`` and the hash."""
        from safetensors.numpy import save

        metadata = {_NUM_BYTES: str(self.num_bytes), _FINGERPRINT: self.fingerprint}
        write_bytes(Path(path), save({_TOKENS: np.ascontiguousarray(self.tokens, np.int64)}, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> EvalWindows:
        """Reads a file that ``save`` wrote.

        Raises:
            DataError: It is missing, is none of ours, or its content is not what its hash says.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                metadata, tokens = file.metadata() or {}, file.get_tensor(_TOKENS)
            windows, expected = cls(tokens, int(metadata[_NUM_BYTES])), metadata[_FINGERPRINT]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{path} is not a file of evaluation windows: {error}.") from error
        if tokens.ndim != 2 or windows.fingerprint != expected:
            raise DataError(f"{path} was changed since it was written.", got=windows.fingerprint, expected=expected)
        return windows
