"""A narrower student: the right channels, in a folder that computes what the masked teacher computes."""

import numpy as np
import pytest
import torch
import transformers

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.eval.calibration import sample_windows
from megatron_inherit.eval.hf_folder import load_model, load_tokenizer
from megatron_inherit.inherit.inheritune import plan_inheritance
from megatron_inherit.plan.execute import execute
from megatron_inherit.study.schema import CutSection
from megatron_inherit.study.width import WidthScores, cut_width, measure_width
from tests.support.tiny_hf import save_tokenizer


def llama(folder, **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{
        "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    } | changes)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def narrow(teacher, out, cut, scores=None, layers=(0, 2)):
    with open_source(teacher) as source:
        plan = cut_width(plan_inheritance(source, layers=layers), source, cut, scores)
        execute(plan, out, source=source, record={})
    return load_model(out)


def test_importance_is_that_of_its_definition(tmp_path):
    teacher = llama(tmp_path / "teacher")
    found = measure_width(teacher, sequences=5, tokens=16)
    model = load_model(teacher)
    windows = sample_windows(load_tokenizer(teacher), None, sequences=5, tokens=16)
    with torch.no_grad():
        states = [model.model(window[None], output_hidden_states=True).hidden_states for window in windows]
        block = model.model.layers[1]
        gates = [
            block.mlp.act_fn(block.mlp.gate_proj(n)) * block.mlp.up_proj(n)
            for n in (_into_mlp(model, state, 1) for state in states)
        ]
    means = torch.stack([gate[0].abs().mean(0).double() for gate in gates])
    np.testing.assert_allclose(found.ffn[1], means.square().sum(0).sqrt().numpy(), rtol=1e-4)
    first = torch.stack([model.model.layers[0].input_layernorm(state[0])[0].abs().mean(0).double() for state in states])
    assert len(found.hidden) == 32
    assert len(found.heads[0]) == 4
    assert (torch.tensor(found.hidden) > first.square().sum(0).sqrt()).all(), "the other norms add to it"


def _into_mlp(model, states, block):
    """Gives the input of a block's MLP, from the state that enters the block."""
    layer, hidden = model.model.layers[block], states[block]
    positions = torch.arange(hidden.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    mask = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    attended = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=mask)[0]
    return layer.post_attention_layernorm(hidden + attended)


def test_columns_and_heads_without_weight_are_cut_without_a_difference(tmp_path):
    folder = llama(tmp_path / "teacher")
    model = load_model(folder)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, ::2] = 0  # every second column does nothing
            block.self_attn.o_proj.weight[:, 16:] = 0  # nor does the second group of heads
    model.save_pretrained(folder)
    ffn = [[0.0, 1.0] * 24] * 3
    scores = WidthScores([1.0] * 32, [[1.0, 1.0, 0.0, 0.0]] * 3, ffn)
    student = narrow(folder, tmp_path / "student", CutSection(heads=0.5, ffn=0.5), scores, layers=(0, 1, 2))
    assert student.config.num_attention_heads == 2
    assert student.config.num_key_value_heads == 1
    assert student.config.intermediate_size == 24
    tokens = torch.randint(0, 257, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(student(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_narrower_stream_keeps_the_same_channels_everywhere(tmp_path):
    folder = llama(tmp_path / "teacher")
    scores = WidthScores([float(c % 4 == 1) + c / 1000 for c in range(32)], [[1.0] * 4] * 3, [[1.0] * 48] * 3)
    student = narrow(folder, tmp_path / "student", CutSection(hidden=0.25), scores)
    teacher, channels = load_model(folder), torch.arange(1, 32, 4)
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight[:, channels])
    mine, theirs = student.model.layers[1], teacher.model.layers[2]
    assert torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight[:, channels])
    assert torch.equal(mine.mlp.down_proj.weight, theirs.mlp.down_proj.weight[channels])
    assert torch.equal(mine.input_layernorm.weight, theirs.input_layernorm.weight[channels])
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight[:, channels])


def test_the_first_channels_need_no_measurement(tmp_path):
    folder = llama(tmp_path / "teacher")
    student = narrow(folder, tmp_path / "student", CutSection(ffn=0.5, by="first"))
    teacher = load_model(folder)
    assert torch.equal(student.model.layers[1].mlp.gate_proj.weight, teacher.model.layers[2].mlp.gate_proj.weight[:24])


def test_heads_of_a_gpt2_fill_its_width(tmp_path):
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="heads of a GPT-2 fill its width"):
        narrow(tmp_path / "gpt2", tmp_path / "student", CutSection(hidden=0.5, by="first"), layers=(0,))
    student = narrow(
        tmp_path / "gpt2", tmp_path / "s2", CutSection(hidden=0.5, heads=0.5, ffn=0.5, by="first"), layers=(1,)
    )
    assert (student.config.n_embd, student.config.n_head, student.config.n_inner) in [(16, 2, 64), (16, 2, None)]
