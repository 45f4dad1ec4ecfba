"""Small texts, tokenizers and token files for the tests of the data package."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from megatron_inherit.data.indexed import IndexedWriter, token_dtype

_SENTENCE = "the quick brown fox jumps over lazy dogs while naïve cafés serve 漢字 and code: if x == 10 {}"
WORDS = [*_SENTENCE.split(), "", "\n"]


def make_texts(count: int, *, seed: int = 0, longest: int = 60) -> list[str]:
    """Documents of 1 to ``longest`` words, some of them more than ASCII."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) + f" {number}" for number in range(count)]


def write_jsonl(path: Path, texts: list[str], **extra: object) -> Path:
    """Writes ``{"text": ...}`` lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **extra}) + "\n" for text in texts))
    return path


def byte_level_folder(folder: Path) -> Path:
    """A Hugging Face folder: byte-level BPE of 400 ids with ``<|endoftext|>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(200, seed=9), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    return folder


def gpt2_folder(folder: Path) -> Path:
    """GPT-2's two files, made of the byte-level vocabulary."""
    source = json.loads((byte_level_folder(folder.with_name("source")) / "tokenizer.json").read_text())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(source["vocab"]))
    merges = (" ".join(merge) if isinstance(merge, list) else merge for merge in source["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


def sentencepiece_model(folder: Path, **settings: object) -> Path:
    """A SentencePiece BPE model of LLaMA's kind: byte fallback, BOS 1, EOS 2; settings of the trainer change it."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    llama = {
        "sentence_iterator": iter(make_texts(300, seed=8)),
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        model_prefix=str(folder / "tokenizer"),
        minloglevel=2,
        **llama | settings,
    )
    return folder / "tokenizer.model"


def write_tokens(prefix: Path, documents: list[np.ndarray], vocab_size: int = 1000) -> Path:
    """Writes a ``.bin/.idx`` pair."""
    with IndexedWriter(prefix, token_dtype(vocab_size)) as writer:
        writer.add_documents(np.concatenate([np.empty(0, np.int64), *documents]), [len(one) for one in documents])
    return prefix


def random_documents(count: int, *, seed: int = 0, longest: int = 40, vocab_size: int = 1000) -> list[np.ndarray]:
    """Documents of 1 to ``longest`` random ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, rng.integers(1, longest + 1)) for _ in range(count)]
