from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_inherit.base.errors import DataError
from megatron_inherit.data.giga import choose_encoder
from megatron_inherit.data.manifests import TokenizerRecord
from megatron_inherit.data.tokenizer import Tokenizer, flatten, made_the_ids, open_tokenizer
from tests.support.text_data import byte_level_folder, gpt2_folder, make_texts, sentencepiece_model

TEXTS = [*make_texts(40), "a </s> b <|endoftext|> c", "  two  blanks ", "\n\n\ttabs", "🙂 emoji é"]


@pytest.fixture(scope="module", params=["bytes", "hf", "gpt2", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    make = {"hf": byte_level_folder, "gpt2": gpt2_folder, "sentencepiece": sentencepiece_model}
    path = "bytes" if request.param == "bytes" else make[request.param](folder / "tokenizer")
    opened = open_tokenizer(path)
    assert opened.kind == request.param
    return opened


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocab_size


def test_text_never_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    for ids in tokenizer.encode_batch(TEXTS):
        assert tokenizer.eos_id not in ids
        assert tokenizer.bos_id is None or tokenizer.bos_id not in ids


def test_byte_lengths_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.byte_lengths()
    assert len(lengths) == tokenizer.vocab_size
    assert lengths[tokenizer.eos_id] == 0
    dummy = 1 if tokenizer.kind == "sentencepiece" else 0  # SentencePiece puts a blank before a text
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert lengths[ids].sum() - dummy == len(text.encode())


def test_gigatoken_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    pytest.importorskip("gigatoken")
    if tokenizer.kind == "bytes":
        with pytest.raises(DataError, match="cannot take this vocabulary"):
            choose_encoder(tokenizer, "gigatoken", TEXTS)
        return
    ids, lengths = choose_encoder(tokenizer, "gigatoken", TEXTS[:20])(TEXTS)
    own_ids, own_lengths = flatten(tokenizer.encode_batch(TEXTS))
    assert np.array_equal(ids, own_ids)
    assert np.array_equal(lengths, own_lengths)


def test_gigatoken_without_what_it_needs_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where awkward is missing, gigatoken imports, but gives ids in another form."""
    found = {"gigatoken": object(), "awkward": None}
    monkeypatch.setattr("importlib.util.find_spec", found.__getitem__)
    opened = open_tokenizer(byte_level_folder(tmp_path / "t"))
    assert np.array_equal(choose_encoder(opened, "auto", TEXTS)(TEXTS)[0], flatten(opened.encode_batch(TEXTS))[0])


def test_gigatoken_that_differs_is_not_used(tmp_path: Path) -> None:
    """The tokenizer of the sample drops every text to one letter, so gigatoken's ids cannot be its."""
    pytest.importorskip("gigatoken")
    opened = open_tokenizer(byte_level_folder(tmp_path / "t"))
    encode = opened.encode_batch
    opened.encode_batch = lambda texts: encode([text[:1] for text in texts])  # type: ignore[method-assign]
    with pytest.raises(DataError, match="gives other ids on a sample"):
        choose_encoder(opened, "gigatoken", TEXTS)
    assert np.array_equal(choose_encoder(opened, "auto", TEXTS)(TEXTS)[0], flatten(opened.encode_batch(TEXTS))[0])


def test_the_fingerprint_is_of_the_vocabulary_and_the_ends(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "t")
    first = open_tokenizer(folder)
    assert open_tokenizer(folder / "tokenizer.json").fingerprint == first.fingerprint
    other = open_tokenizer(folder, eos="<|im_end|>")
    assert (other.eos_id, other.fingerprint == first.fingerprint) == (1, False)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert open_tokenizer(folder).fingerprint != first.fingerprint


@pytest.mark.parametrize("kind", ["hf", "gpt2", "sentencepiece"])
def test_the_files_that_made_the_ids_are_known_again(tmp_path: Path, kind: str) -> None:
    make = {"hf": byte_level_folder, "gpt2": gpt2_folder, "sentencepiece": sentencepiece_model}
    opened = open_tokenizer(make[kind](tmp_path / "tokenizer"))
    record = TokenizerRecord(
        kind=opened.kind, path=opened.path, fingerprint=opened.fingerprint, vocab_size=opened.vocab_size,
        eos_id=opened.eos_id, bos_id=opened.bos_id, append_eos=True, prepend_bos=False,
    )  # fmt: skip
    files = {file.name: file.read_bytes() for file in (tmp_path / "tokenizer").iterdir()}
    assert made_the_ids(record, files) is True
    assert made_the_ids(record, {name: content + b" " for name, content in files.items()}) is False
    assert made_the_ids(record, {"LICENSE": b""}) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer.model", "no model", "cannot be read"),
        ("vocab.json", "{}", r"merges\.txt is missing"),
        ("other.txt", "", "No tokenizer at"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        open_tokenizer(tmp_path)


def test_bytes_have_no_token_by_a_name() -> None:
    with pytest.raises(DataError, match="no token by a name"):
        open_tokenizer("bytes", eos="</s>")


def test_an_unknown_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no token '<nope>'"):
        open_tokenizer(byte_level_folder(tmp_path / "t"), eos="<nope>")
    (tmp_path / "t" / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match="is not JSON"):
        open_tokenizer(tmp_path / "t")
