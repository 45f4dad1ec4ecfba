"""Which process of which launcher this is, before any other is spoken to."""

import os

import pytest
import torch
import torch.distributed as dist

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.model import groups


@pytest.fixture
def joined(monkeypatch):
    """Gives the arguments with which the processes would be joined, on a machine of some GPUs."""
    calls = []
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # whatever ran in this process before
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: calls.append((backend, more.get("rank"))))
    return calls


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "RANK, WORLD_SIZE set by a launcher, but not MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "3", "MASTER_ADDR": "a"}, "RANK, MASTER_ADDR set by a launcher, but not WORLD_SIZE, MASTER_PORT"),
    ],
)
def test_a_rank_that_lacks_the_others_does_not_train_alone(joined, monkeypatch, given, missing):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=missing):
        groups.start_processes()
    assert joined == []


def test_a_process_alone_is_a_world_even_where_an_address_is_set(joined, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    assert groups.start_processes().type == "cpu"
    assert joined == [("gloo", 0)]


@pytest.mark.parametrize(("local_rank", "visible", "device"), [(3, 8, 3), (3, 1, 0), (0, 4, 0)])
def test_a_process_that_sees_one_gpu_takes_it(joined, monkeypatch, local_rank, visible, device):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert groups.start_processes() == torch.device("cuda", device)
    assert chosen == [torch.device("cuda", device)]
    assert os.environ["LOCAL_RANK"] == str(device)
    assert joined == [("nccl", 0)]


def test_more_processes_than_gpus_are_refused(joined, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ConfigError, match="LOCAL_RANK is 4, but this process sees 4 GPUs"):
        groups.start_processes()
    assert joined == []
