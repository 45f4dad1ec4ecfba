"""Parameters are cut into canonical boxes without gap or overlap, and flat ranges find their way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megatron_inherit.arch.tensors import enumerate_tensors, tensor_table
from megatron_inherit.model.build import build_single, padded_vocab
from megatron_inherit.model.load import load_chunk, random_reader, read_flat, to_torch
from megatron_inherit.model.pieces import cut_flat, pieces_of
from megatron_inherit.plan.init import draw
from tests.support.checkpoints import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_cover_parameters_and_model(name):
    config = FAMILIES[name]
    model = build_single(config)
    parameters = dict(model.named_parameters())
    covered = {spec.name: np.zeros(spec.shape, dtype=int) for spec in enumerate_tensors(config)}
    found = pieces_of(model)
    assert found.keys() == parameters.keys()
    for parameter, pieces in found.items():
        at = 0
        for piece in pieces:
            assert piece.offset == at
            at += piece.numel
            covered[piece.spec.name][piece.box] += 1
        assert at == parameters[parameter].numel()
    assert all((count == 1).all() for count in covered.values())


def test_random_values_do_not_depend_on_the_box():
    config = FAMILIES["llama"]
    read = random_reader(config, seed=5)
    for name in ("layers.1.attn.q.weight", "layers.1.mlp.down.weight", "final_norm.weight"):
        spec = tensor_table(config)[name]
        whole = torch.from_numpy(draw(spec, num_layers=config.num_layers, seed=5)).view(spec.shape)
        box = tuple(slice(size // 4, size // 2) for size in spec.shape)
        assert torch.equal(read(spec, box), whole[box])


def test_flat_ranges_read_what_the_parameter_holds():
    config = FAMILIES["qwen2"]
    model, read = build_single(config), random_reader(config, seed=1)
    load_chunk(model, read)
    parameters = dict(model.named_parameters())
    for parameter, pieces in pieces_of(model).items():
        flat = parameters[parameter].data.view(-1)
        cuts = [0, len(flat) // 3 + 1, len(flat) // 2, len(flat)]
        for low, high in itertools.pairwise(cuts):
            values = [read_flat(piece, first, last, read) for piece, first, last in cut_flat(pieces, low, high)]
            assert torch.equal(torch.cat(values), flat[low:high])


def test_vocabulary_is_padded_to_the_tensor_parallel_size():
    config = FAMILIES["llama"]
    assert [padded_vocab(config, tp) for tp in (1, 2, 4)] == [130, 130, 132]


def test_unaligned_and_read_only_bytes_become_tensors():
    values = np.arange(6, dtype=np.float32)
    raw = np.zeros(25, dtype=np.uint8)
    raw[1:] = values.view(np.uint8)
    raw.flags.writeable = False

    class Raw:
        dtype, shape, data = "F32", (2, 3), raw[1:]

    assert to_torch(Raw()).tolist() == values.reshape(2, 3).tolist()
