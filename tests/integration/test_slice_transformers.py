"""Slices of models that transformers wrote, read back by transformers: bytes, hidden states, logits, configurations."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.checkpoint import layout
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.cli.main import main

pytestmark = pytest.mark.slow

_LLAMA = {
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 130,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GPT2 = {"n_embd": 64, "n_layer": 6, "n_head": 4, "vocab_size": 130, "n_positions": 64, "bos_token_id": 0}
CONFIGS = {
    "llama": LlamaConfig(**_LLAMA),
    "llama-tied-rope": LlamaConfig(**_LLAMA, tie_word_embeddings=True, rope_parameters=_LLAMA3),
    "llama-biased": LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_LLAMA, sliding_window=16),
    "qwen2": Qwen2Config(**_LLAMA, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_LLAMA),
    "gpt2": GPT2Config(**_GPT2, eos_token_id=0),
    "gpt2-scaled": GPT2Config(**_GPT2, eos_token_id=0, scale_attn_by_inverse_layer_idx=True),
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.1)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name], max_shard_size="100KB")
    return folders


def load(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    return model.eval()


def truncate(model, layers):
    """Leaves the named blocks in a transformers model, which keeps their own attention scale."""
    body = model.transformer if hasattr(model, "transformer") else model.model
    attribute = "h" if hasattr(body, "h") else "layers"
    blocks = getattr(body, attribute)
    setattr(body, attribute, torch.nn.ModuleList([blocks[layer] for layer in layers]))
    body.config.num_hidden_layers = len(layers)
    return model


@torch.no_grad()
def logits(model):
    tokens = torch.arange(48).reshape(2, 24) * 7 % 130
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_student_computes_what_the_teachers_blocks_compute(teachers, tmp_path, name):
    layers = [4, 0, 2]
    assert main(["inherit", str(teachers[name]), str(tmp_path / "student"), "--layers", "4,0,2"]) == 0
    found = logits(load(tmp_path / "student"))
    expected = logits(truncate(load(teachers[name]), layers))
    assert torch.allclose(found, expected, atol=1e-5 if "scaled" in name else 0, rtol=0)


@pytest.mark.parametrize("words", [["convert"], ["inherit", "--layers", "all"]], ids=["convert", "inherit"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt2-scaled"])
def test_whole_teacher_gives_bitwise_equal_logits(teachers, tmp_path, name, words):
    assert main([words[0], str(teachers[name]), str(tmp_path / "copy"), *words[1:]]) == 0
    found, expected = logits(load(tmp_path / "copy")), logits(load(teachers[name]))
    assert torch.equal(found, expected) if "scaled" not in name else torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "-" not in name])
def test_logits_survive_every_format(teachers, tmp_path, name):
    formats = ["hf", "megatron", "torch_dist", "ds_universal", *(["meta"] if name == "llama" else [])]
    expected = logits(load(teachers[name]))
    for format in formats:
        words = [] if format in ("hf", "ds_universal") else ["--tp", "2"]
        assert main(["convert", str(teachers[name]), str(tmp_path / format), "--format", format, *words]) == 0
        assert main(["convert", str(tmp_path / format), str(tmp_path / f"{format}.hf")]) == 0
        assert (logits(load(tmp_path / f"{format}.hf")) - expected).abs().max() <= 1e-5, format


def test_swapped_gates_show_in_the_logits(teachers, tmp_path, monkeypatch):
    """The must-fail twin of the test above: [up; gate] in Megatron's fused matrix has the right shape."""
    right = layout._runs

    def swapped(tensor, index, tp):
        return right(tensor, 1 - index if tensor.row.fuse == "concat_per_shard" else index, tp)

    with monkeypatch.context() as patch:
        patch.setattr(layout, "_runs", swapped)
        assert main(["convert", str(teachers["llama"]), str(tmp_path / "m"), "--format", "megatron", "--tp", "2"]) == 0
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "hf")]) == 0
    assert (logits(load(tmp_path / "hf")) - logits(load(teachers["llama"]))).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama-tied-rope", "gpt2"])
def test_hidden_states_of_a_prefix_are_the_teachers(teachers, tmp_path, name):
    assert main(["inherit", str(teachers[name]), str(tmp_path / "student"), "--layers", "first:3"]) == 0
    tokens = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        teacher = load(teachers[name])(tokens, output_hidden_states=True).hidden_states[3]
        model = load(tmp_path / "student")
        body = model.transformer if name == "gpt2" else model.model
        norm = body.ln_f if name == "gpt2" else body.norm
        seen = {}
        norm.register_forward_pre_hook(lambda _, inputs: seen.update(hidden=inputs[0]))
        model(tokens)
    assert torch.equal(seen["hidden"], teacher)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gpt2-scaled"])
def test_canonical_tensors_are_transformers_parameters(teachers, name):
    state = load(teachers[name]).state_dict()
    names = {
        "layers.5.mlp.down.weight": ("model.layers.5.mlp.down_proj.weight", "transformer.h.5.mlp.c_proj.weight"),
        "layers.1.attn.o.weight": ("model.layers.1.self_attn.o_proj.weight", "transformer.h.1.attn.c_proj.weight"),
    }
    with open_source(teachers[name]) as source:
        assert set(source.tensors) == {spec.name for spec in enumerate_tensors(source.config)}
        for key, (llama, gpt2) in names.items():
            values = state[gpt2].T if name == "gpt2" else state[llama]
            assert np.array_equal(source.read(key).array(), values.numpy())
        if name == "gpt2":
            fused = state["transformer.h.2.attn.c_attn.weight"].T.numpy()
            found = [source.read(f"layers.2.attn.{part}.weight").array() for part in "qkv"]
            assert np.array_equal(np.concatenate(found), fused)


def test_config_of_a_student_is_its_teachers_but_for_the_depth(teachers, tmp_path):
    folder = teachers["llama-tied-rope"]
    before = json.loads((folder / "config.json").read_text())
    assert main(["inherit", str(folder), str(tmp_path / "student"), "--layers", "first:2"]) == 0
    after = json.loads((tmp_path / "student" / "config.json").read_text())
    assert after == before | {"num_hidden_layers": 2}
    assert json.loads((folder / "config.json").read_text()) == before


def test_a_model_without_a_config_gets_one_that_transformers_reads(tmp_path):
    for shape in ("llama-tiny", "gpt2-tiny"):
        assert main(["inherit", shape, str(tmp_path / shape), "--layers", "all", "--reset", "all"]) == 0
        assert logits(load(tmp_path / shape)).isfinite().all()


def test_bfloat16_rounds_as_torch_does(teachers, tmp_path):
    folder = str(tmp_path / "student")
    assert main(["inherit", str(teachers["qwen3"]), folder, "--layers", "last:2", "--dtype", "bf16"]) == 0
    expected = load(teachers["qwen3"]).to(torch.bfloat16).state_dict()
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_norm.weight"):
        assert torch.equal(found[name], expected[name.replace("layers.1", "layers.5")])
