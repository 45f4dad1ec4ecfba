"""``config.json`` as transformers' own configuration classes understand it, fields left out included."""

import pytest

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.formats.hf_config import read_config, student_config
from tests.support.checkpoints import gpt2, llama, random_arrays, write_checkpoint

LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "vocab_size": 500,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 16}


def theirs(raw):
    pytest.importorskip("transformers", reason="needs transformers")
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[raw["model_type"]](**{key: value for key, value in raw.items() if key != "model_type"})


def window_of(config):
    if config.model_type == "llama":  # its attention has none
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_key_value_heads": 4},
        {"sliding_window": None},
        SLIDING,
        SLIDING | {"max_window_layers": 0},
        {"tie_word_embeddings": True},
        {"max_position_embeddings": 77, "rms_norm_eps": 1e-3},
    ],
)
def test_a_field_that_is_left_out_means_what_it_means_to_transformers(family, more):
    raw = LLAMA | {"model_type": family} | more
    ours, other = read_config(raw, where="config.json"), theirs(raw)
    assert ours.num_kv_heads == other.num_key_value_heads
    assert ours.head_dim == (getattr(other, "head_dim", None) or 8)
    assert (ours.max_positions, ours.norm_eps) == (other.max_position_embeddings, other.rms_norm_eps)
    assert (ours.tied, ours.rope.theta) == (other.tie_word_embeddings, other.rope_parameters["rope_theta"])
    assert ours.sliding_window == window_of(other)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_no_number_of_key_heads_is_one_a_query_head(family):
    assert read_config(LLAMA | {"model_type": family, "num_key_value_heads": None}, where="").num_kv_heads == 32


@pytest.mark.parametrize("more", [{}, {"max_window_layers": 4}, {"max_window_layers": 30}])
def test_a_deeper_student_gets_no_window_that_its_teacher_had_not(more):
    raw = LLAMA | {"model_type": "qwen2"} | SLIDING | more
    teacher = read_config(raw, where="")
    layers = [0, 1, 2, 3] * 10
    fields = student_config(raw, teacher.with_layers(40), layers, "F32")
    assert window_of(theirs(fields)) is None
    assert read_config(fields, where="") == teacher.with_layers(40)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (gpt2(sliding_window=8), "sliding_window"),
        (gpt2(head_dim=16), "head_dim"),
        (llama(sliding_window=8), "sliding_window"),
        (llama(qkv_bias=True), "qkv_bias"),
        (llama(out_bias=True), "qkv_bias"),
        (llama(family="mistral", qkv_bias=True, sliding_window=8), "qkv_bias"),
        (llama(family="qwen2", qkv_bias=True, mlp_bias=True), "mlp_bias"),
    ],
)
@pytest.mark.parametrize("format", ["hf", "ds_universal"])
def test_what_transformers_would_not_compute_is_refused(tmp_path, config, name, format):
    with pytest.raises(CheckpointError, match=f"has no place for {name} of this model"):
        write_checkpoint(tmp_path / "out", config, random_arrays(config), format)
    assert not (tmp_path / "out").exists()
    write_checkpoint(tmp_path / "megatron", config, random_arrays(config), "megatron")
