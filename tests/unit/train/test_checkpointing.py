"""Which checkpoints are deleted, on a folder with real files."""

import weakref

import pytest
import torch

from megatron_inherit.checkpoint.formats import native
from megatron_inherit.engines.base import Part, Topology
from megatron_inherit.train.checkpointing import KeepPolicy, Saver, list_steps, step_folder
from megatron_inherit.train.snapshot import Snapshots


class OneRank:
    """As much of an engine as saving needs: one rank that holds one tensor."""

    topology = Topology(rank=0, world_size=1, data_rank=0, data_size=1)

    def parts(self):
        yield Part("embed.weight", "weight", (4, 2), (0, 0), (4, 2), torch.arange(8.0).view(4, 2))

    def any_rank(self, flag):
        return flag

    def barrier(self):
        pass


def save(folder, *steps, last, bad_steps=0):
    saver = Saver(folder, OneRank(), token="t", keep=KeepPolicy(last), asynchronous=False)
    for step in steps:
        saver.save(step, {"run": {"bad_steps": bad_steps}}, {"step": step})
    saver.close()


@pytest.mark.parametrize("last", [1, 2])
def test_a_damaged_later_checkpoint_does_not_push_out_the_whole_ones(tmp_path, last):
    save(tmp_path, 5, 10, 12, last=3)
    (step_folder(tmp_path, 12) / "rank_00000.safetensors").write_bytes(b"cut")
    save(tmp_path, 11, last=last)  # resumed after step 10
    assert list_steps(tmp_path) == [5, 10, 11, 12][-1 - last :]
    native.verify(step_folder(tmp_path, 11))


def test_the_newest_checkpoint_without_bad_steps_stays_for_a_rollback(tmp_path):
    save(tmp_path, 5, 10, last=1)
    save(tmp_path, 12, last=1, bad_steps=2)
    save(tmp_path, 13, last=1, bad_steps=3)
    assert list_steps(tmp_path) == [10, 13]
    save(tmp_path, 15, last=1)
    assert list_steps(tmp_path) == [15]


def test_a_session_that_leaves_does_not_wait_until_old_checkpoints_are_deleted(tmp_path, monkeypatch):
    saver = Saver(tmp_path, OneRank(), token="t", keep=KeepPolicy(1), asynchronous=False)
    saver.save(5, {}, {})
    shares = []

    def slow(path, *, share, shares_of=shares, **more):
        shares_of.append(share)
        assert saver._hurry.wait(20)

    monkeypatch.setattr(native, "verify", slow)
    saver.save(10, {}, {})
    saver.save(11, {}, {}, leaving=True)
    saver.close(wait=False)
    assert list_steps(tmp_path) == [5, 10, 11]
    assert shares == [0]
    after = Saver(tmp_path, OneRank(), token="u", keep=KeepPolicy(1), asynchronous=False)
    after.prune(11, verified=True)
    after.close()
    assert list_steps(tmp_path) == [11]


def test_buffers_of_parts_that_are_gone_are_given_back():
    def part(name):
        return Part(name, "weight", (4,), (0,), (4,), torch.arange(4.0))

    snapshots = Snapshots(copy=True)
    stored = snapshots.take([part("a"), part("b")])
    kept = weakref.ref(snapshots._buffers["weight", "a", (0,), None])
    gone = weakref.ref(snapshots._buffers["weight", "b", (0,), None])
    del stored
    snapshots.take([part("a"), part("c")])
    assert kept() is not None
    assert gone() is None
