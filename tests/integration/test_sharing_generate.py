"""Text from a model with shared stages: expanded first, so that caches of keys and values belong to layers."""

import pytest
import torch

from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.cli.main import main
from megatron_inherit.eval.hf_folder import load_tokenizer
from megatron_inherit.model.build import build_single
from megatron_inherit.model.load import load_chunk, source_reader
from megatron_inherit.sharing.aux_model import share_stages
from megatron_inherit.sharing.learngene import plan_of
from megatron_inherit.sharing.tensors import by_first_layer
from tests.support.tiny_hf import tiny_llama

pytestmark = pytest.mark.slow

PROMPT, LENGTH = "Once upon", 32


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("teacher") / "tiny", layers=6)


def without_cache(gene):
    """Continues the prompt on the shared weights themselves, every token from the whole text before it."""
    with open_source(gene) as source:
        plan = plan_of(source)
        model = build_single(source.config)
        share_stages([model], plan)
        load_chunk(model, by_first_layer(source_reader(source, source.config), plan))
    tokenizer = load_tokenizer(gene)
    ids = tokenizer.encode(PROMPT)
    with torch.no_grad():
        for _ in range(LENGTH):
            ids.append(int(model(torch.tensor([ids]))[0, -1, : source.config.vocab_size].argmax()))
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(("plan", "compress"), [("2,1,3", ""), ("cycle:3:2", ""), ("2,1,3", "int4")])
def test_greedy_text_of_shared_stages_is_that_without_a_cache(teacher, tmp_path, capsys, plan, compress):
    gene = tmp_path / "gene"
    assert main(["share", "init", str(teacher), str(gene), "--plan", plan, "--start", "stepwise"]) == 0
    if compress:
        assert main(["share", "extract", str(gene), str(tmp_path / "small"), "--compress", compress]) == 0
        gene = tmp_path / "small"
    wanted = without_cache(gene)
    capsys.readouterr()
    assert main(["generate", str(gene), PROMPT, "--max-new-tokens", str(LENGTH)]) == 0
    assert capsys.readouterr().out == wanted + "\n"
    assert len(set(wanted[len(PROMPT) :])) > 1
