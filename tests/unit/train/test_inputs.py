"""The samples of a run: as many as it needs at its start, and more where a rollback gave some up."""

import numpy as np
import pytest

from megatron_inherit.base.errors import DataError
from megatron_inherit.config.load import load_recipe
from megatron_inherit.train.inputs import open_data
from megatron_inherit.train.preflight import plan_run
from tests.support import tiny_run


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
