"""In how many parts a shared weight's gradient comes, and that an engine waits for all of them."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.engines.base import EngineOptions
from megatron_inherit.engines.create import create_engine
from megatron_inherit.sharing.hooks import OneGradient, check_hook_counts
from megatron_inherit.sharing.options import Sharing
from megatron_inherit.sharing.stage_plan import parse_plan
from tests.support.engine_world import MODELS, replica_batches


def backward(layer, *, reentrant):
    hidden = torch.ones(2, 3, requires_grad=True)
    for _ in range(4):
        hidden = checkpoint(layer, hidden, use_reentrant=reentrant)
    hidden.sum().backward()


def test_recomputed_uses_give_one_gradient():
    layer = torch.nn.Linear(3, 3)
    watch = OneGradient(layer)
    for _ in range(2):
        watch.expect(0)
        backward(layer, reentrant=False)


def test_reentrant_recomputation_is_refused_with_the_fix():
    layer = torch.nn.Linear(3, 3)
    watch = OneGradient(layer)
    watch.expect(0)
    with pytest.raises(ConfigError, match=r"(?s)gradient of \w+ came twice.*use_reentrant=False"):
        backward(layer, reentrant=True)


def test_only_the_first_step_is_watched():
    layer = torch.nn.Linear(3, 3)
    watch = OneGradient(layer)
    watch.expect(1)
    backward(layer, reentrant=True)


PLAN = "3,2,3"


def trained(plan=PLAN, steps=2, **options):
    """Trains at a learning rate of 0, so that every step's gradients are the first one's."""
    sharing = None if plan is None else Sharing(plan=parse_plan(plan))
    engine = create_engine(
        "megatron", EngineOptions(micro_batch=2, clip=0.0, sharing=sharing, **options), MODELS["llama"], seed=3
    )
    for _ in range(steps):
        engine.train_step(replica_batches(0, data_rank=0, data_size=1, micro_batch=2), lr=0.0)
    return engine


def main_gradients(engine):
    return {name: parameter.main_grad.double() for name, parameter in engine.chunks[0].named_parameters()}


def parts(engine):
    (chunk,) = engine.wrapped
    names = {parameter: name for name, parameter in chunk.module.named_parameters()}
    golden = [group.golden_per_param_grad_ready_counts for group in chunk.bucket_groups]
    return {names[parameter]: count for counts in golden for parameter, count in counts.items()}


OVERLAP = {"overlap_grad_reduce": True}
SHARDED = OVERLAP | {"distributed_optimizer": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "attention", "mlp"),
    [
        ({}, None, None),
        (OVERLAP, [1, 1, 1], [1, 1, 1]),
        ({"recompute": "full"}, None, None),
        (OVERLAP | {"recompute": "full"}, [3, 2, 3], [3, 2, 3]),
        (SHARDED | {"recompute": "full"}, [3, 2, 3], [3, 2, 3]),
        (SHARDED | {"recompute": "full", "overlap_param_gather": True}, [3, 2, 3], [3, 2, 3]),
        (OVERLAP | {"recompute": "selective"}, [1, 1, 1], [3, 2, 3]),
    ],
)
def test_shared_gradients_are_whole_however_they_are_recomputed(options, attention, mlp):
    engine, copies = trained(**options), trained("unshared:8", steps=1)
    copies.chunks[0].load_state_dict(engine.chunks[0].state_dict())
    copies.train_step(replica_batches(0, data_rank=0, data_size=1, micro_batch=2), lr=0.0)
    single, ids = main_gradients(copies), parse_plan(PLAN).ids("attn")
    for name, gradient in main_gradients(engine).items():
        wanted = single[name]
        if ".layers." in name:
            layer, inside = name.split(".layers.")[1].split(".", 1)
            wanted = sum(single[f"decoder.layers.{i}.{inside}"] for i in range(8) if ids[i] == ids[int(layer)])
        assert float((gradient - wanted).norm() / wanted.norm()) <= 1e-6, name
    if attention is not None:
        found = parts(engine)
        assert [found[f"decoder.layers.{i}.self_attention.linear_proj.weight"] for i in (0, 3, 5)] == attention
        assert [found[f"decoder.layers.{i}.mlp.linear_fc2.weight"] for i in (0, 3, 5)] == mlp
        assert found["output_layer.weight"] == 1


@pytest.mark.slow
def test_a_gradient_in_more_parts_than_uses_is_refused():
    engine = trained(recompute="full", **OVERLAP)
    check_hook_counts(engine.wrapped)
    engine.core.reentrant = False
    with pytest.raises(ConfigError, match=r"(?s)layers\.\d\.\S+ comes in [23] parts a step.*overlap_grad_reduce"):
        check_hook_counts(engine.wrapped)
