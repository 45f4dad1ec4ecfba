"""Cutting texts for SentencePiece changes no id, and models with which it could are encoded whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_inherit.data import sentencepiece_parts
from megatron_inherit.data.sentencepiece_parts import BLANK, parts
from megatron_inherit.data.tokenizer import SentencePieceTokenizer, open_tokenizer
from tests.support.text_data import make_texts, sentencepiece_model

WORDS = st.sampled_from(
    [*make_texts(3, seed=8)[0].split()[:12], "a", " ", "  ", BLANK, "\n", "\t", "é", "🙂", "</s>", "\x00"]
)
TEXTS = st.lists(WORDS, max_size=30).flatmap(
    lambda words: st.sampled_from(["", " "]).map(lambda between: between.join(words))
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    runs_of_blanks = iter([text.replace(" a", "   a") for text in make_texts(300, seed=8)])
    made = opened(tmp_path_factory.mktemp("llama"), sentence_iterator=runs_of_blanks, allow_whitespace_only_pieces=True)
    assert BLANK * 2 in made._model.id_to_piece(list(range(made.vocab_size)))
    return made


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece_parts, "PART", 2)


def opened(folder: Path, **changed: object) -> Any:
    return open_tokenizer(sentencepiece_model(folder, **changed))


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
@example(texts=[f"aa{BLANK} é", "aa  é", "aa ", ""])
def test_parts_give_the_ids_of_the_whole(model: Any, texts: list[str]) -> None:
    assert model._may_be_cut
    assert model.encode_batch(texts) == model._model.encode(texts)


@settings(deadline=None)
@given(text=TEXTS)
def test_parts_are_the_text_less_the_blanks_between_them(text: str) -> None:
    found = parts(text)
    assert " ".join(found) == text
    assert all(found) or found == [""]
    assert all(len(part) >= 2 for part in found[:-1])


def test_a_long_text_is_cut() -> None:
    assert parts("one two  three") == ["one", "two", " three"]


@pytest.mark.parametrize(
    "changed",
    [
        {"split_by_whitespace": False, "vocab_size": 600},
        {"model_type": "unigram", "vocab_size": 300},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["of the"]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_model_that_looks_across_blanks_is_not_given_parts(tmp_path: Path, changed: dict[str, Any]) -> None:
    tokenizer = opened(tmp_path, **changed)
    texts = make_texts(20, seed=3)
    assert tokenizer.encode_batch(texts) == tokenizer._model.encode(texts)
    assert not tokenizer._may_be_cut


def test_pieces_across_blanks_would_be_lost(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, split_by_whitespace=False, vocab_size=600)
    texts = make_texts(20, seed=3)
    tokenizer.__dict__["_may_be_cut"] = True
    assert tokenizer.encode_batch(texts) != tokenizer._model.encode(texts)


def test_a_model_that_does_not_know_the_blank_is_not_given_parts(tmp_path: Path) -> None:
    """Neighbours that are not known become one unknown, also across a blank that is not known."""
    file = sentencepiece_model(tmp_path, byte_fallback=False, vocab_size=150)
    known, other = (b"\x0a\x03" + char.encode() for char in (BLANK, "⌂"))
    assert file.read_bytes().count(known) == 1
    file.write_bytes(file.read_bytes().replace(known, other))
    tokenizer: Any = open_tokenizer(file)
    texts = ["ёё ёё"]
    assert tokenizer.encode_batch(texts) == tokenizer._model.encode(texts)
    tokenizer.__dict__["_may_be_cut"] = True
    assert tokenizer.encode_batch(texts) != tokenizer._model.encode(texts)
