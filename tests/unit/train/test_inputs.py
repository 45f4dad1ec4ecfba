"""The samples of a run: as many as it needs, more where a rollback gave some up, of the tokens that its model knows."""

import json

import numpy as np
import pytest

from megatron_inherit.base.errors import DataError
from megatron_inherit.config.load import load_recipe
from megatron_inherit.data.ingest import IngestOptions, ingest
from megatron_inherit.data.tokenize import TokenizeOptions, tokenize
from megatron_inherit.train.inputs import open_data
from megatron_inherit.train.preflight import plan_run
from tests.support import tiny_run
from tests.support.text_data import make_texts, write_jsonl
from tests.support.tiny_hf import tiny_llama


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"), documents=20)


def opened(folder, corpus, steps):
    path = tiny_run.recipe(folder, corpus, data={"epochs": 1}, train={"steps": steps})
    plan = plan_run(load_recipe(path), world_size=1)
    return plan, open_data(plan, 0)[0]


def test_samples_beyond_the_data_replace_those_that_a_rollback_gave_up(tmp_path, corpus):
    _, probe = opened(tmp_path, corpus, 2)
    most = probe.samples_per_epoch // 8
    with pytest.raises(DataError, match="too few tokens"):
        opened(tmp_path, corpus, most + 1)
    plan, loader = opened(tmp_path, corpus, most)
    past = loader.batch(plan.total_samples, 32)  # four steps were given up
    assert past.sample_ids[-1] >= loader.samples_per_epoch
    assert len(np.unique(loader.windows(past.sample_ids[past.sample_ids >= loader.samples_per_epoch]))) > 1


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A model, its teacher and data of their tokenizer."""
    folder = tmp_path_factory.mktemp("taught")
    model, teacher = tiny_llama(folder / "model", layers=2), tiny_llama(folder / "teacher", layers=2, seed=1)
    write_jsonl(folder / "in" / "texts.jsonl", make_texts(60))
    ingest([str(folder / "in")], folder / "text", IngestOptions())
    tokenize(folder / "text", folder / "tokens", TokenizeOptions(tokenizer=str(model)))
    return folder, model, teacher


def warnings_of(folder, taught, caplog):
    caplog.clear()
    data, model, teacher = taught
    path = tiny_run.recipe(
        folder,
        data,
        model={"preset": None, "init": "weights", "shape": {}, "path": str(model)},
        data={"path": str(data / "tokens")},
        distill={"teacher": str(teacher)},
        train={"steps": 2},
        eval={"windows": None},
    )
    open_data(plan_run(load_recipe(path), world_size=1), 0)
    return [record.getMessage() for record in caplog.records if "its tokenizer is not the one" in record.getMessage()]


def test_data_of_another_tokenizer_is_said(tmp_path, taught, caplog):
    _, model, teacher = taught
    assert warnings_of(tmp_path, taught, caplog) == []
    for key, folder in (("model.path", model), ("distill.teacher", teacher)):
        file = folder / "tokenizer.json"
        before = file.read_text()
        content = json.loads(before)
        vocabulary = content["model"]["vocab"]
        first, second = list(vocabulary)[:2]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        file.write_text(json.dumps(content))
        (message,) = warnings_of(tmp_path, taught, caplog)
        assert message.startswith(f"{key}: ")
        assert str(model) in message
        file.write_text(before)
