"""Cached targets on disk: continued where they stopped, hashed, refused where they are another run's or damaged."""

import dataclasses
import itertools

import numpy as np
import pytest

from megatron_inherit.base.errors import DataError
from megatron_inherit.distill.cache import CachedTargets, CacheKey, Manifest, shard_path, write_cache

KEY = CacheKey("teacher", "tokenizer", "data", 1.0, sequence_length=4, vocab_size=100)
WANTED = Manifest(KEY, "top", entries=3, num_samples=10, shard_samples=4)


def batch(start, count):
    return np.arange(start, start + count)


def predict(samples):
    ids = (samples[:, None, None] + np.arange(4)[:, None] + 7 * np.arange(3)) % KEY.vocab_size
    return ids, -(ids / 10).astype(np.float32)


def write(folder, wanted=WANTED, shards=None):
    return list(itertools.islice(write_cache(folder, wanted, batch, predict), shards))


def test_an_interrupted_cache_goes_on(tmp_path):
    assert write(tmp_path / "parts", shards=1) == [4]
    with pytest.raises(DataError, match="not complete"):
        CachedTargets(tmp_path / "parts", KEY)
    assert write(tmp_path / "parts") == [8, 10]
    assert write(tmp_path / "parts") == []
    assert write(tmp_path / "whole") == [4, 8, 10]
    for name in ("manifest.json", *(shard_path(tmp_path, shard).name for shard in range(3))):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_targets_come_back_by_sample_in_any_order(tmp_path):
    write(tmp_path)
    samples = np.array([9, 0, 5])
    ids, log_probs = CachedTargets(tmp_path, KEY).read(samples)
    wanted_ids, wanted = predict(samples)
    assert np.array_equal(ids, wanted_ids)
    assert np.array_equal(log_probs, wanted.astype(np.float16).astype(np.float32))
    with pytest.raises(DataError, match="end at sample 10"):
        CachedTargets(tmp_path, KEY).read(np.array([10]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("teacher", "x"), ("tokenizer", "x"), ("data", "x"), ("temperature", 2.0), ("sequence_length", 8)],
)
def test_another_runs_targets_are_refused_by_name(tmp_path, field, value):
    write(tmp_path)
    with pytest.raises(DataError, match=field.replace("_", " ")):
        CachedTargets(tmp_path, dataclasses.replace(KEY, **{field: value}))


def test_a_folder_of_another_cache_is_not_continued(tmp_path):
    write(tmp_path, shards=1)
    with pytest.raises(DataError, match="entries"):
        write(tmp_path, dataclasses.replace(WANTED, entries=5))


@pytest.mark.parametrize("harm", ["changed", "missing"])
def test_a_damaged_shard_is_refused_when_it_is_read(tmp_path, harm):
    write(tmp_path)
    path = shard_path(tmp_path, 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data) if harm == "changed" else path.unlink()
    targets = CachedTargets(tmp_path, KEY)
    targets.read(np.array([0, 3]))
    with pytest.raises(DataError, match="missing or damaged"):
        targets.read(np.array([4]))
