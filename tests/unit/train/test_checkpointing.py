"""Which checkpoints are deleted, on a folder with real files."""

import pytest
import torch

from megatron_inherit.checkpoint.formats import native
from megatron_inherit.engines.base import Part, Topology
from megatron_inherit.train.checkpointing import KeepPolicy, Saver, list_steps, step_folder


class OneRank:
    """As much of an engine as saving needs: one rank that holds one tensor."""

    topology = Topology(rank=0, world_size=1, data_rank=0, data_size=1)

    def parts(self):
        yield Part("embed.weight", "weight", (4, 2), (0, 0), (4, 2), torch.arange(8.0).view(4, 2))

    def any_rank(self, flag):
        return flag

    def barrier(self):
        pass


def save(folder, *steps, last):
    saver = Saver(folder, OneRank(), token="t", keep=KeepPolicy(last), asynchronous=False)
    for step in steps:
        saver.save(step, {"step": step}, {"step": step})
    saver.close()


@pytest.mark.parametrize("last", [1, 2])
def test_a_damaged_later_checkpoint_does_not_push_out_the_whole_ones(tmp_path, last):
    save(tmp_path, 5, 10, 12, last=3)
    (step_folder(tmp_path, 12) / "rank_00000.safetensors").write_bytes(b"cut")
    save(tmp_path, 11, last=last)  # resumed after step 10
    assert list_steps(tmp_path) == [5, 10, 11, 12][-1 - last :]
    native.verify(step_folder(tmp_path, 11))
