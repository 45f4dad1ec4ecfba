"""Index maps against the formulas of the formats, written out with numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_inherit.arch.tensors import tensor_table
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.extents import Extent, check_cover
from megatron_inherit.checkpoint.layout import (
    LayoutRow,
    PhysicalTensor,
    check_names,
    padded_vocab_size,
    place_layers,
    stack,
    take_layer,
)
from tests.support.checkpoints import llama

QKV = ("layers.0.attn.q.weight", "layers.0.attn.k.weight", "layers.0.attn.v.weight")
GATE_UP = ("layers.0.mlp.gate.weight", "layers.0.mlp.up.weight")


def tensor(config, fuse, parts, **more):
    table = tensor_table(config)
    return PhysicalTensor(
        "fused", LayoutRow("fused", parts, fuse, **more), 0, tuple(table[name] for name in parts), config
    )


def physical(values, tp, axis):
    """Cuts a stored array in shards and gives their pieces with the arrays they stand for."""
    shards = np.split(values, tp, axis=axis) if axis is not None else [values] * tp
    arrays = {str(rank): np.ascontiguousarray(shard) for rank, shard in enumerate(shards)}
    extents = [Extent.dense(name, 0, "F32", array.shape) for name, array in arrays.items()]
    return stack(extents if axis is not None else extents[:1], axis), arrays


def collect(spec, pieces, arrays):
    """Puts a canonical tensor together from its pieces."""
    out = np.full(spec.shape, -1.0, np.float32)
    check_cover(spec.name, spec.shape, pieces)
    for piece in pieces:
        extent = piece.extent
        view = np.ndarray(
            extent.shape, np.float32, arrays[extent.file], extent.offset, tuple(4 * step for step in extent.strides)
        )
        out[tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))] = view
    return out


def numbered(config, names):
    table = tensor_table(config)
    return [
        np.arange(table[name].numel, dtype=np.float32).reshape(table[name].shape) + 1e5 * at
        for at, name in enumerate(names)
    ]


heads = st.sampled_from([(8, 8), (8, 2), (12, 2), (8, 1), (6, 3)])


def shape_of(pair, **more):
    return llama(num_heads=pair[0], num_kv_heads=pair[1], **more)


def pack_by_group(q, k, v, config):
    groups, dim = config.num_kv_heads, config.head_dim
    per = config.num_heads // groups * dim
    rows = []
    for group in range(groups):
        rows += [
            q[group * per : (group + 1) * per],
            k[group * dim : (group + 1) * dim],
            v[group * dim : (group + 1) * dim],
        ]
    return np.concatenate(rows)


@given(heads, st.sampled_from([1, 2, 4, 8]))
def test_qkv_is_packed_by_group_and_cut_through_groups(pair, tp):
    config = shape_of(pair)
    values = numbered(config, QKV)
    packed = pack_by_group(*values, config)
    if len(packed) % tp:
        return
    fused = tensor(config, "qkv", QKV)
    pieces, arrays = physical(packed, tp, 0)
    mapped = fused.map(pieces, tp=tp)
    for spec, expected in zip(fused.parts, values, strict=True):
        assert np.array_equal(collect(spec, mapped[spec.name], arrays), expected)
    assert fused.shard_shape(tp) == arrays["0"].shape


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_old_qkv_orders_hold_per_rank(tp):
    config = shape_of((8, 8))
    values = numbered(config, QKV)
    per_rank = [np.split(value, tp) for value in values]
    heads, dim = 8 // tp, config.head_dim
    version0 = np.concatenate([np.concatenate([part[rank] for part in per_rank]) for rank in range(tp)])
    stacked = [np.stack([part[rank].reshape(heads, dim, 32) for part in per_rank], axis=2) for rank in range(tp)]
    version1 = np.concatenate([one.reshape(3 * heads * dim, 32) for one in stacked])
    for fuse, packed in (("qkv_v0", version0), ("qkv_v1", version1)):
        fused = tensor(config, fuse, QKV)
        pieces, arrays = physical(packed, tp, 0)
        mapped = fused.map(pieces, tp=tp)
        for spec, expected in zip(fused.parts, values, strict=True):
            assert np.array_equal(collect(spec, mapped[spec.name], arrays), expected), fuse


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gate_and_up_lie_together_in_each_shard(tp):
    config = llama()
    gate, up = numbered(config, GATE_UP)
    shards = zip(np.split(gate, tp), np.split(up, tp), strict=True)
    packed = np.concatenate([np.concatenate(pair) for pair in shards])
    fused = tensor(config, "concat_per_shard", GATE_UP)
    pieces, arrays = physical(packed, tp, 0)
    mapped = fused.map(pieces, tp=tp)
    assert np.array_equal(collect(fused.parts[0], mapped[GATE_UP[0]], arrays), gate)
    assert np.array_equal(collect(fused.parts[1], mapped[GATE_UP[1]], arrays), up)
    naive = tensor(config, "concat", GATE_UP).map(pieces, tp=tp)
    assert np.array_equal(collect(fused.parts[0], naive[GATE_UP[0]], arrays), gate) == (tp == 1)


@pytest.mark.parametrize(("name", "count"), [("layers.0.attn.q.weight", 8), ("layers.0.attn.k.weight", 2)])
def test_rotated_halves_interleave_within_each_head(name, count):
    config = llama()
    (values,) = numbered(config, (name,))
    dim = config.head_dim
    meta = values.reshape(count, 2, dim // 2, 32).swapaxes(1, 2).reshape(count * dim, 32)
    fused = tensor(config, "rope_interleaved", (name,))
    pieces, arrays = physical(meta, 2, 0)
    assert np.array_equal(collect(fused.parts[0], fused.map(pieces, tp=2)[name], arrays), values)
    assert not np.array_equal(meta, values)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_row_parallel_and_transposed(tp):
    config = llama()
    name = "layers.0.mlp.down.weight"
    (values,) = numbered(config, (name,))
    row = tensor(config, "one", (name,))
    pieces, arrays = physical(values, tp, 1)
    assert np.array_equal(collect(row.parts[0], row.map(pieces, tp=tp)[name], arrays), values)
    assert row.shard_shape(tp) == (32, 48 // tp)
    turned = tensor(config, "one", (name,), transpose=True)
    pieces, arrays = physical(np.ascontiguousarray(values.T), tp, 0)
    assert np.array_equal(collect(turned.parts[0], turned.map(pieces, tp=tp)[name], arrays), values)
    assert turned.shard_shape(tp) == (48 // tp, 32)


@given(st.sampled_from([1, 2, 4]))
def test_vocabulary_padding_is_outside_the_map(tp):
    config = llama()
    (values,) = numbered(config, ("embed.weight",))
    rows = padded_vocab_size(130, tp)
    assert rows == {1: 256, 2: 256, 4: 512}[tp]
    padded = np.concatenate([values, np.full((rows - 130, 32), 7, np.float32)])
    fused = tensor(config, "one", ("embed.weight",))
    pieces, arrays = physical(padded, tp, 0)
    assert np.array_equal(collect(fused.parts[0], fused.map(pieces, tp=tp)["embed.weight"], arrays), values)


def test_a_layer_of_a_stacked_tensor():
    values = np.arange(5 * 3 * 2, dtype=np.float32).reshape(5, 3, 2)
    pieces, arrays = physical(values, 5, 0)
    (piece,) = take_layer(pieces, 3)
    assert (piece.start, piece.shape, piece.extent.file) == ((0, 0), (3, 2), "3")
    assert arrays["3"].ravel().tolist() == values[3].ravel().tolist()


def test_shards_that_cannot_be():
    with pytest.raises(CheckpointError, match="fused cannot be cut in 5"):
        tensor(llama(), "one", ("layers.0.mlp.down.weight",)).shard_shape(5)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_layers_on_stages_follow_megatrons_formula(pp, vpp, each):
    depth = pp * vpp * each
    places = place_layers(depth, pp, vpp)
    assert len(set(places)) == depth
    for layer, place in enumerate(places):
        assert layer == place.chunk * (depth // vpp) + place.rank * (depth // (pp * vpp)) + place.index


def test_uneven_stages():
    places = place_layers(8, 3, first=1, last=3)
    assert [place.rank for place in places] == [0, 1, 1, 1, 1, 2, 2, 2]
    with pytest.raises(CheckpointError, match=r"7 layers.*2 pipeline stages.*size of \[1, 7\].*6 or 8"):
        place_layers(7, 2)
    with pytest.raises(CheckpointError):
        place_layers(5, 2, first=3, last=3)


def test_names_are_compared_both_ways():
    config = llama()
    names = ["model.norm.weight", "lm_head.weight"]
    check_names([*names, "x.inv_freq"], names, where="here", ignored=(r".*inv_freq",), config=config)
    with pytest.raises(
        CheckpointError, match=r"here: tensor model\.norm\.weight .*missing.*nearest.*model\.norm\.weigth"
    ):
        check_names(["lm_head.weight", "model.norm.weigth"], names, where="here", config=config)
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.bias has no place.*nearest.*lm_head\.weight"):
        check_names([*names, "lm_head.bias"], names, where="here", config=config)
