"""Weights that are gathered during the next forward pass are what they are without, wherever they leave the engine."""

import dataclasses
import os

import numpy as np
import pytest

from tests.support import forked_world
from tests.support.engine_world import MODELS, learning_rate, replica_batches

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
CASES = {"plain": None, "one-bucket": None, "many-buckets": 3000}
"""Elements of a gradient bucket; a large model's head has one of its own."""


def train(folder, model):
    """Trains three steps in each way and writes the losses and this rank's part of the weights."""
    from megatron_inherit.engines.base import EngineOptions
    from megatron_inherit.engines.megatron import engine as module
    from megatron_inherit.model.load import random_reader

    configure, rank = module.buffer_config, int(os.environ["RANK"])
    for name, bucket in CASES.items():
        module.buffer_config = lambda options, size=bucket: dataclasses.replace(configure(options), bucket_size=size)
        overlap = name != "plain"
        options = EngineOptions(
            micro_batch=2, distributed_optimizer=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap
        )
        engine = module.MegatronEngine(options, model, random_reader(model, 3))
        place = {"data_rank": rank, "data_size": 2, "micro_batch": 2}
        losses = [engine.train_step(replica_batches(step, **place), lr=learning_rate(step)).loss for step in range(3)]
        assert len(set(engine.gather_text(engine.weight_hash()))) == 1, name
        weights = {part.name: part.tensor.numpy() for part in engine.parts() if part.kind == "weight"}
        np.savez(folder / f"{name}-{rank}.npz", losses=losses, **weights)
    return 0


@pytest.mark.parametrize("model", MODELS)
def test_weights_that_leave_the_engine_after_a_step_are_whole(tmp_path, model):
    forked_world.preload()
    config = MODELS[model].with_layers(2)
    ended = forked_world.World(tmp_path, 2, lambda: train(tmp_path, config), {}).wait()
    assert ended.codes == [0, 0], ended.text
    for rank in range(2):
        plain, *others = (np.load(tmp_path / f"{name}-{rank}.npz") for name in CASES)
        for found in others:
            assert found.files == plain.files
            for name in plain.files:
                np.testing.assert_allclose(found[name], plain[name], rtol=0, atol=1e-6, err_msg=name)
