"""What DeepSpeed is told, and that it needs no compiler."""

import pytest

from megatron_inherit.engines.base import EngineOptions
from tests.support.engine_world import MODELS, replica_batches, run_world


def play(_):
    """Trains a step of each kind in one process and tells in what dtype gradients add up."""
    import torch.utils.cpp_extension

    from megatron_inherit.engines.create import create_engine

    def refuse(*words, **more):
        raise AssertionError("a compiler was asked for")

    torch.utils.cpp_extension.load = refuse
    found = {}
    for stage in (1, 2, 3):
        options = EngineOptions(
            zero_stage=stage, dtype="bf16", micro_batch=4, offload="optimizer" if stage == 2 else "none"
        )
        engine = create_engine("deepspeed", options, MODELS["llama"], seed=3)
        batches = replica_batches(0, data_rank=0, data_size=1, micro_batch=4)
        result = engine.train_step(batches, lr=1e-3)
        weights, sums = engine.engine.get_data_types()
        found[stage] = (str(weights), str(sums), len(batches), result.skipped, result.forward_seconds > 0)
    return found


def replace(stage):
    """Builds an engine anew and tells how many weights, masters and moments of the old one there were meanwhile."""
    import weakref

    from megatron_inherit.engines.create import create_engine
    from megatron_inherit.engines.deepspeed import engine as module
    from megatron_inherit.engines.deepspeed.shards import masters
    from megatron_inherit.model.load import random_reader

    options, batches = EngineOptions(zero_stage=stage), replica_batches(0, data_rank=0, data_size=1, micro_batch=1)
    engine, build, alive = create_engine("deepspeed", options, MODELS["llama"], seed=3), module.build_chunks, []
    engine.train_step(batches, lr=1e-3)
    old = [weakref.ref(tensor) for tensor in (*engine.model.parameters(), *masters(engine.optimizer))]
    old += [weakref.ref(state["exp_avg"]) for state in engine.adam.state.values()]

    def look(*arguments):
        alive.append(sum(reference() is not None for reference in old))
        return build(*arguments)

    module.build_chunks = look
    engine.rebuild(options, random_reader(engine.config, 3))
    return alive


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_a_new_engine_in_the_old_ones_place_does_not_find_its_weights_in_memory(stage):
    pytest.importorskip("deepspeed")
    assert run_world(1, replace, stage) == [[0]]


@pytest.mark.nightly
def test_gradients_of_bf16_weights_add_up_in_fp32_and_no_compiler_runs():
    pytest.importorskip("deepspeed")
    (found,) = run_world(1, play)
    assert set(found) == {1, 2, 3}
    assert set(found.values()) == {("torch.bfloat16", "torch.float32", 2, False, True)}


@pytest.mark.slow
@pytest.mark.parametrize(("parameters", "elements"), [(1000, 1000), (7_000_000_000, 500_000_000)])
def test_buckets_are_not_larger_than_the_model(parameters, elements):
    from megatron_inherit.engines.deepspeed.config import deepspeed_config

    zero = deepspeed_config(EngineOptions(zero_stage=2), replicas=2, parameters=parameters)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (elements, elements)


@pytest.mark.slow
def test_gradients_are_changed_where_they_are_and_not_where_offloaded_weights_lie():
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    from megatron_inherit.engines.deepspeed.edits import GradientEdits

    gradients = torch.device("meta")  # stands for a GPU: what is on it and what is not cannot be mixed
    weights = SimpleNamespace(ds_tensor=torch.ones(4), ds_numel=4)
    weights.ds_tensor.ds_numel = 4
    edits = GradientEdits(None, EngineOptions(zero_stage=3), SimpleNamespace(rank=lambda: 0), gradients)
    assert edits._changes([weights, weights]).device == gradients
