from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_inherit.base.errors import DataError
from megatron_inherit.data.indexed import IndexedFile, IndexedWriter, first_token_beyond, token_dtype
from tests.support.text_data import random_documents, write_tokens


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 999), max_size=12), max_size=30),
    st.sampled_from([1000, 65499, 65500]),
    st.integers(1, 7),
)
def test_documents_come_back(tmp_path_factory: pytest.TempPathFactory, documents: list, vocab: int, step: int) -> None:
    prefix = tmp_path_factory.mktemp("indexed") / "some.name"
    with IndexedWriter(prefix.with_name("some.name.bin"), token_dtype(vocab)) as writer:
        for begin in range(0, len(documents), step):
            part = documents[begin : begin + step]
            writer.add_documents(
                np.array([token for one in part for token in one], np.int64), [len(one) for one in part]
            )
    file = IndexedFile(prefix.with_name("some.name.idx"))
    assert [file[number].tolist() for number in range(len(file))] == documents
    assert file.dtype == ("u2" if vocab < 65500 else "i4")
    bounds = np.cumsum([0, *map(len, documents)]).tolist()
    assert file.bounds().tolist() == bounds
    assert file.bounds(2, 5).tolist() == bounds[2:6]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_bytes_equal_megatron_core(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = random_documents(200, seed=3)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    with IndexedWriter(tmp_path / "ours", np.dtype(dtype)) as writer:
        writer.add_documents(np.concatenate(documents), [len(one) for one in documents])
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    reader = indexed_dataset.IndexedDataset(str(tmp_path / "ours"))
    assert all(np.array_equal(reader[number], document) for number, document in enumerate(documents))

    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "joined.bin"), dtype=np.dtype(dtype).type)
    builder.add_index(str(tmp_path / "ours"))
    builder.add_index(str(tmp_path / "theirs"))
    builder.add_document(torch.arange(10), [4, 6])
    builder.finalize(str(tmp_path / "joined.idx"))
    file = IndexedFile(tmp_path / "joined")
    assert file.num_documents == 401
    assert file[400].tolist() == list(range(10)), "a document of two sequences"
    with IndexedWriter(tmp_path / "again", np.dtype(dtype)) as writer:
        writer.add_indexed(file)
    assert (tmp_path / "again.idx").read_bytes() == (tmp_path / "joined.idx").read_bytes()
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "joined.bin").read_bytes()


def test_nothing_is_left_of_a_failed_write(tmp_path: Path) -> None:
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "a", token_dtype(10)) as writer:
        writer.add_documents(np.arange(3), [3])
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.idx does not exist"):
        IndexedFile(tmp_path / "none")


@pytest.mark.parametrize("keep", [0, 5, 20, 33, 100, -1])
def test_a_truncated_index_is_refused(tmp_path: Path, keep: int) -> None:
    prefix = write_tokens(tmp_path / "a", random_documents(20))
    index = prefix.with_name("a.idx")
    index.write_bytes(index.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a\.idx .*offset"):
        IndexedFile(prefix)


@pytest.mark.parametrize(("change", "size"), [("cut", -1), ("grown", 1)])
def test_a_bin_of_another_size_is_refused_with_its_end(tmp_path: Path, change: str, size: int) -> None:
    prefix = write_tokens(tmp_path / "a", random_documents(20))
    tokens = prefix.with_name("a.bin")
    data = tokens.read_bytes()
    tokens.write_bytes(data[:size] if size < 0 else data + b"x")
    with pytest.raises(DataError, match=rf"a\.bin ends at offset {len(data) + size}"):
        IndexedFile(prefix)


def test_every_changed_number_of_an_index_is_found_with_its_offset(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "a", random_documents(6))
    index = prefix.with_name("a.idx")
    good = index.read_bytes()
    places = [(34 + 4 * 3, 34 + 24 + 8 * 3), (34 + 24 + 8 * 4, 34 + 24 + 8 * 4)]
    for changed, named in places:
        index.write_bytes(good[:changed] + b"\x7f" + good[changed + 1 :])
        with pytest.raises(DataError, match=rf"offset ({named}|{named + 8})\b"):
            IndexedFile(prefix)
    for changed in range(34 + 24 + 48, len(good), 8):
        index.write_bytes(good[:changed] + b"\x7f" + good[changed + 1 :])
        with pytest.raises(DataError, match=r"document boundaries \(offset 106\)"):
            IndexedFile(prefix)


@pytest.mark.parametrize(("at", "value"), [(0, b"X"), (9, b"\x02"), (17, b"\x09")])
def test_a_foreign_header_is_refused(tmp_path: Path, at: int, value: bytes) -> None:
    prefix = write_tokens(tmp_path / "a", random_documents(3))
    index = prefix.with_name("a.idx")
    data = bytearray(index.read_bytes())
    data[at : at + 1] = value
    index.write_bytes(bytes(data))
    with pytest.raises(DataError, match="offset"):
        IndexedFile(prefix)


def test_a_pickle_is_not_an_index(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "a", random_documents(3))
    prefix.with_name("a.idx").write_bytes(b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00idtR." + bytes(100))
    with pytest.raises(DataError, match="not a Megatron index"):
        IndexedFile(prefix)


def test_the_first_id_beyond_a_vocabulary() -> None:
    tokens = np.array([1, 2, 50, 3, 60], np.uint16)
    assert first_token_beyond(tokens, 61) is None
    assert first_token_beyond(tokens, 60, chunk=2) == 4
    assert first_token_beyond(tokens, 50, chunk=2) == 2
    assert first_token_beyond(np.array([0, -1], np.int32), 50) == 1
