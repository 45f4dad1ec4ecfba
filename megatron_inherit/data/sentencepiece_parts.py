"""Cuts a text where a SentencePiece BPE model gives its parts, one by one, the ids that it gives the whole.

The model merges the best pair of neighbours anywhere in the text until no pair is a piece. Its queue outgrows the
caches with the length of the text, so that short parts are half as fast again. A text may be cut at a blank where no
merge crosses one: where no piece holds the blank mark after another character, and what comes before the merges (the
normalizer, user-defined symbols) takes no blank together with its neighbours. The part loses its blank, for the model
puts one before every text.

The fields are those of ``sentencepiece_model.proto``; its generated module would ask for the protobuf release that it
was made with.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

BLANK = "\u2581"
PART = 1000
"""Characters after which the next place to cut is looked for."""

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_BPE, _USER_DEFINED = 2, 4
_CUT = re.compile(f"(?<=[^ {BLANK}]) (?=.)", re.DOTALL)

Fields = Mapping[int, Sequence[int | bytes]]


def parts(text: str) -> list[str]:
    """Cuts a text at blanks that follow a character which is none; the blank itself belongs to neither part.

    Every part but the last is at least :data:`PART` characters long, and none is empty unless the text is.
    """
    found, begin = [], 0
    while cut := _CUT.search(text, begin + PART):
        found.append(text[begin : cut.start()])
        begin = cut.end()
    return [*found, text[begin:]]


def may_be_cut(model: Any) -> bool:
    """Tells whether a ``SentencePieceProcessor`` gives parts the ids of the whole."""
    top = _fields(model.serialized_model_proto())
    trainer, normalizer = (_fields(cast("bytes", top.get(number, [b""])[-1])) for number in (_TRAINER, _NORMALIZER))
    pieces = model.id_to_piece(list(range(model.get_piece_size())))
    own = _user_defined(cast("list[bytes]", top[_PIECES]))
    crossing = any(BLANK in piece.lstrip(BLANK) for piece in pieces) or any(BLANK in one or " " in one for one in own)
    known = BLANK in pieces  # neighbours that are not known become one unknown
    return _merges_characters(trainer, normalizer) and known and not crossing


def _merges_characters(trainer: Fields, normalizer: Fields) -> bool:
    """Says that the model is BPE over the characters as they are, with a blank put before the text."""
    bpe, rules = _number(trainer, 3, 1) == _BPE, normalizer.get(2, [b""])[-1]
    before, squeezed = (_number(normalizer, field, 1) for field in (3, 4))
    return bpe and not rules and bool(before) and not squeezed


def _user_defined(pieces: Sequence[bytes]) -> list[str]:
    """Gives the pieces that are taken out of a text before anything is merged."""
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
