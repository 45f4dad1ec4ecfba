"""Cutting texts for a BPE model changes no id, and models with which it could are given them whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_inherit.data import text_parts
from megatron_inherit.data.text_parts import BLANK, parts
from megatron_inherit.data.tokenizer import open_tokenizer
from tests.support.text_data import make_texts, sentencepiece_model

SOURCE = [text.replace(" a", "   a") for text in make_texts(300, seed=8)]
ODD = ["a", " ", "  ", BLANK, "\n", "\t", "é", "🙂", "</s>", "\x00"]
WORDS = st.sampled_from([*SOURCE[0].split()[:12], *ODD])
TEXTS = st.lists(WORDS, max_size=30).flatmap(
    lambda words: st.sampled_from(["", " "]).map(lambda between: between.join(words))
)


def sentencepiece(folder: Path, **changed: object) -> Path:
    """A model that knows runs of blanks, as LLaMA's does."""
    kept: dict[str, object] = {"sentence_iterator": iter(SOURCE), "allow_whitespace_only_pieces": True}
    return sentencepiece_model(folder, **kept | changed)


def huggingface(folder: Path, *, by_word: bool = True, **changed: object) -> Path:
    """A tokenizer.json of LLaMA's kind; ``changed`` replaces its entries, dotted ones those of the model."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    if by_word:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SOURCE, trainer)
    description = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    description["added_tokens"] = description["added_tokens"][:3]
    for key, value in changed.items():
        inside = description["model"] if key.startswith("model.") else description
        inside[key.removeprefix("model.")] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    return folder / "tokenizer.json"


DROPPING = {
    "added_tokens": [],
    "model.unk_token": None,
    "model.byte_fallback": False,
    "model.vocab": {BLANK: 0, BLANK * 2: 1, "a": 2},
    "model.merges": [[BLANK, BLANK]],
}
"""What it does not know it drops, so that blanks on both sides of it become neighbours and merge."""


def added(content: str, **changed: bool) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {"id": 600, "content": content, **flags, **changed}


def whole(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer._model.encode(texts) if tokenizer.kind == "sentencepiece" else tokenizer._encode(texts)


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_parts, "PART", 2)


@pytest.fixture(scope="module", params=[sentencepiece, huggingface])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_tokenizer(request.param(tmp_path_factory.mktemp("llama")))


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
@example(texts=[f"aa{BLANK} é", "aa  é", "aa ", ""])
def test_parts_give_the_ids_of_the_whole(tokenizer: Any, texts: list[str]) -> None:
    assert tokenizer._may_cut
    assert tokenizer.encode_batch(texts) == whole(tokenizer, texts)


@settings(deadline=None)
@given(text=TEXTS)
def test_parts_are_the_text_less_the_blanks_between_them(text: str) -> None:
    found = parts(text)
    assert " ".join(found) == text
    assert all(found) or found == [""]
    assert all(len(part) >= 2 for part in found[:-1])


def test_a_long_text_is_cut() -> None:
    assert parts("one two  three four") == ["one", "two  three", "four"]


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (sentencepiece, {"split_by_whitespace": False, "vocab_size": 600}),
        (sentencepiece, {"model_type": "unigram", "vocab_size": 300}),
        (sentencepiece, {"normalization_rule_name": "nmt_nfkc"}),
        (sentencepiece, {"remove_extra_whitespaces": True}),
        (sentencepiece, {"add_dummy_prefix": False}),
        (sentencepiece, {"treat_whitespace_as_suffix": True}),
        (sentencepiece, {"user_defined_symbols": ["of the"]}),
        (huggingface, {"by_word": False}),
        (huggingface, {"normalizer": None}),
        (huggingface, {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}}),
        (huggingface, {"pre_tokenizer": {"type": "Whitespace"}}),
        (huggingface, {"added_tokens": [added("of the")]}),
        (huggingface, {"added_tokens": [added("the", rstrip=True)]}),
        (huggingface, {"added_tokens": [added("the")]}),
        (huggingface, DROPPING),
        (huggingface, {"model.ignore_merges": True}),
        (huggingface, {"model.end_of_word_suffix": "</w>"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else next(iter(value)),
)
def test_a_model_that_looks_across_blanks_is_not_given_parts(tmp_path: Path, make: Any, changed: Any) -> None:
    tokenizer: Any = open_tokenizer(make(tmp_path, **changed))
    texts = make_texts(20, seed=3)
    assert tokenizer.encode_batch(texts) == whole(tokenizer, texts)
    assert not tokenizer._may_cut


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (sentencepiece, {"split_by_whitespace": False, "vocab_size": 600}),
        (huggingface, {"by_word": False}),
        (huggingface, {"added_tokens": [added("the", rstrip=True)]}),
        (huggingface, {"added_tokens": [added("the")]}),
        (huggingface, DROPPING),
    ],
    ids=["sentencepiece", "huggingface", "rstrip", "blank behind an added token", "dropped"],
)
def test_what_the_whole_text_has_across_blanks_would_be_lost(tmp_path: Path, make: Any, changed: Any) -> None:
    tokenizer: Any = open_tokenizer(make(tmp_path, **changed))
    texts = [*make_texts(20, seed=3), "of the the the", "a ё a"]
    tokenizer.__dict__["_may_cut"] = True
    assert tokenizer.encode_batch(texts) != whole(tokenizer, texts)


def test_a_model_that_does_not_mark_blanks_is_not_given_parts(tmp_path: Path) -> None:
    file = sentencepiece(tmp_path)
    unmarked = b"\x1a\x02\x28\x00"  # normalizer_spec { escape_whitespaces: false }, merged into what is there
    file.write_bytes(file.read_bytes() + unmarked)
    tokenizer: Any = open_tokenizer(file)
    assert tokenizer._model.encode("a b", out_type=str) == ["<0x20>", "a", "<0x20>", "b"]
    assert not tokenizer._may_cut


def test_a_model_that_does_not_know_the_blank_is_not_given_parts(tmp_path: Path) -> None:
    """Neighbours that are not known become one unknown, also across a blank that is not known."""
    file = sentencepiece_model(tmp_path, byte_fallback=False, vocab_size=150)
    known, other = (b"\x0a\x03" + char.encode() for char in (BLANK, "⌂"))
    assert file.read_bytes().count(known) == 1
    file.write_bytes(file.read_bytes().replace(known, other))
    tokenizer: Any = open_tokenizer(file)
    texts = ["ёё ёё"]
    assert tokenizer.encode_batch(texts) == whole(tokenizer, texts)
    tokenizer.__dict__["_may_cut"] = True
    assert tokenizer.encode_batch(texts) != whole(tokenizer, texts)
