"""Which stored values an engine's weights are set from."""

import pytest
import torch

from megatron_inherit.arch.presets import preset
from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.base.errors import AbsentError, CheckpointError
from megatron_inherit.engines.parts import kind_reader

SPEC = next(iter(enumerate_tensors(preset("llama-tiny"))))


def reader(error):
    def read(name, kind, box):
        if kind == "fp32":
            raise error
        return torch.ones(1)

    return kind_reader(read, "fp32")


def test_masters_that_were_never_stored_come_from_the_weights():
    assert reader(AbsentError("none"))(SPEC, ()).tolist() == [1.0]


def test_masters_that_cannot_be_read_are_not_replaced_by_rounded_weights():
    with pytest.raises(CheckpointError, match="cannot be read"):
        reader(CheckpointError("rank_00000.safetensors cannot be read"))(SPEC, ())
