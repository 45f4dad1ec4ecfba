"""Tokenizer files out of GGUF metadata: byte-level BPE as Hugging Face's ``tokenizers`` stores it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_inherit.checkpoint.stream import SideFile

_CONTROL, _USER_DEFINED = 3, 4
_GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES_ONLY = {**_GPT2_SPLIT, "use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_GPT2_SPLIT],
    "default": [_GPT2_SPLIT],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2_SPLIT],
    "llama-bpe": [_split(_WORDS + r"\p{N}{1,3}" + _REST), _BYTES_ONLY],
    "qwen2": [_split(_WORDS + r"\p{N}" + _REST), _BYTES_ONLY],
}
"""Pre-tokenizers by the name that llama.cpp gives them (``llama-vocab.cpp``), as the models' own files have them."""


def tokenizer_files(metadata: Mapping[str, Any], context: int) -> tuple[tuple[SideFile, ...], str]:
    """Makes the tokenizer's files.

    Args:
        metadata: Of the GGUF file.
        context: Longest sequence, for ``model_max_length``.

    Returns:
        The files, and why there are none, where the kind of tokenizer is not known.
    """
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or split not in _PRE_TOKENIZERS or "tokenizer.ggml.merges" not in metadata:
        return (), f"the tokenizer ({kind}, {split}) is not converted: copy the original model's tokenizer files"
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {
        f"{role}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if metadata.get(f"tokenizer.ggml.{key}_token_id") is not None
    }
    settings: dict[str, Any] = {
        **special,
        "add_prefix_space": bool(metadata.get("tokenizer.ggml.add_space_prefix", False)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    files = {
        "tokenizer.json": _tokenizer(metadata, _PRE_TOKENIZERS[split]),
        "tokenizer_config.json": settings,
        "special_tokens_map.json": special,
    }
    return tuple(_json_file(name, value) for name, value in files.items()), ""


def generation_config(metadata: Mapping[str, Any]) -> SideFile:
    """Makes ``generation_config.json``."""
    return _json_file("generation_config.json", token_ids(metadata))


def token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Gives the special tokens' numbers under Hugging Face's keys."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: number for name, number in ids.items() if number is not None}


def _tokenizer(metadata: Mapping[str, Any], split: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    pre = split[0] if len(split) == 1 else {"type": "Sequence", "pretokenizers": split}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": metadata.get("tokenizer.ggml.pre") == "llama-bpe",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _json_file(name: str, value: Any) -> SideFile:
    return SideFile(name, content=(json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())
