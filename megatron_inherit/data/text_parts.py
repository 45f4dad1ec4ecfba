"""Cuts a text where a BPE model gives its parts, one by one, the ids that it gives the whole.

A model that merges over a whole text (LLaMA's, as SentencePiece or as tokenizer.json) takes the best pair anywhere
until no pair is a piece. Its queue outgrows the caches with the length of the text, so that short parts are half as
fast again. A text may be cut at a blank between two other characters where no merge crosses one: where no piece holds
the blank mark after another character, and what comes before the merges (normalizer, added tokens) takes no blank
together with its neighbours. The part loses its blank, for the model puts one before every text.

The fields of a SentencePiece model are those of ``sentencepiece_model.proto``; its generated module would ask for the
protobuf release that it was made with. Those of a tokenizer.json are the ``tokenizers`` library's.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any, cast

BLANK = "\u2581"
PART = 1000
"""Characters after which the next place to cut is looked for."""

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_BPE, _USER_DEFINED = 2, 4
_LLAMA_NORMALIZERS = (
    {"type": "Prepend", "prepend": BLANK},
    {"type": "Replace", "pattern": {"String": " "}, "content": BLANK},
)
_CUT = re.compile(f"(?<=[^ {BLANK}]) (?=[^ {BLANK}])")

Fields = Mapping[int, Sequence[int | bytes]]


def encode_in_parts(encode: Callable[[list[str]], Iterable[list[int]]], texts: Sequence[str]) -> list[list[int]]:
    """Gives the ids of each text by those of its parts."""
    cut = [parts(text) for text in texts]
    encoded = iter(encode(list(chain.from_iterable(cut))))
    return [list(chain.from_iterable(islice(encoded, len(each)))) for each in cut]


def parts(text: str) -> list[str]:
    """Cuts a text at lone blanks, which belong to neither part.

    Every part but the last is at least :data:`PART` characters long, and none is empty unless the text is.
    """
    found, begin = [], 0
    while cut := _CUT.search(text, begin + PART):
        found.append(text[begin : cut.start()])
        begin = cut.end()
    return [*found, text[begin:]]


def sentencepiece_may_cut(model: Any) -> bool:
    """Tells whether a ``SentencePieceProcessor`` gives parts the ids of the whole."""
    top = _fields(model.serialized_model_proto())
    trainer, normalizer = (_fields(cast("bytes", top.get(number, [b""])[-1])) for number in (_TRAINER, _NORMALIZER))
    pieces = model.id_to_piece(list(range(model.get_piece_size())))
    added = _user_defined(cast("list[bytes]", top[_PIECES]))
    apart = _keeps_words_apart(pieces) and not any(BLANK in one or " " in one for one in added)
    return _merges_characters(trainer, normalizer) and apart


def huggingface_may_cut(tokenizer: Any) -> bool:
    """Tells whether a ``tokenizers.Tokenizer`` gives parts the ids of the whole."""
    if tokenizer.pre_tokenizer is not None:
        return False
    told = json.loads(tokenizer.to_str())
    model = told["model"]
    plain = model["type"] == "BPE" and not any(
        model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    )
    drops_unknown = model.get("unk_token") is None  # the neighbours of what is dropped may merge, blanks among them
    as_llama = told["normalizer"] == {"type": "Sequence", "normalizers": list(_LLAMA_NORMALIZERS)}
    splits = any(not one["special"] for one in told["added_tokens"])  # a blank is put behind each that is found
    return plain and as_llama and not drops_unknown and not splits and _keeps_words_apart(model["vocab"])


def _keeps_words_apart(pieces: Collection[str]) -> bool:
    """Says that no piece holds a blank behind a character, and that the blank is known.

    Neighbours that are not known would become one unknown, also across a blank.
    """
    return BLANK in pieces and not any(BLANK in piece.lstrip(BLANK) for piece in pieces)


def _merges_characters(trainer: Fields, normalizer: Fields) -> bool:
    """Says that the model is BPE over the characters as they are, blanks marked, with one put before the text."""
    bpe, rules = _number(trainer, 3, 1) == _BPE, normalizer.get(2, [b""])[-1]
    before, squeezed, marked = (_number(normalizer, field, 1) for field in (3, 4, 5))
    return bpe and not rules and bool(before and marked) and not squeezed


def _user_defined(pieces: Sequence[bytes]) -> list[str]:
    """Gives the SentencePiece pieces that are taken out of a text before anything is merged."""
    mark = bytes([3 << 3, _USER_DEFINED])  # what their field 3 must look like somewhere
    read = [_fields(piece) for piece in pieces if mark in piece]
    return [cast("bytes", piece[1][-1]).decode() for piece in read if _number(piece, 3, 1) == _USER_DEFINED]


def _number(fields: Fields, field: int, default: int) -> int:
    return cast("int", fields.get(field, [default])[-1])


def _fields(message: bytes) -> dict[int, list[int | bytes]]:
    """Splits a message of the protocol buffers' wire format into its fields, by number."""
    out: dict[int, list[int | bytes]] = defaultdict(list)
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        size = {1: 8, 5: 4}.get(key & 7, 0)
        if key & 7 == 2:
            size, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            out[key >> 3].append(value)
        else:
            out[key >> 3].append(message[at : at + size])
            at += size
    return out


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Reads a number of seven bits a byte, the lowest first; gives it and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
