import json

import pytest
import torch

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.cli.main import main
from megatron_inherit.eval.logits import compare_logits
from tests.support.tiny_hf import tiny_gpt2, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def run(capsys, *words):
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_greedy_text_is_the_models_most_likely_one(folder, capsys):
    from megatron_inherit.eval.hf_folder import load_model, load_tokenizer

    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = tokenizer.encode("Hello")
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert run(capsys, folder, "Hello", "--max-new-tokens", 8) == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_sampling_depends_on_the_seed_alone(folder, capsys):
    words = (folder, "Hello", "--temperature", 1.0, "--count", 2, "--max-new-tokens", 12)
    first = run(capsys, *words, "--seed", 1)
    assert first == run(capsys, *words, "--seed", 1)
    assert first != run(capsys, *words, "--seed", 2)


def test_wrong_options_and_missing_checkpoints_have_their_codes(folder, tmp_path, capsys):
    assert main(["generate", str(folder), "x", "--temperature=-1"]) == 2
    assert main(["generate", str(tmp_path / "none"), "x"]) == 5
    assert "does not exist" in capsys.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(tmp_path / name)
    try:
        assert main(["generate", str(folder), "x"]) == 4
        assert "tokenizer" in capsys.readouterr().err
    finally:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).rename(folder / name)


def test_logits_of_a_model_and_of_another_format_of_it_are_the_same(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "megatron"), "--format", "megatron", "--tp", "2"]) == 0
    found = compare_logits(folder, tmp_path / "megatron")
    assert found["max_abs_difference"] == 0
    assert found["same_prediction"] == 1
    assert found["largest_logit"] > 0


def test_other_models_differ_and_other_vocabularies_are_refused(folder, tmp_path):
    tiny_llama(tmp_path / "other", seed=1)
    assert compare_logits(folder, tmp_path / "other")["max_abs_difference"] > 0.1
    tiny_gpt2(tmp_path / "gpt2", vocab_size=300)
    with pytest.raises(CheckpointError, match="vocabularies"):
        compare_logits(folder, tmp_path / "gpt2")


def spaced_tokenizer(folder):
    """Writes a tokenizer of SentencePiece's ways: a mark before each word, of which decoding drops the first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    mark = "\N{LOWER ONE EIGHTH BLOCK}"
    vocabulary = {mark + "w" * (number + 1): number for number in range(256)} | {"<eos>": 256}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(" ", mark)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(mark, "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(mark, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def test_the_space_before_the_first_added_word_is_kept(tmp_path, capsys):
    folder = tiny_llama(tmp_path / "model")
    spaced_tokenizer(folder)
    words = run(capsys, folder, "www ww", "--max-new-tokens", 4).split()
    assert words[:2] == ["www", "ww"]
    assert len(words) == 6


def test_habits_beside_the_weights_change_no_text(tmp_path, capsys):
    folder = tiny_llama(tmp_path / "model")
    words = (folder, "Hello", "--max-new-tokens", 24)
    plain, drawn = run(capsys, *words), run(capsys, *words, "--temperature", 1)
    habits = {"repetition_penalty": 5.0, "min_p": 0.9, "eos_token_id": 256, "do_sample": True, "temperature": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(habits))
    assert run(capsys, *words) == plain
    assert run(capsys, *words, "--temperature", 1) == drawn


def test_learned_positions_have_an_end_and_rotary_ones_have_none(tmp_path, capsys):
    gpt2, llama = tiny_gpt2(tmp_path / "gpt2"), tiny_llama(tmp_path / "llama")
    run(capsys, gpt2, "x" * 100, "--max-new-tokens", 29)
    assert main(["generate", str(gpt2), "x" * 100, "--max-new-tokens", "30"]) == 2
    assert "Got: 130 tokens" in capsys.readouterr().err
    run(capsys, llama, "x" * 100, "--max-new-tokens", 60)
