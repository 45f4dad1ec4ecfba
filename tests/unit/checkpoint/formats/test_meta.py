"""Meta shards: the rotary order by the published formula, both embedding cuts, shared storages, refusals."""

import json

import numpy as np
import pytest
import torch

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.extents import Extent
from megatron_inherit.checkpoint.formats import meta
from megatron_inherit.checkpoint.formats.llama3_rope import llama3_scaling
from tests.support.checkpoints import (
    FAMILIES,
    assert_equal,
    llama,
    numbered_arrays,
    random_arrays,
    read_arrays,
    write_checkpoint,
)

HEADS = [(8, 8), (8, 2), (12, 2), (8, 1)]


def config_of(heads, **more):
    return llama(num_heads=heads[0], num_kv_heads=heads[1], hidden_size=4 * heads[0], **more)


def interleave(rows, heads):
    """Rotated halves to pairs: the inverse of transformers' ``permute`` of convert_llama_weights_to_hf.py."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def meta_tensors(arrays, config, key_heads=None):
    """Gives the whole tensors under Meta's names."""
    tensors = {"tok_embeddings.weight": arrays["embed.weight"], "norm.weight": arrays["final_norm.weight"]}
    if "head.weight" in arrays:
        tensors["output.weight"] = arrays["head.weight"]
    for layer in range(config.num_layers):
        mine = {name.split(".", 2)[2]: value for name, value in arrays.items() if name.startswith(f"layers.{layer}.")}
        here = f"layers.{layer}."
        tensors[f"{here}attention.wq.weight"] = interleave(mine["attn.q.weight"], config.num_heads)
        tensors[f"{here}attention.wk.weight"] = interleave(mine["attn.k.weight"], key_heads or config.num_kv_heads)
        tensors[f"{here}attention.wv.weight"] = mine["attn.v.weight"]
        tensors[f"{here}attention.wo.weight"] = mine["attn.o.weight"]
        tensors[f"{here}feed_forward.w1.weight"] = mine["mlp.gate.weight"]
        tensors[f"{here}feed_forward.w2.weight"] = mine["mlp.down.weight"]
        tensors[f"{here}feed_forward.w3.weight"] = mine["mlp.up.weight"]
        tensors[f"{here}attention_norm.weight"] = mine["attn_norm.weight"]
        tensors[f"{here}ffn_norm.weight"] = mine["mlp_norm.weight"]
    return tensors


def axis_of(name, embedding):
    if "norm" in name:
        return None
    return embedding if name == "tok_embeddings.weight" else 1 if name.endswith(("wo.weight", "w2.weight")) else 0


def save(folder, config, tensors, *, tp, embedding=1, **params):
    folder.mkdir(parents=True)
    for rank in range(tp):
        shard = {"rope.freqs": torch.ones(config.head_dim // 2)}
        for name, values in tensors.items():
            axis = axis_of(name, embedding)
            part = values if axis is None else np.split(values, tp, axis)[rank]
            shard[name] = torch.from_numpy(np.ascontiguousarray(part))
        joined = torch.cat([tensor.flatten() for tensor in shard.values()])
        at = 0
        for name, tensor in shard.items():  # all tensors share one storage, as in Meta's own files
            shard[name] = joined[at : at + tensor.numel()].view(tensor.shape)
            at += tensor.numel()
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    base = {"dim": config.hidden_size, "n_layers": config.num_layers, "n_heads": config.num_heads}
    base |= {"n_kv_heads": config.num_kv_heads, "vocab_size": -1, "multiple_of": 256, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps(base | params))
    return folder


@pytest.mark.parametrize("embedding", [0, 1])
@pytest.mark.parametrize("heads", HEADS)
def test_reads_what_meta_published(tmp_path, heads, embedding):
    config = config_of(heads)
    arrays = numbered_arrays(config)
    for tp in (1, 2) if heads[1] > 1 else (1,):
        folder = save(tmp_path / str(tp), config, meta_tensors(arrays, config), tp=tp, embedding=embedding)
        assert meta.detect(str(folder))
        with meta.open_source(str(folder)) as source:
            assert_equal(read_arrays(source), arrays)
            assert (source.config.vocab_size, source.config.ffn_size) == (130, 48)


@pytest.mark.parametrize("groups", [2, 4])
def test_a_wrong_number_of_key_heads_would_be_seen(tmp_path, groups):
    """Check 5, the mutation: keys permuted with the number of query heads are other bytes."""
    config = llama(num_layers=1, num_heads=8, num_kv_heads=groups, head_dim=16, hidden_size=128)
    arrays = numbered_arrays(config)
    folder = save(tmp_path / "wrong", config, meta_tensors(arrays, config, key_heads=8), tp=1)
    with meta.open_source(str(folder)) as source:
        found = read_arrays(source)
    assert not np.array_equal(found["layers.0.attn.k.weight"], arrays["layers.0.attn.k.weight"])
    assert np.array_equal(found["layers.0.attn.q.weight"], arrays["layers.0.attn.q.weight"])


@pytest.mark.parametrize("dialect", ["llama2", "llama3"])
@pytest.mark.parametrize("heads", HEADS)
def test_writes_what_meta_reads(tmp_path, heads, dialect):
    config = config_of(heads, tied=heads == (8, 8))
    arrays = numbered_arrays(config)
    tp = 2 if heads[1] > 1 else 1
    write_checkpoint(tmp_path, config, arrays, "meta", tp=tp, dialect=dialect)
    expected = meta_tensors(arrays, config)
    expected.setdefault("output.weight", arrays["embed.weight"])
    for rank in range(tp):
        shard = torch.load(tmp_path / f"consolidated.{rank:02d}.pth", weights_only=True)
        assert shard.keys() == expected.keys()
        for name, values in expected.items():
            axis = axis_of(name, 1 if dialect == "llama2" else 0)
            part = values if axis is None else np.split(values, tp, axis)[rank]
            np.testing.assert_array_equal(shard[name].numpy(), part, err_msg=name)
    params = json.loads((tmp_path / "params.json").read_text())
    width = meta.ffn_width(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier"))
    assert width == config.ffn_size
    with meta.open_source(str(tmp_path)) as source:
        assert source.config == config
        assert_equal(read_arrays(source), arrays)


@pytest.mark.parametrize(("hidden", "width"), [(4096, 11008), (4096, 14336), (8192, 28672), (5120, 13824), (33, 47)])
def test_every_width_has_a_rule(hidden, width):
    assert meta.ffn_width(hidden, *meta._width_rule(hidden, width)) == width


def test_llama3_scaling_survives(tmp_path):
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    config = llama(rope=llama().rope.__class__(theta=500000.0, scaling=rope), max_positions=131072)
    write_checkpoint(tmp_path, config, random_arrays(config), "meta")
    (tmp_path / meta.OWN).unlink()
    assert meta.open_source(str(tmp_path)).config == config


OTHER_SCALINGS = [("low_freq_factor", 2.0), ("high_freq_factor", 8.0), ("original_max_position_embeddings", 4096)]


@pytest.mark.parametrize("format", ["meta", "megatron", "torch_dist"])
@pytest.mark.parametrize(("name", "value"), OTHER_SCALINGS)
def test_scaling_whose_numbers_readers_do_not_take_from_the_files_is_refused(tmp_path, format, name, value):
    rope = llama3_scaling(8.0) | {name: value}
    config = llama(rope=llama().rope.__class__(theta=500000.0, scaling=rope))
    with pytest.raises(CheckpointError, match=f"no place for {name} of this model's llama3 rope scaling"):
        write_checkpoint(tmp_path / "out", config, random_arrays(config), format)
    assert not (tmp_path / "out").exists()
    write_checkpoint(tmp_path / "hf", config, random_arrays(config), "hf")


@pytest.mark.parametrize(("hidden", "layers", "factor"), [(2048, 16, 32.0), (3072, 28, 32.0), (4096, 32, 8.0)])
def test_published_models_have_their_scaling(tmp_path, hidden, layers, factor):
    shard = {
        "tok_embeddings.weight": Extent.dense("f", 0, "BF16", (128256, hidden)),
        "layers.0.feed_forward.w1.weight": Extent.dense("f", 0, "BF16", (8192, hidden)),
    }
    params = {"dim": hidden, "n_heads": 32, "n_kv_heads": 8, "n_layers": layers, "rope_theta": 500000.0}
    config = meta._config(params | {"use_scaled_rope": True}, [shard], tmp_path)
    assert config.rope.scaling == llama3_scaling(factor)


class TestRefusals:
    @pytest.fixture
    def folder(self, tmp_path):
        config = llama()
        return write_checkpoint(tmp_path / "run", config, random_arrays(config), "meta", tp=2)

    def test_missing_shard(self, folder):
        (folder / "consolidated.00.pth").unlink()
        with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth is missing"):
            meta.open_source(str(folder))

    def test_wrong_vocabulary(self, folder):
        params = json.loads((folder / "params.json").read_text())
        (folder / "params.json").write_text(json.dumps(params | {"vocab_size": 131}))
        with pytest.raises(CheckpointError, match="131"):
            meta.open_source(str(folder))

    def test_damaged_params(self, folder):
        (folder / "params.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"params\.json"):
            meta.open_source(str(folder))

    @pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gpt2"])
    def test_models_meta_has_no_place_for(self, tmp_path, family):
        config = FAMILIES[family]
        with pytest.raises(CheckpointError, match="no place"):
            write_checkpoint(tmp_path / "out", config, random_arrays(config), "meta")
        assert not (tmp_path / "out").exists()

    def test_a_vocabulary_that_cannot_be_cut(self, tmp_path):
        config = llama(vocab_size=131)
        with pytest.raises(CheckpointError, match="cut"):
            write_checkpoint(tmp_path / "out", config, random_arrays(config), "meta", tp=2, dialect="llama3")


def test_heads_that_are_rotated_in_part_are_refused(tmp_path):
    config = llama(rope=llama().rope.__class__(fraction=0.5))
    with pytest.raises(CheckpointError, match="no place for this llama"):
        write_checkpoint(tmp_path, config, random_arrays(config), "meta")
