"""Folders from before safetensors, as transformers and torch saved them, read without unpickling."""

import json
import shutil

import numpy as np
import pytest
import torch

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.checkpoint.formats import hf
from megatron_inherit.checkpoint.layout import physical_tensors
from tests.support.checkpoints import FAMILIES, assert_equal, random_arrays, read_arrays, write_checkpoint


def state_dict(config, folder):
    """Gives the tensors of a written folder under their Hugging Face names."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == len(list(physical_tensors(hf.ROWS[config.family], config)))
    return tensors


@pytest.mark.parametrize("form", ["single", "sharded", "stream", "no prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bin_folders_read_as_their_safetensors(tmp_path, family, form):
    config = FAMILIES[family]
    arrays = random_arrays(config, dtype="BF16")
    write_checkpoint(tmp_path, config, arrays, "hf", dtype="BF16")
    tensors = state_dict(config, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if config.tied:
        tensors["lm_head.weight"] = next(iter(tensors.values()))  # one storage under two names, as torch saves it
    if form == "no prefix":
        tensors = {name.removeprefix("transformer.").removeprefix("model."): value for name, value in tensors.items()}
    if form == "sharded":
        names = list(tensors)
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, chosen in parts.items():
            torch.save({name: tensors[name] for name in chosen}, tmp_path / file)
        index = {"metadata": {}, "weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=form != "stream")
    with open_source(tmp_path) as source:
        assert source.format == "hf"
        assert source.config == config
        assert_equal(read_arrays(source), arrays)


def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path):
    config = FAMILIES["llama"]
    write_checkpoint(tmp_path, config, random_arrays(config), "hf")
    (tmp_path / "model.safetensors").unlink()
    for value, word in (([torch.ones(2)], "dictionary"), ({"epoch": 3}, "epoch is not a tensor")):
        torch.save(value, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=word):
            open_source(tmp_path)


def test_other_weights_of_one_shape_are_another_file(tmp_path):
    config = FAMILIES["llama"]
    write_checkpoint(tmp_path, config, random_arrays(config), "hf")
    tensors = state_dict(config, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    identities = []
    for dtype in (torch.float16, torch.bfloat16):
        torch.save({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "pytorch_model.bin")
        with open_source(tmp_path) as source:
            identities.append(source.identity["pytorch_model.bin"])
    assert identities[0] != identities[1]


@pytest.mark.parametrize("row", [0, -1])
def test_a_head_that_is_not_the_embedding_it_is_said_to_be(tmp_path, row):
    config = FAMILIES["llama-mha-tied"]
    write_checkpoint(tmp_path, config, random_arrays(config), "hf")
    tensors = state_dict(config, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    open_source(tmp_path).close()
    tensors["lm_head.weight"][row, 1] += 1
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="Set tie_word_embeddings to false"):
        open_source(tmp_path)


def test_of_several_sets_of_weights_the_one_that_transformers_takes(tmp_path):
    """Repositories hold pytorch_model.bin beside safetensors, and folders what was saved before."""
    from transformers import AutoModelForCausalLM

    config = FAMILIES["llama"]
    sets = {}
    for seed, size in enumerate((10**9, 20_000)):
        sets[size] = random_arrays(config, seed=seed)
        write_checkpoint(tmp_path / str(size), config, sets[size], "hf", max_shard_bytes=size)
    folder = tmp_path / "both"
    shutil.copytree(tmp_path / "20000", folder)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))
    for single in (False, True):
        if single:
            shutil.copyfile(tmp_path / str(10**9) / "model.safetensors", folder / "model.safetensors")
        expected = sets[10**9 if single else 20_000]["layers.1.mlp.up.weight"]
        theirs = AutoModelForCausalLM.from_pretrained(folder).model.layers[1].mlp.up_proj.weight
        assert np.array_equal(theirs.detach().numpy(), expected)
        with open_source(folder) as source:
            assert np.array_equal(source.read("layers.1.mlp.up.weight").array(), expected)
