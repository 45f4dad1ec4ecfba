"""Megatron rank files: every dialect, order and parallel size, against arrays packed by plain numpy."""

import argparse
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_inherit.arch.model_config import Rope
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.formats import megatron_legacy
from megatron_inherit.checkpoint.formats.megatron_args import OWN, args_from_config, config_from_args
from megatron_inherit.checkpoint.formats.megatron_names import DIALECTS
from megatron_inherit.checkpoint.stream import SinkOptions
from tests.support.checkpoints import (
    FAMILIES,
    assert_equal,
    gpt2,
    llama,
    numbered_arrays,
    random_arrays,
    read_arrays,
    write_checkpoint,
)


def open_source(path):
    return megatron_legacy.open_source(str(path))


def pack(arrays, config, layer, kind="weight", order="qkv", tp=1):
    """Packs query, key and value rows by the formulas of Megatron's own documentation, one rank after another."""
    q, k, v = (arrays[f"layers.{layer}.attn.{part}.{kind}"] for part in "qkv")
    d, rest = config.head_dim, q.shape[1:]
    if order == "qkv":
        groups = config.num_kv_heads
        shaped = [part.reshape(groups, -1, *rest) for part in (q, k, v)]
        return np.concatenate(shaped, axis=1).reshape(-1, *rest)
    ranks = []
    for part in zip(*(np.split(x, tp) for x in (q, k, v)), strict=True):
        heads = np.stack([x.reshape(config.num_heads // tp, d, *rest) for x in part])
        order_of_axes = (0, 1, 2) if order == "qkv_v0" else (1, 2, 0)
        ranks.append(np.moveaxis(heads, (0, 1, 2), [order_of_axes.index(i) for i in range(3)]).reshape(-1, *rest))
    return np.concatenate(ranks)


def megatron_args(config, tp, pp, **more):
    return argparse.Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        group_query_attention=True,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn_size,
        padded_vocab_size=256 if tp == 2 else 128 * (1 + (config.vocab_size - 1) // 128),
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_positions,
        norm_epsilon=config.norm_eps,
        untie_embeddings_and_output_weights=not config.tied,
        position_embedding_type="rope" if config.rope else "learned_absolute",
        normalization="RMSNorm" if config.rope else "LayerNorm",
        swiglu=config.rope is not None,
        add_bias_linear=config.mlp_bias,
        rotary_base=10000,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        params_dtype=torch.float32,
        **more,
    )


def save_legacy(root, config, arrays, *, version, tp, names, tracker="release"):  # noqa: C901
    """Saves what an old Megatron-LM would have saved: nested dictionaries, its own QKV order, padded vocabulary."""
    order = {0: "qkv_v0", 1: "qkv_v1", 2: "qkv", 3: "qkv"}[version]
    gated = config.rope is not None
    padded = 256 if tp == 2 else 128 * (1 + (config.vocab_size - 1) // 128)

    def vocab(array):
        return np.concatenate([array, np.zeros((padded - len(array), array.shape[1]), array.dtype)])

    for rank in range(tp):
        encoder = {}
        for layer in range(config.num_layers):
            for kind in ("weight", "bias"):
                if f"layers.{layer}.attn_norm.{kind}" in arrays:
                    encoder[f"layers.{layer}.{names[0]}.{kind}"] = arrays[f"layers.{layer}.attn_norm.{kind}"]
                    encoder[f"layers.{layer}.{names[1]}.{kind}"] = arrays[f"layers.{layer}.mlp_norm.{kind}"]
                if f"layers.{layer}.attn.q.{kind}" in arrays:
                    packed = pack(arrays, config, layer, kind, order, tp)
                    encoder[f"layers.{layer}.{names[2]}.query_key_value.{kind}"] = np.split(packed, tp)[rank]
                if f"layers.{layer}.attn.o.{kind}" in arrays:
                    o, down = arrays[f"layers.{layer}.attn.o.{kind}"], arrays[f"layers.{layer}.mlp.down.{kind}"]
                    if kind == "weight":
                        o, down = np.split(o, tp, 1)[rank], np.split(down, tp, 1)[rank]
                    encoder[f"layers.{layer}.{names[2]}.dense.{kind}"] = o
                    encoder[f"layers.{layer}.mlp.dense_4h_to_h.{kind}"] = down
                    parts = ("gate", "up") if gated else ("up",)
                    shards = [np.split(arrays[f"layers.{layer}.mlp.{part}.{kind}"], tp)[rank] for part in parts]
                    encoder[f"layers.{layer}.mlp.dense_h_to_4h.{kind}"] = np.concatenate(shards)
        for kind in ("weight", "bias"):
            if f"final_norm.{kind}" in arrays:
                encoder[f"{names[3]}.{kind}"] = arrays[f"final_norm.{kind}"]
        embedding = {"word_embeddings": {"weight": np.split(vocab(arrays["embed.weight"]), tp)[rank]}}
        if "pos_embed.weight" in arrays:
            embedding["position_embeddings"] = {"weight": arrays["pos_embed.weight"]}
        model = {"language_model": {"embedding": embedding, names[4]: encoder}}
        if "head.weight" in arrays:
            model["language_model"]["output_layer"] = {"weight": np.split(vocab(arrays["head.weight"]), tp)[rank]}
        value = {"args": megatron_args(config, tp, 1), "iteration": 10, "model": to_torch(model)}
        if version:
            value["checkpoint_version"] = float(version)
        path = root / tracker / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save(value, path)
    (root / "latest_checkpointed_iteration.txt").write_text(tracker)


def to_torch(value):
    if isinstance(value, dict):
        return {key: to_torch(item) for key, item in value.items()}
    return torch.from_numpy(np.ascontiguousarray(value))


OLD = ("input_layernorm", "post_attention_layernorm", "self_attention", "final_layernorm", "encoder")
OLDEST = ("input_layernorm", "post_attention_layernorm", "attention", "final_layernorm", "transformer")
NEW = ("input_norm", "post_attention_norm", "self_attention", "final_norm", "encoder")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("config", "version", "names"),
    [
        (gpt2(), 0, OLDEST),
        (gpt2(), 1, OLDEST),
        (gpt2(), 2, OLD),
        (llama(num_kv_heads=8), 0, OLD),
        (llama(num_kv_heads=8), 1, OLD),
        (llama(), 3, NEW),
        (llama(tied=True), 3, OLD),
    ],
)
def test_reads_what_old_megatron_saved(tmp_path, config, version, names, tp):
    arrays = numbered_arrays(config)
    save_legacy(tmp_path, config, arrays, version=version, tp=tp, names=names)
    assert megatron_legacy.detect(str(tmp_path))
    with open_source(tmp_path) as source:
        assert_equal(read_arrays(source), arrays)
        assert source.config == config
        assert source.details["checkpoint_version"] == version


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_every_family_and_dialect(tmp_path, family, dialect):
    config = FAMILIES[family]
    arrays = random_arrays(config, dtype="BF16")
    write_checkpoint(tmp_path, config, arrays, "megatron", dtype="BF16", tp=2, pp=2, vpp=2, dialect=dialect)
    with open_source(tmp_path) as source:
        assert_equal(read_arrays(source), arrays)
        assert source.config == config
        assert source.details["dialect"] == dialect


@st.composite
def layouts(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    tp, pp, vpp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    config = llama(
        num_layers=pp * vpp * draw(st.integers(1, 2)),
        num_heads=groups * draw(st.sampled_from([2, 3]) if groups == 4 else st.just(4)),
        num_kv_heads=groups,
        ffn_size=draw(st.sampled_from([16, 40])),
        vocab_size=draw(st.integers(5, 150)),
        tied=draw(st.booleans()),
        head_dim=draw(st.sampled_from([4, 8])),
    )
    dialect = draw(st.sampled_from(sorted(DIALECTS)))
    return config, {"tp": tp, "pp": pp, "vpp": vpp, "dialect": dialect, "vocab_multiple": draw(st.integers(1, 9))}


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layouts(), layouts())
def test_any_layout_reads_back_and_reshards_to_any_other(tmp_path, one, other):
    """Check 3: TP T -> T' -> T, with more ranks than groups too, is byte for byte the identity."""
    config, first = one
    second = other[1] | {"pp": first["pp"], "vpp": first["vpp"]}
    arrays = numbered_arrays(config)
    for step, options in enumerate((first, second, first)):
        folder = tmp_path / str(step)
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(folder, config, arrays, "megatron", **options)
        with open_source(folder) as source:
            found = read_arrays(source)
        assert_equal(found, arrays)
    before, after = (sorted(p for p in (tmp_path / s).rglob("*.pt")) for s in "02")
    assert [path.read_bytes() for path in before] == [path.read_bytes() for path in after]


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (12, 2), (8, 1)])
def test_rank_files_hold_what_megatron_expects(tmp_path, heads):
    """Checks 4 and 17: the packed rows, [gate; up] of each rank, padding, stage-local numbers, the tied head's copy."""
    config = llama(num_heads=heads[0], num_kv_heads=heads[1], tied=True)
    arrays = numbered_arrays(config)
    write_checkpoint(tmp_path, config, arrays, "megatron", tp=2, pp=2, iteration=7)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "7"
    model = {}
    for stage in range(2):
        for rank in range(2):
            path = tmp_path / "iter_0000007" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"
            value = torch.load(path, weights_only=False)
            assert value["args"].padded_vocab_size == 256
            model[rank, stage] = {name: tensor.numpy() for name, tensor in value["model"].items()}
    for rank in range(2):
        layer = "decoder.layers.1."
        np.testing.assert_array_equal(
            model[rank, 1][f"{layer}self_attention.linear_qkv.weight"], np.split(pack(arrays, config, 3), 2)[rank]
        )
        gate, up = (np.split(arrays[f"layers.3.mlp.{part}.weight"], 2)[rank] for part in ("gate", "up"))
        np.testing.assert_array_equal(model[rank, 1][f"{layer}mlp.linear_fc1.weight"], np.concatenate([gate, up]))
        np.testing.assert_array_equal(
            model[rank, 1][f"{layer}mlp.linear_fc2.weight"], np.split(arrays["layers.3.mlp.down.weight"], 2, 1)[rank]
        )
        embedding = np.concatenate([arrays["embed.weight"], np.zeros((126, 32), np.float32)])
        half = np.split(embedding, 2)[rank]
        np.testing.assert_array_equal(model[rank, 0]["embedding.word_embeddings.weight"], half)
        np.testing.assert_array_equal(model[rank, 1]["output_layer.weight"], half)
        assert "output_layer.weight" not in model[rank, 0]
        assert "decoder.layers.2.mlp.linear_fc2.weight" not in model[rank, 0]
    assert not np.array_equal(
        model[0, 0]["decoder.layers.0.mlp.linear_fc1.weight"][:48], arrays["layers.0.mlp.gate.weight"]
    )


def test_uneven_stages_are_read_from_the_stages_themselves(tmp_path):
    config = llama(num_layers=5)
    arrays = numbered_arrays(config)
    for stage, layers in enumerate(([0], [1, 2, 3], [4])):
        model = {}
        for local, layer in enumerate(layers):
            part = {name: array for name, array in arrays.items() if name.startswith(f"layers.{layer}.")}
            one = dataclasses.replace(config, num_layers=1)
            renamed = {name.replace(f"layers.{layer}.", "layers.0."): array for name, array in part.items()}
            write_checkpoint(
                tmp_path / "parts" / f"{stage}{local}",
                one,
                {name: renamed.get(name, array) for name, array in numbered_arrays(one).items()},
                "megatron",
            )
            path = tmp_path / "parts" / f"{stage}{local}" / "release/mp_rank_00/model_optim_rng.pt"
            for name, tensor in torch.load(path, weights_only=False)["model"].items():
                if "layers" in name:
                    model[name.replace("layers.0.", f"layers.{local}.")] = tensor
        if stage == 0:
            model["embedding.word_embeddings.weight"] = torch.from_numpy(arrays["embed.weight"])
        if stage == 2:
            model["decoder.final_layernorm.weight"] = torch.from_numpy(arrays["final_norm.weight"])
            model["output_layer.weight"] = torch.from_numpy(arrays["head.weight"])
            model["decoder.layers.0.self_attention.core_attention._extra_state"] = None
        args = megatron_args(config, 1, 3, num_layers_in_first_pipeline_stage=1)
        path = tmp_path / "run" / "iter_0000003" / f"mp_rank_00_{stage:03d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 3, "model": model}, path)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    with open_source(tmp_path / "run") as source:
        assert_equal(read_arrays(source), arrays)


class TestRefusals:
    """Part of check 19: a clear sentence that names the file."""

    @pytest.fixture
    def folder(self, tmp_path):
        config = llama()
        return write_checkpoint(tmp_path / "run", config, random_arrays(config), "megatron", tp=2, pp=2, iteration=4)

    def edit(self, folder, rank, change):
        path = folder / "iter_0000004" / rank / "model_optim_rng.pt"
        value = torch.load(path, weights_only=False)
        change(value)
        torch.save(value, path)

    def refused(self, folder, *parts):
        with pytest.raises(CheckpointError) as refusal:
            open_source(folder)
        for part in parts:
            assert part in str(refusal.value)

    def test_damaged_tracker(self, folder):
        (folder / "latest_checkpointed_iteration.txt").write_text("../../elsewhere")
        self.refused(folder, "latest_checkpointed_iteration.txt", "elsewhere")

    def test_missing_rank(self, folder):
        shutil.rmtree(folder / "iter_0000004" / "mp_rank_01_001")
        self.refused(folder, "mp_rank_01_001", "missing")

    def test_one_rank_under_two_names(self, folder):
        here = folder / "iter_0000004"
        shutil.copytree(here / "mp_rank_00_000", here / "mp_rank_00")
        self.refused(folder, "mp_rank_00_000", "the same rank", "Remove")

    def test_missing_stage(self, folder):
        for rank in range(2):
            shutil.rmtree(folder / "iter_0000004" / f"mp_rank_{rank:02d}_001")
        self.refused(folder, "pipeline_model_parallel_size 2")

    def test_extra_rank(self, folder):
        for stage in range(2):
            shutil.copytree(
                folder / "iter_0000004" / f"mp_rank_01_{stage:03d}", folder / "iter_0000004" / f"mp_rank_02_{stage:03d}"
            )
        self.refused(folder, "tensor_model_parallel_size 2", "3 in the folder")

    def test_mixed_iterations(self, folder):
        self.edit(folder, "mp_rank_01_001", lambda value: value.update(iteration=5))
        self.refused(folder, "mp_rank_01_001", "iteration 5", "iteration 4")

    def test_unknown_name(self, folder):
        new = "decoder.layers.0.self_attention.linear_q.weight"
        self.edit(folder, "mp_rank_00_000", lambda value: value["model"].update({new: torch.ones(2)}))
        self.refused(folder, new, "no place", "linear_qkv")

    def test_missing_name(self, folder):
        gone = "decoder.layers.1.mlp.linear_fc2.weight"
        self.edit(folder, "mp_rank_01_001", lambda value: value["model"].pop(gone))
        self.refused(folder, "decoder.layers.3.mlp.linear_fc2.weight", "missing", "rank 1")

    def test_missing_layer(self, folder):
        def drop(value):
            for name in [name for name in value["model"] if "layers.1." in name]:
                del value["model"][name]

        self.edit(folder, "mp_rank_00_001", drop)
        self.refused(folder, "does not hold all layers")

    def test_wrong_shape(self, folder):
        name = "decoder.layers.0.self_attention.linear_qkv.weight"
        self.edit(folder, "mp_rank_00_000", lambda v: v["model"].update({name: v["model"][name][:-1].clone()}))
        self.refused(folder, name, "wrong shape")

    @pytest.mark.parametrize(
        ("field", "value", "word"),
        [("num_experts", 8, "mixture"), ("fp8", "hybrid", "fp8"), ("apply_layernorm_1p", True, "less one")],
    )
    def test_models_without_rows(self, folder, field, value, word):
        self.edit(folder, "mp_rank_00_000", lambda content: setattr(content["args"], field, value))
        self.refused(folder, word, "model_optim_rng.pt")

    def test_fp8_tensors(self, folder):
        name = "decoder.layers.0.mlp.linear_fc2.weight"
        self.edit(
            folder, "mp_rank_00_000", lambda v: v["model"].update({name: v["model"][name].to(torch.float8_e4m3fn)})
        )
        self.refused(folder, name, "F8_E4M3")

    def test_another_order_of_gate_and_up(self, folder):
        """epfLLM's files look like Megatron's and hold [up; gate]; the name of the head gives them away."""
        head = {"language_model": {"lm_head": torch.ones(2, 2)}}
        self.edit(folder, "mp_rank_00_000", lambda value: value["model"].update(head))
        self.refused(folder, "model_optim_rng.pt", "language_model.lm_head", "up before gate")

    def test_unknown_version(self, folder):
        for rank in ("00_000", "00_001", "01_000", "01_001"):
            self.edit(folder, f"mp_rank_{rank}", lambda value: value.update(checkpoint_version=4.0))
        self.refused(folder, "checkpoint_version", "4")

    def test_truncated_file(self, folder):
        path = folder / "iter_0000004" / "mp_rank_00_000" / "model_optim_rng.pt"
        path.write_bytes(path.read_bytes()[:-100])
        self.refused(folder, str(path))

    def test_layers_that_cannot_be_shared_out(self, tmp_path):
        config = llama(num_layers=6)
        with pytest.raises(CheckpointError, match=r"pipeline size of \[1, 3\], or a depth of 4 or 8"):
            write_checkpoint(tmp_path / "out", config, random_arrays(config), "megatron", pp=2, vpp=2)
        assert not (tmp_path / "out").exists()


def test_linear_scaling_of_rotary_positions_is_told_in_megatrons_words():
    config = llama(rope=dataclasses.replace(llama().rope, scaling={"rope_type": "linear", "factor": 4.0}))
    args = args_from_config(config, SinkOptions(), dtype="F32", padded_vocab=256)
    assert args["rotary_seq_len_interpolation_factor"] == 4.0
    del args[OWN]
    assert config_from_args(args, where="run").rope == config.rope


def test_a_rotary_base_is_written_whole():
    for theta, kind in ((500000.0, int), (8317.25, float)):
        args = args_from_config(llama(rope=Rope(theta=theta)), SinkOptions(), dtype="F32", padded_vocab=256)
        assert (args["rotary_base"], type(args["rotary_base"])) == (theta, kind)


def test_scaling_that_megatron_does_not_have_is_refused():
    config = llama(rope=dataclasses.replace(llama().rope, scaling={"rope_type": "yarn", "factor": 4.0}))
    with pytest.raises(CheckpointError, match="no rope scaling but linear") as refusal:
        args_from_config(config, SinkOptions(), dtype="F32", padded_vocab=256)
    assert refusal.value.got == "yarn"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("apply_residual_connection_post_layernorm", True),
        ("no_rope_freq", 4),
        ("qk_l2_norm", True),
        ("window_attn_skip_freq", 2),
        ("softmax_type", "learnable"),
    ],
)
def test_args_that_change_the_function_are_refused(name, value):
    args = args_from_config(llama(), SinkOptions(), dtype="F32", padded_vocab=256)
    with pytest.raises(CheckpointError, match="not supported") as refusal:
        config_from_args(args | {name: value}, where="run")
    assert name in str(refusal.value.got)
