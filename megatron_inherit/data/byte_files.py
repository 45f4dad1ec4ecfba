"""The byte tokenizer as Hugging Face files, so that a model of bytes is a complete folder for other tools."""

from __future__ import annotations

import json

from megatron_inherit.data.tokenizer import ByteTokenizer

END = "<|endoftext|>"


def byte_tokenizer_files() -> dict[str, bytes]:
    """Gives ``tokenizer.json`` and ``tokenizer_config.json``: byte-level BPE without merges, ByteTokenizer's ids."""
    vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
    end = {
        "id": ByteTokenizer.eos_id,
        "content": END,
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
    }


def _letters() -> list[str]:
    """Gives the printable letter by which byte-level BPE (GPT-2) writes each byte: itself, else one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
