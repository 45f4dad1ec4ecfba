from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from megatron_inherit.base.errors import DataError
from megatron_inherit.data.indexed import IndexedFile
from megatron_inherit.data.ingest import IngestOptions, ingest
from megatron_inherit.data.loader import LoaderOptions, open_loader
from megatron_inherit.data.merge import merge_domains
from megatron_inherit.data.tokenize import DOCUMENT_DTYPE, TokenizeOptions, tokenize
from megatron_inherit.data.tokenizer import open_tokenizer
from tests.support.text_data import byte_level_folder, make_texts, sentencepiece_model, write_jsonl

TEXTS = make_texts(60)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "in" / "c4.jsonl", TEXTS)
    write_jsonl(tmp_path / "in" / "book.jsonl", TEXTS[:10])
    ingest([str(tmp_path / "in")], tmp_path / "text", IngestOptions(layout="redpajama", shard_bytes=3000))
    return tmp_path / "text"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.suffix != ".json" and p.is_file()
    }


def test_ids_ends_and_document_tables(tmp_path: Path, text: Path) -> None:
    model = sentencepiece_model(tmp_path / "sp")
    own = open_tokenizer(model)
    made = tokenize(text, tmp_path / "out", TokenizeOptions(tokenizer=str(model), prepend_bos=True))
    assert len(made.shards) > 2
    at = {"c4": 0, "books": 0}
    for shard in made.shards:
        file = IndexedFile(tmp_path / "out" / shard.name)
        table = np.fromfile(tmp_path / "out" / f"{shard.name}.docs", DOCUMENT_DTYPE)
        for number in range(len(file)):
            expected = TEXTS[at[shard.domain]]
            ids = file[number].tolist()
            assert ids == [own.bos_id, *own.encode_batch([expected])[0], own.eos_id]
            assert table["bytes"][number] == len(expected.encode())
            at[shard.domain] += 1
        assert shard.max_token == int(file.tokens.max())
        assert shard.text_bytes == int(table["bytes"].sum())
    assert at == {"c4": 60, "books": 10}
    plain = tokenize(text, tmp_path / "plain", TokenizeOptions(tokenizer=str(model), append_eos=False))
    assert sum(s.tokens for s in plain.shards) == sum(s.tokens for s in made.shards) - 140


def test_equal_texts_have_equal_hashes_whatever_the_tokenizer(tmp_path: Path, text: Path) -> None:
    tables = []
    for name in ("bytes", str(byte_level_folder(tmp_path / "hf"))):
        made = tokenize(text, tmp_path / f"out {len(tables)}", TokenizeOptions(tokenizer=name))
        parts = [np.fromfile(tmp_path / f"out {len(tables)}" / f"{s.name}.docs", DOCUMENT_DTYPE) for s in made.shards]
        tables.append(np.concatenate(parts))
    assert np.array_equal(tables[0], tables[1])
    assert len(np.unique(tables[0]["low"])) == 60


@pytest.mark.slow
def test_workers_and_backends_write_the_same_bytes(tmp_path: Path, text: Path) -> None:
    options = IngestOptions(layout="redpajama", shard_bytes=3000)
    ingest([str(tmp_path / "in")], tmp_path / "text2", options, workers=2)
    assert contents(tmp_path / "text2") == contents(text)
    folder = str(byte_level_folder(tmp_path / "hf"))
    tokenize(text, tmp_path / "one", TokenizeOptions(tokenizer=folder, backend="own"))
    tokenize(text, tmp_path / "two", TokenizeOptions(tokenizer=folder), workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_only_shards_without_a_record_are_done_again(tmp_path: Path, text: Path) -> None:
    options = TokenizeOptions(tokenizer="bytes")
    made = tokenize(text, tmp_path / "out", options)
    before = contents(tmp_path / "out")
    times = {shard.name: (tmp_path / "out" / f"{shard.name}.bin").stat().st_mtime_ns for shard in made.shards}
    (tmp_path / "out" / "manifest.json").unlink()
    lost = made.shards[1].name
    (tmp_path / "out" / f"{lost}.json").unlink()
    (tmp_path / "out" / f"{lost}.bin").write_bytes(b"half")
    again = tokenize(text, tmp_path / "out", options)
    assert contents(tmp_path / "out") == before
    redone = {n for n, t in times.items() if (tmp_path / "out" / f"{n}.bin").stat().st_mtime_ns != t}
    assert redone == {lost}
    assert [shard.tokens for shard in again.shards] == [shard.tokens for shard in made.shards]


@pytest.mark.parametrize("change", ["cut .bin", "flip .bin", "gone .idx", "flip .docs"])
def test_the_same_call_makes_a_damaged_shard_again(
    tmp_path: Path, text: Path, change: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_inherit"), "propagate", True)
    options, out = TokenizeOptions(tokenizer="bytes"), tmp_path / "out"
    made = tokenize(text, out, options)
    before = contents(out)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*") if made.shards[0].name in str(path)}
    how, suffix = change.split()
    file = out / f"{made.shards[1].name}{suffix}"
    data = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-3] if how == "cut" else bytes([data[0] ^ 1]) + data[1:])
    tokenize(text, out, options)
    assert f"{file}" in caplog.text
    assert "It is made again" in caplog.text
    assert contents(out) == before
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    open_loader(LoaderOptions(str(out), 16, split="all", verify="full"))


def test_a_changed_text_shard_is_refused_with_its_place(tmp_path: Path, text: Path) -> None:
    shard = next((text / "c4").iterdir())
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"fox", b"fax"))
    with pytest.raises(DataError, match=rf"{shard.name} was changed since it was written: .* offset 0"):
        tokenize(text, tmp_path / "out", TokenizeOptions(tokenizer="bytes"))
    shard.write_bytes(data[:-5])
    with pytest.raises(DataError, match=rf"{shard.name} ends at offset {len(data) - 5}"):
        tokenize(text, tmp_path / "out", TokenizeOptions(tokenizer="bytes"))


def test_another_tokenizer_or_rule_is_another_folder(tmp_path: Path, text: Path) -> None:
    tokenize(text, tmp_path / "out", TokenizeOptions(tokenizer="bytes"))
    with pytest.raises(DataError, match="append_eos was True and is False"):
        tokenize(text, tmp_path / "out", TokenizeOptions(tokenizer="bytes", append_eos=False))
    with pytest.raises(DataError, match="says no BOS token"):
        tokenize(text, tmp_path / "out2", TokenizeOptions(tokenizer="bytes", prepend_bos=True))
    with pytest.raises(DataError, match="not a finished folder of text"):
        tokenize(tmp_path / "in", tmp_path / "out2", TokenizeOptions(tokenizer="bytes"))


@pytest.mark.parametrize("change", ["cut", "flip", "gone", "index"])
def test_damaged_token_files_are_found_before_the_first_step(tmp_path: Path, text: Path, change: str) -> None:
    made = tokenize(text, tmp_path / "out", TokenizeOptions(tokenizer="bytes"))
    file = tmp_path / "out" / f"{made.shards[1].name}.{'idx' if change == 'index' else 'bin'}"
    data = bytearray(file.read_bytes())
    if change == "gone":
        file.unlink()
    elif change == "cut":
        file.write_bytes(data[:-10])
    else:
        data[50] ^= 1
        file.write_bytes(data)
    message = {"cut": f"ends at offset {len(data) - 10}", "gone": "is missing"}.get(change, "changed .* offset 0")
    options = LoaderOptions(str(tmp_path / "out"), 16, split="all")
    with pytest.raises(DataError, match=rf"{file.name} .*{message}"):
        open_loader(options)


def test_a_copy_with_other_times_is_hashed_once(tmp_path: Path, text: Path) -> None:
    import os

    made = tokenize(text, tmp_path / "out", TokenizeOptions(tokenizer="bytes"))
    file = tmp_path / "out" / f"{made.shards[0].name}.bin"
    os.utime(file, ns=(1, 1))
    options = LoaderOptions(str(tmp_path / "out"), 16, split="all")
    first = open_loader(options).fingerprint
    stamps = json.loads((tmp_path / "out" / ".verified.json").read_text())
    assert stamps == {str(file): 1}
    assert open_loader(options).fingerprint == first
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(1, 1))
    open_loader(options)  # same size and time: only a full check can tell
    with pytest.raises(DataError, match="offset 0"):
        open_loader(LoaderOptions(str(tmp_path / "out"), 16, split="all", verify="full"))


def test_a_vocabulary_that_is_too_small_is_found_with_the_place(tmp_path: Path, text: Path) -> None:
    tokenize(text, tmp_path / "out", TokenizeOptions(tokenizer="bytes"))
    with pytest.raises(DataError, match=r"\.bin holds a token id beyond the vocabulary at offset \d+\. Got: 256"):
        open_loader(LoaderOptions(str(tmp_path / "out"), 16, split="all", vocab_size=256))


def test_merged_domains_hold_the_shards_in_order(tmp_path: Path, text: Path) -> None:
    made = tokenize(text, tmp_path / "out", TokenizeOptions(tokenizer="bytes"))
    merge_domains(tmp_path / "out", {"c4": tmp_path / "c4", "books": tmp_path / "books"})
    for domain, count in (("c4", 60), ("books", 10)):
        parts = [IndexedFile(tmp_path / "out" / s.name).tokens for s in made.shards if s.domain == domain]
        file = IndexedFile(tmp_path / domain)
        assert np.array_equal(file.tokens, np.concatenate(parts))
        assert file.num_documents == count


@pytest.mark.slow
def test_an_error_in_a_worker_stops_the_job_and_keeps_its_words(tmp_path: Path, text: Path) -> None:
    shard = next((text / "c4").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{shard.name} ends at offset \d+\. Got: "):
        tokenize(text, tmp_path / "out", TokenizeOptions(tokenizer="bytes"), workers=2)
    assert not (tmp_path / "out" / "manifest.json").exists()
