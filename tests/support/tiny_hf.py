"""Tiny Hugging Face folders with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tiny_llama(folder: Path, *, layers: int = 4, vocab_size: int = 260, seed: int = 0, **more: Any) -> Path:
    """Writes a LLaMA folder (hidden 32, 4 heads, 2 key/value heads) with random weights of a lively scale."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 256,
    }
    LlamaForCausalLM(LlamaConfig(**(options | more))).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def tiny_gpt2(folder: Path, *, layers: int = 4, seed: int = 0, **more: Any) -> Path:
    """Writes a GPT-2 folder of the same width."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": 260,
        "n_embd": 32,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.15,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    GPT2LMHeadModel(GPT2Config(**(options | more))).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of the 256 bytes and ``<eos>`` (id 256)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: id_ for id_, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
