"""Picks the encoder of a job: gigatoken where it is installed and gives the same ids, else the tokenizer's own.

gigatoken turns the written name of a control token in a text into that token. Ours never do, so it gets the vocabulary
without them (Hugging Face files), or does not get the texts that hold such a name (SentencePiece models).
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Sequence

import numpy as np

from megatron_inherit.base.errors import DataError
from megatron_inherit.base.log import get_logger
from megatron_inherit.base.optional import require
from megatron_inherit.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, flatten

MODULES = ("gigatoken", "awkward")
_SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS = 32, 1000
_log = get_logger(__name__)

Encoder = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""Texts to their ids laid end to end, int32, and the number of ids of each, int64."""


def choose_encoder(tokenizer: Tokenizer, backend: str, texts: Sequence[str]) -> Encoder:
    """Gives the fastest encoder whose ids are the tokenizer's on a sample.

    Args:
        tokenizer: Says what is right.
        backend: ``auto``, ``own`` or ``gigatoken``.
        texts: The sample's source: the first batch of a shard.

    Raises:
        DataError: ``gigatoken`` was asked for and cannot take this tokenizer, or differs.
        MissingExtraError: ``gigatoken`` was asked for and is not installed.
    """

    def own(batch: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return flatten(tokenizer.encode_batch(batch))

    if backend == "own" or (backend == "auto" and not is_installed()):
        return own
    fast = _fast(tokenizer) if isinstance(tokenizer, (HuggingFaceTokenizer, SentencePieceTokenizer)) else None
    sample = [text[:_SAMPLE_CHARACTERS] for text in texts[:_SAMPLE_DOCUMENTS]]
    if fast is not None and all(map(np.array_equal, fast(sample), own(sample))):
        return fast
    reason = "cannot take this vocabulary" if fast is None else "gives other ids on a sample"
    if backend == "gigatoken":
        raise DataError(f"gigatoken {reason} ({tokenizer.path}).", fix="Use --backend own.")
    _log.debug("gigatoken %s: %s encodes itself", reason, tokenizer.path)
    return own


def is_installed() -> bool:
    """Tells whether gigatoken can be used; without ``awkward``, which it needs, it gives ids in another form."""
    return all(map(importlib.util.find_spec, MODULES))


@functools.lru_cache(maxsize=4)
def _fast(tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer) -> Encoder | None:
    """Builds gigatoken's tables, which takes it up to a second; None for a vocabulary it cannot take."""
    module, _ = (require(name, "--backend gigatoken") for name in MODULES)
    try:
        if isinstance(tokenizer, HuggingFaceTokenizer):
            description = json.loads(tokenizer.to_json())
            description["added_tokens"] = [one for one in description["added_tokens"] if not one["special"]]
            return _plain(module.Tokenizer.from_json(json.dumps(description)))
        return _around(_plain(module.Tokenizer.from_sentencepiece(tokenizer.path)), tokenizer)
    except (ValueError, TypeError, RuntimeError, OSError, NotImplementedError) as error:
        _log.debug("gigatoken cannot take %s: %s", tokenizer.path, error)
    return None


def _plain(backend: object) -> Encoder:
    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        layout = backend.encode_batch(list(texts), parallel=False).layout  # type: ignore[attr-defined]
        offsets = np.asarray(layout.offsets.data, np.int64)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return ids.astype(np.int32), np.diff(offsets)

    return encode


def _around(fast: Encoder, tokenizer: SentencePieceTokenizer) -> Encoder:
    """Sends a batch that holds the name of a control token to the tokenizer itself."""
    names = tokenizer.control_pieces()

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        found = any(name in text for text in texts for name in names)
        return flatten(tokenizer.encode_batch(texts)) if found else fast(texts)

    return encode
