from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_inherit.base.errors import DataError
from megatron_inherit.data.loader import Loader, LoaderOptions, open_loader
from megatron_inherit.data.order import replica_samples, steps_of_order
from tests.support.text_data import random_documents, write_tokens


def make_loader(folder: Path, documents: list[np.ndarray], sequence: int = 8, **options: object) -> Loader:
    prefix = write_tokens(folder / "data", documents)
    return open_loader(LoaderOptions(str(prefix), sequence, split="all", **options))  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 7))
def test_unshuffled_samples_are_the_stream(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence: int, step: int
) -> None:
    stream = np.arange(sum(lengths))
    documents = np.split(stream, np.cumsum(lengths)[:-1])
    folder = tmp_path_factory.mktemp("loader")
    if len(stream) <= sequence:
        with pytest.raises(DataError, match="too small for one sample"):
            make_loader(folder, documents, sequence)
        return
    loader = make_loader(folder, documents, sequence, shuffle=False)
    assert loader.num_samples == (len(stream) - 1) // sequence
    parts = [loader.batch(start, min(step, loader.num_samples - start)) for start in range(0, loader.num_samples, step)]
    tokens = np.concatenate([part.tokens for part in parts]).ravel()
    labels = np.concatenate([part.labels for part in parts]).ravel()
    assert tokens.tolist() == stream[: len(tokens)].tolist()
    assert labels.tolist() == stream[1 : len(labels) + 1].tolist()
    assert all(part.loss_mask.all() for part in parts)


def test_each_epoch_has_every_window_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, random_documents(60), epochs=3, seed=5)
    n = loader.samples_per_epoch
    epochs = [loader.windows(np.arange(k * n, (k + 1) * n)).tolist() for k in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    across = loader.batch(n - 2, 4)
    assert np.array_equal(across.tokens[2:], loader.batch(n, 2).tokens), "a batch may cross epochs"


@pytest.mark.parametrize("boundary", ["packed", "reset", "none"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_the_order_is_the_same_for_every_world_and_micro_batch(tmp_path: Path, world: int, boundary: str) -> None:
    loader = make_loader(tmp_path, random_documents(80), boundary=boundary, epochs=0, seed=1)
    whole = loader.batch(48, 24)
    rows = []
    for replica in range(world):
        mine = replica_samples(2, global_batch=24, replica=replica, world=world)
        micro = max(1, len(mine) // 3)
        rows += [loader.batch(start, min(micro, mine.stop - start)) for start in range(mine.start, mine.stop, micro)]
    for field in ("tokens", "labels", "loss_mask", "sample_ids", "position_ids", "segment_ids"):
        parts = [getattr(row, field) for row in rows]
        expected = getattr(whole, field)
        assert (
            all(part is None for part in parts) if expected is None else np.array_equal(np.concatenate(parts), expected)
        )


def test_a_resumed_run_needs_only_its_step(tmp_path: Path) -> None:
    first = make_loader(tmp_path, random_documents(80), epochs=0, seed=1)
    for step in range(20):
        first.batch(step * 8, 8)
    again = open_loader(first.options)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.batch(10**15 + 3, 8).tokens, first.batch(10**15 + 3, 8).tokens)


def test_the_fingerprint_tells_what_changes_the_samples(tmp_path: Path) -> None:
    documents = random_documents(60)
    base = make_loader(tmp_path / "a", documents)
    assert make_loader(tmp_path / "b", documents).fingerprint == base.fingerprint, "a copy is the same data"
    assert make_loader(tmp_path / "a", documents, epochs=4).fingerprint == base.fingerprint, "more epochs may follow"
    others = [
        make_loader(tmp_path / "a", documents, seed=1),
        make_loader(tmp_path / "a", documents, 9),
        make_loader(tmp_path / "a", documents, boundary="reset"),
        make_loader(tmp_path / "a", documents, shuffle=False),
        make_loader(tmp_path / "c", documents[::-1]),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_reset_numbers_documents_and_restarts_positions(tmp_path: Path) -> None:
    documents = [np.arange(3), np.arange(10, 15), np.empty(0, np.int64), np.arange(20, 30)]
    loader = make_loader(tmp_path, documents, 8, boundary="reset", shuffle=False)
    batch = loader.batch(0, 2)
    assert batch.tokens[0].tolist() == [0, 1, 2, 10, 11, 12, 13, 14]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0] * 8]
    assert batch.loss_mask.tolist() == [[True, True, False, True, True, True, True, False], [True] * 8]


def test_none_keeps_documents_apart_and_counts_no_padding(tmp_path: Path) -> None:
    documents = [np.arange(1, 4), np.array([9]), np.arange(10, 20), np.arange(30, 39)]
    loader = make_loader(tmp_path, documents, 4, boundary="none", shuffle=False)
    batch = loader.batch(0, loader.num_samples)
    assert loader.num_samples == 1 + 0 + 3 + 2
    seen = [row[mask].tolist() for row, mask in zip(batch.tokens, batch.loss_mask, strict=True)]
    next_ones = [row[mask].tolist() for row, mask in zip(batch.labels, batch.loss_mask, strict=True)]
    assert seen == [[1, 2], [10, 11, 12, 13], [14, 15, 16, 17], [18], [30, 31, 32, 33], [34, 35, 36, 37]]
    assert next_ones == [[2, 3], [11, 12, 13, 14], [15, 16, 17, 18], [19], [31, 32, 33, 34], [35, 36, 37, 38]]
    assert loader.drawn(0, loader.num_samples) == {"data": batch.loss_mask.sum()}


def test_running_out_is_an_error_unless_epochs_allow_it(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, random_documents(60), epochs=2)
    loader.batch(loader.num_samples - 1, 1)
    with pytest.raises(DataError, match="too few tokens for the run"):
        loader.batch(loader.num_samples - 1, 2)
    make_loader(tmp_path, random_documents(60), epochs=0).batch(loader.num_samples - 1, 2)


def test_ids_beyond_the_vocabulary_are_found_with_file_and_offset(tmp_path: Path) -> None:
    documents = random_documents(60)
    documents[7][0] = 999
    place = sum(map(len, documents[:7]))
    documents[:7] = [np.minimum(one, 990) for one in documents[:7]]
    with pytest.raises(DataError, match=rf"data\.bin holds a token id beyond the vocabulary at offset {2 * place}\b"):
        make_loader(tmp_path, documents, vocab_size=999)
    make_loader(tmp_path, documents, vocab_size=1000)


def test_an_id_that_turns_bad_during_a_run_is_named(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, random_documents(60), vocab_size=1000, shuffle=False)
    file = tmp_path / "data.bin"
    with file.open("r+b") as stream:
        stream.seek(2 * 21)
        stream.write(b"\xff\xff")
    with pytest.raises(DataError, match=r"data\.bin .* at offset 42\. Got: 65535"):
        loader.batch(1, 4)


def test_a_bare_prefix_has_no_splits(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "data", random_documents(10))
    with pytest.raises(DataError, match="has no split 'train'"):
        open_loader(LoaderOptions(str(prefix), 8))
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_loader(LoaderOptions(str(tmp_path / "nowhere"), 8))


def test_order_rows_tell_what_batches_read(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, random_documents(60), epochs=2, seed=4)
    plain = open_loader(LoaderOptions(loader.options.path, 8, split="all", shuffle=False))
    for row in steps_of_order(loader, range(2, 4), global_batch=6, world=3):
        read = loader.batch(row.samples[0], len(row.samples))
        for window, tokens in zip(row.windows, read.tokens, strict=True):
            assert np.array_equal(plain.batch(window, 1).tokens[0], tokens)
    with pytest.raises(DataError, match="does not divide"):
        list(steps_of_order(loader, range(1), global_batch=7, world=2))


def test_many_shards_are_one_source(tmp_path: Path) -> None:
    from megatron_inherit.data.budget import make_subset
    from megatron_inherit.data.manifests import SubsetOptions

    documents = random_documents(90, seed=2)
    prefixes = [f"all={write_tokens(tmp_path / f'p{part}', documents[part::3])}" for part in range(3)]
    make_subset(prefixes, tmp_path / "subset", SubsetOptions(valid_share=0, test_share=0))
    loader = open_loader(LoaderOptions(str(tmp_path / "subset"), 8, shuffle=False))
    stream = np.concatenate([batch.tokens.ravel() for batch in [loader.batch(0, loader.num_samples)]])
    text = "," + ",".join(map(str, stream.tolist()))
    whole = [one for one in documents if "," + ",".join(map(str, one.tolist())) in text]
    assert len(whole) >= len(documents) - 1, "every document lies whole in the stream, but perhaps the last"
