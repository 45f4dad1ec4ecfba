"""Must-fail twins of the layouts: each wrong order that other converters have shipped is seen by ``compare``."""

import pytest

from megatron_inherit.checkpoint import layout
from megatron_inherit.checkpoint.compare import compare
from megatron_inherit.checkpoint.detect import open_source
from tests.support.checkpoints import llama, random_arrays, write_checkpoint

CONFIG = llama(num_layers=1, num_kv_heads=8)
RUNS = layout._runs


def swap_parts(first, second, *fuses):
    """Exchanges two parts of a fused tensor."""

    def runs(tensor, index, tp):
        if tensor.row.fuse in fuses:
            index = {first: second, second: first}.get(index, index)
        return RUNS(tensor, index, tp)

    return runs


def forget_shards(tensor, index, tp):
    """Concatenates shards as if gate and up were not side by side in each."""
    return RUNS(tensor, index, 1 if tensor.row.fuse == "concat_per_shard" else tp)


def blocks_instead_of_groups(tensor, index, tp):
    """Takes [Q; K; V] for the order by group."""
    if tensor.row.fuse != "qkv":
        return RUNS(tensor, index, tp)
    sizes = [part.shape[0] for part in tensor.parts]
    return [layout.Run(0, sizes[index], sum(sizes[:index]))]


def no_permutation(tensor, index, tp):
    """Takes Meta's rotary order for Hugging Face's."""
    if tensor.row.fuse != "rope_interleaved":
        return RUNS(tensor, index, tp)
    return [layout.Run(0, tensor.parts[0].shape[0], 0)]


@pytest.mark.parametrize(
    ("format", "wrong", "names"),
    [
        ("megatron", swap_parts(1, 2, "qkv"), {"attn.k", "attn.v"}),
        ("megatron", swap_parts(0, 1, "qkv"), {"attn.q", "attn.k"}),
        ("megatron", blocks_instead_of_groups, {"attn.q", "attn.k", "attn.v"}),
        ("megatron", swap_parts(0, 1, "concat_per_shard"), {"mlp.gate", "mlp.up"}),
        ("megatron", forget_shards, {"mlp.gate", "mlp.up"}),
        ("torch_dist", swap_parts(0, 1, "concat"), {"mlp.gate", "mlp.up"}),
        ("torch_dist", swap_parts(1, 2, "qkv"), {"attn.k", "attn.v"}),
        ("meta", no_permutation, {"attn.q", "attn.k"}),
    ],
)
def test_a_planted_swap_is_seen(tmp_path, monkeypatch, format, wrong, names):
    arrays = random_arrays(CONFIG)
    write_checkpoint(tmp_path / "right", CONFIG, arrays, "hf")
    write_checkpoint(tmp_path / "other", CONFIG, arrays, format, tp=2)

    def differing():
        with open_source(tmp_path / "right") as right, open_source(tmp_path / "other") as other:
            return {one.tensor.removeprefix("layers.0.").removesuffix(".weight") for one in compare(right, other)}

    assert differing() == set()
    monkeypatch.setattr(layout, "_runs", wrong)
    assert differing() == names
