"""Cached targets on disk: continued where they stopped, hashed, refused where they are another run's or damaged."""

import dataclasses
import errno
import fcntl
import itertools
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_inherit.arch.presets import preset
from megatron_inherit.base.errors import DataError, UsageError
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.distill.cache import CachedTargets, CacheKey, Manifest, shard_path, teacher_fingerprint
from megatron_inherit.distill.cache_writer import Share, write_cache
from megatron_inherit.inherit.inheritune import plan_fresh
from megatron_inherit.plan.execute import execute

KEY = CacheKey("teacher", "tokenizer", "data", 1.0, sequence_length=4, vocab_size=100)
WHOLE = Share()
WANTED = Manifest(KEY, "top", entries=3, num_samples=10, shard_samples=4)


def batch(start, count):
    return np.arange(start, start + count)


def predict(samples):
    ids = (samples[:, None, None] + np.arange(4)[:, None] + 7 * np.arange(3)) % KEY.vocab_size
    return ids, -(ids / 10).astype(np.float32)


def write(folder, wanted=WANTED, shards=None, share=WHOLE):
    return list(itertools.islice(write_cache(folder, wanted, batch, predict, share), shards))


def test_an_interrupted_cache_goes_on(tmp_path):
    assert write(tmp_path / "parts", shards=1) == [4]
    with pytest.raises(DataError, match="not complete"):
        CachedTargets(tmp_path / "parts", KEY)
    assert write(tmp_path / "parts") == [8, 10]
    assert write(tmp_path / "parts") == []
    assert write(tmp_path / "whole") == [4, 8, 10]
    for name in ("manifest.json", *(shard_path(tmp_path, shard).name for shard in range(3))):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_shares_are_joined_to_the_same_cache(tmp_path):
    assert write(tmp_path / "shared", share=Share(1, 2)) == [4]
    with pytest.raises(DataError, match=r"1 shares.*without --share"):
        CachedTargets(tmp_path / "shared", KEY)
    assert write(tmp_path / "shared", share=Share(0, 2), shards=1) == [4]
    assert write(tmp_path / "shared", share=Share(0, 2)) == [6]
    assert write(tmp_path / "shared") == [], "whoever joins makes nothing again"
    write(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "shared").iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()}
    for name in names:
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_what_a_share_lacks_is_made_by_the_one_who_joins(tmp_path):
    write(tmp_path, share=Share(0, 2), shards=1)
    assert write(tmp_path) == [8, 10]
    assert CachedTargets(tmp_path, KEY).manifest.complete


def test_two_writers_of_one_share_are_refused(tmp_path):
    running = write_cache(tmp_path, WANTED, batch, predict, Share(0, 2))
    next(running)
    for share in (Share(0, 2), WHOLE):
        with pytest.raises(UsageError, match="Another job is writing"):
            write(tmp_path, share=share)
    assert write(tmp_path, share=Share(1, 2)) == [4]
    assert list(running) == [6]
    assert write(tmp_path) == []


@pytest.mark.parametrize(("one", "other"), [(Share(0, 2), WHOLE), (WHOLE, Share(1, 2)), (Share(0, 2), Share(0, 2))])
def test_a_writer_is_refused_while_another_makes_its_first_shard(tmp_path, one, other):
    def predict_meanwhile(samples):
        with pytest.raises(UsageError, match="Another job is writing"):
            write(tmp_path, share=other)
        return predict(samples)

    assert list(write_cache(tmp_path, WANTED, batch, predict_meanwhile, one))
    write(tmp_path, share=other)


def test_a_file_system_that_locks_only_what_is_open_for_writing_locks_too(tmp_path, monkeypatch):
    flock = fcntl.flock

    def as_nfs(file, how):
        if how & fcntl.LOCK_EX and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    running = write_cache(tmp_path, WANTED, batch, predict, Share(0, 2))
    next(running)
    for share in (Share(0, 2), WHOLE):
        with pytest.raises(UsageError, match="Another job is writing"):
            write(tmp_path, share=share)


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
    for name, value in (("entries", 5), ("dtype", "bf16"), ("seed", 7)):
        with pytest.raises(DataError, match=name):
            write(tmp_path, dataclasses.replace(WANTED, **{name: value}), share=Share(0, 2))


@pytest.mark.parametrize("harm", ["changed", "missing"])
def test_a_damaged_shard_is_refused_and_made_anew(tmp_path, harm):
    write(tmp_path)
    path = shard_path(tmp_path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])) if harm == "changed" else path.unlink()
    with pytest.raises(DataError, match=r"missing or damaged.*same 'minherit share cache' again"):
        CachedTargets(tmp_path, KEY).read(np.array([0, 4]))
    if harm == "missing":
        with pytest.raises(DataError, match="missing or damaged"):
            CachedTargets(tmp_path, KEY)
    assert write(tmp_path) == [8]
    assert path.read_bytes() == whole
    assert CachedTargets(tmp_path, KEY).read(np.array([4]))[0].shape == (1, 4, 3)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 3}', '{"version": 3, "key": {"teacher": 1}}'])
def test_a_manifest_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest.json is (damaged|of another version).*again"):
        CachedTargets(tmp_path, KEY)


def test_a_run_longer_than_its_cache_is_refused_before_it_starts(tmp_path):
    write(tmp_path)
    CachedTargets(tmp_path, KEY).require(10)
    with pytest.raises(DataError, match=r"end at sample 10.*11 samples"):
        CachedTargets(tmp_path, KEY).require(11)


def written(folder, seed, change=None):
    """Writes a teacher and gives its fingerprint; ``change`` names one tensor of which one half differs."""
    execute(plan_fresh(preset("llama-tiny").with_layers(2), seed=seed), folder)
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        tensors[change][len(tensors[change]) // 2 :] += 1
    save_file(tensors, folder / "model.safetensors")
    with open_source(folder) as source:
        return teacher_fingerprint(source), dict(source.identity)


def test_teachers_of_one_shape_are_told_apart_by_their_values(tmp_path):
    first, identity = written(tmp_path / "first", 1)
    assert written(tmp_path / "again", 1)[0] == first
    other, same_identity = written(tmp_path / "other", 2)
    assert same_identity == identity, "headers and configuration alone would not tell them apart"
    assert other != first


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_one_changed_tensor_is_another_teacher(tmp_path, name):
    assert written(tmp_path / "changed", 1, name)[0] != written(tmp_path / "first", 1)[0]
