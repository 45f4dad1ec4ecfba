"""The Megatron engine at one process: the golden losses, exact restore, skipped steps, dtypes."""

from __future__ import annotations

import importlib.util
import weakref

import megatron.core.optimizer
import pytest
import torch

from megatron_inherit.engines.base import EngineOptions
from megatron_inherit.engines.create import create_engine
from megatron_inherit.engines.megatron import engine as module
from megatron_inherit.engines.megatron.config import model_fields
from megatron_inherit.model.load import random_reader
from tests.support.engine_acts import read_from, save_to
from tests.support.engine_world import GLOBAL_BATCH, MODELS, learning_rate, replica_batches
from tests.support.plain_loop import golden


def _engine(model: str = "llama", **options):
    return create_engine("megatron", EngineOptions(**{"micro_batch": 4, **options}), MODELS[model], seed=3)


def _train(engine, first: int, steps: int, *, micro: int = 4):
    place = {"data_rank": 0, "data_size": 1, "micro_batch": micro}
    return [
        engine.train_step(replica_batches(step, **place), lr=learning_rate(step))
        for step in range(first, first + steps)
    ]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_first_steps_are_golden(model):
    for result, (loss, norm) in zip(_train(_engine(model), 0, 3), golden(model), strict=False):
        assert result.loss == pytest.approx(loss, abs=1e-5)
        assert result.grad_norm == pytest.approx(norm, abs=1e-4)
        assert not result.skipped


def test_accumulation_does_not_change_the_step():
    one, many = _train(_engine(), 0, 3, micro=GLOBAL_BATCH), _train(_engine(), 0, 3, micro=1)
    for a, b in zip(one, many, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=2e-6)
        assert a.tokens == b.tokens


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_bit(recompute):
    plain, again = _engine(), _engine(recompute=recompute)
    assert _train(plain, 0, 2) == _train(again, 0, 2)
    assert plain.weight_hash() == again.weight_hash()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"dtype": "bf16", "distributed_optimizer": True}])
def test_restored_run_is_bitwise_the_uninterrupted_one(options, tmp_path):
    engine = _engine(**options)
    _train(engine, 0, 2)
    save_to(tmp_path, engine)
    expected = _train(engine, 2, 2)
    other = _engine(**options)
    _train(other, 7, 1)
    other.restore(read_from(tmp_path), step_count=2)
    assert other.step_count() == 2
    assert _train(other, 2, 2) == expected
    assert other.weight_hash() == engine.weight_hash()


class CountsByGroup(torch.optim.Optimizer):
    """AdamW that counts its steps as apex's and Transformer Engine's do: by group, from the first one on."""

    def __init__(self, params, *, adam_w_mode, **more):
        assert adam_w_mode
        super().__init__(params, more)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            (first, second), count = group["betas"], group["step"]
            for parameter in group["params"]:
                state = self.state[parameter]
                mean = state.setdefault("exp_avg", torch.zeros_like(parameter)).lerp_(parameter.grad, 1 - first)
                square = state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
                square.lerp_(parameter.grad.square(), 1 - second)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                scale = (square / (1 - second**count)).sqrt().add_(group["eps"])
                parameter.addcdiv_(mean, scale, value=-group["lr"] / (1 - first**count))


def test_an_optimizer_that_counts_by_group_goes_on_counting(monkeypatch, tmp_path):
    monkeypatch.setattr(megatron.core.optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(megatron.core.optimizer, "Adam", CountsByGroup)
    engine, other = _engine(), _engine()
    assert _train(engine, 0, 1)[0].loss == pytest.approx(golden("llama")[0][0], abs=1e-5)
    save_to(tmp_path, engine)
    expected = _train(engine, 1, 2)
    assert expected[1].loss == pytest.approx(golden("llama")[2][0], abs=1e-5)
    other.restore(read_from(tmp_path), step_count=1)
    assert _train(other, 1, 2) == expected
    other.restore(read_from(tmp_path), step_count=0)
    assert {group["step"] for group in other.stepper.adam.param_groups} == {0}


def test_a_new_engine_in_the_old_ones_place_does_not_find_its_weights_in_memory(monkeypatch):
    options = EngineOptions(micro_batch=4, distributed_optimizer=True, overlap_grad_reduce=True, recompute="full")
    engine, build, alive = create_engine("megatron", options, MODELS["llama"], seed=3), module.build_chunks, []
    _train(engine, 0, 1)
    old = [weakref.ref(parameter) for parameter in engine.chunks[0].parameters()]
    old += [weakref.ref(state["exp_avg"]) for state in engine.stepper.adam.state.values()]

    def look(*arguments):
        alive.append(sum(reference() is not None for reference in old))
        return build(*arguments)

    monkeypatch.setattr(module, "build_chunks", look)
    engine.rebuild(options, random_reader(MODELS["llama"], 3))
    assert alive == [0]
    assert _train(engine, 0, 1)[0].loss == pytest.approx(golden("llama")[0][0], abs=1e-5)


def test_parts_before_the_first_step_are_weights_only(tmp_path):
    engine = _engine()
    assert {part.kind for part in engine.parts()} == {"weight"}
    save_to(tmp_path, engine)
    other = _engine()
    _train(other, 0, 1)
    other.restore(read_from(tmp_path), step_count=0)
    assert _train(other, 0, 2) == _train(engine, 0, 2)


@pytest.mark.slow
def test_bf16_keeps_masters_and_learns():
    engine = _engine(dtype="bf16")
    losses = [result.loss for result in _train(engine, 0, 12)]
    assert losses[-1] < losses[0] - 0.5
    kinds = {part.kind: part.tensor.dtype for part in engine.parts()}
    assert kinds == {
        "weight": torch.bfloat16,
        "fp32": torch.float32,
        "exp_avg": torch.float32,
        "exp_avg_sq": torch.float32,
    }


def test_a_gradient_that_is_not_finite_changes_nothing():
    engine = _engine()
    _train(engine, 0, 1)
    before = {(p.name, p.kind, p.start): p.tensor.clone() for p in engine.parts()}
    norm = engine.chunks[0].decoder.final_layernorm

    def spoil(_module, _inputs, output):
        handle.remove()
        output.register_hook(lambda gradient: gradient * torch.nan)

    handle = norm.register_forward_hook(spoil)
    (result,) = _train(engine, 1, 1)
    assert result.skipped
    assert engine.step_count() == 1
    for part in engine.parts():
        assert torch.equal(part.tensor, before[part.name, part.kind, part.start])
    assert not _train(engine, 1, 1)[0].skipped


def test_only_matrices_of_blocks_and_the_head_decay():
    engine = _engine(weight_decay=0.5)
    groups = {group["weight_decay"]: group["params"] for group in engine.stepper.adam.param_groups}
    names = {id(p): name for name, p in engine.chunks[0].named_parameters()}
    decayed = {names[id(p)].rsplit(".", 2)[-2] for p in groups[0.5]}
    assert decayed == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer"}
    assert len(groups[0.0]) + len(groups[0.5]) == len(names)


@pytest.mark.parametrize(("cuda", "apex", "fused"), [(True, True, True), (True, None, False), (False, True, False)])
def test_weight_gradients_accumulate_in_apex_where_it_is(monkeypatch, caplog, cuda, apex, fused):
    found = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: apex if name == "fused_weight_gradient_mlp_cuda" else found(name)
    )
    with caplog.at_level("INFO"):
        assert model_fields(EngineOptions())["gradient_accumulation_fusion"] is fused
    assert ("apex's fused matrix product" in caplog.text) is fused


def test_logits_and_losses_agree():
    engine = _engine()
    batch = replica_batches(0, data_rank=0, data_size=1, micro_batch=3)[0]
    sums, counts = engine.sequence_losses(batch)
    logits = engine.logits(torch.from_numpy(batch.tokens))
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten(), reduction="none"
    ).view(3, -1)
    mask = torch.from_numpy(batch.loss_mask)
    assert sums == pytest.approx((losses * mask).sum(1).tolist(), abs=1e-4)
    assert counts == mask.sum(1).tolist()


def test_logits_of_a_diverged_model_are_no_numbers():
    engine = _engine()
    engine.chunks[0].head_weight().data.fill_(torch.nan)
    batch = replica_batches(0, data_rank=0, data_size=1, micro_batch=3)[0]
    assert bool(engine.logits(torch.from_numpy(batch.tokens)).isnan().all())
