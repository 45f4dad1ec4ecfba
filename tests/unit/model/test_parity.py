"""Logits equal those of transformers for every family, loaded from a Hugging Face folder."""

from __future__ import annotations

import pytest
import torch

from megatron_inherit.arch.model_config import Rope
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.model.build import build_single
from megatron_inherit.model.load import load_chunk, source_reader
from tests.support.checkpoints import gpt2, llama, random_arrays, write_checkpoint

LIMIT = 16
SCALINGS = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {
        "factor": 2.0,
        "long_factor": [1.5, 1.7],
        "short_factor": [1.0, 1.2],
        "original_max_position_embeddings": 8,
    },
}
CONFIGS = {
    "llama": llama(),
    "llama-tied": llama(tied=True, num_kv_heads=8),
    "qwen2": llama(family="qwen2", qkv_bias=True),
    "qwen3": llama(family="qwen3", qk_norm=True, head_dim=8, rope=Rope(theta=1e6)),
    "mistral": llama(family="mistral", num_kv_heads=4, sliding_window=8),
    "gpt2": gpt2(max_positions=32),
} | {
    f"llama-{kind}": llama(max_positions=LIMIT, rope=Rope(theta=5000.0, scaling={"rope_type": kind, **more}))
    for kind, more in SCALINGS.items()
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [7, 24])
def test_logits_equal_transformers(name, length, tmp_path):
    from transformers import AutoModelForCausalLM

    config = CONFIGS[name]
    arrays = {key: (3 if values.ndim == 2 else 1) * values for key, values in random_arrays(config).items()}
    folder = write_checkpoint(tmp_path / name, config, arrays, "hf")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    source = open_source(str(folder))
    assert source.config == config
    ours = build_single(source.config)
    load_chunk(ours, source_reader(source, config))
    tokens = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours.eval()(tokens)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
