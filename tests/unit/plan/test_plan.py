import dataclasses
import json

import pytest

from megatron_inherit.base.errors import PlanError, UsageError
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.inherit.inheritune import plan_fresh, plan_inheritance
from megatron_inherit.plan.convert import plan_conversion
from megatron_inherit.plan.ops import Copy, Init, Tie
from megatron_inherit.plan.plan import TransferPlan, describe_layers
from tests.support.checkpoints import gpt2, llama, random_arrays, write_checkpoint


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("teacher"), llama(), random_arrays(llama()), "hf")
    with open_source(folder) as source:
        yield source


@pytest.fixture(scope="module")
def tied_teacher(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("gpt2"), gpt2(), random_arrays(gpt2()), "hf")
    with open_source(folder) as source:
        yield source


def fresh_roles(plan):
    return {op.target.split(".")[-2 if "layers" in op.target else 0] for op in plan.ops if isinstance(op, Init)}


def test_a_plan_is_a_value(teacher):
    plan = plan_inheritance(teacher, layers=[2, 0, 0], reset=("mlp",), seed=5)
    assert TransferPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.fingerprint() == TransferPlan.from_json(json.loads(json.dumps(plan.to_json()))).fingerprint()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.seed = 1


def test_planning_reads_no_tensor(teacher):
    before = teacher.pool.bytes_read
    plan_inheritance(teacher, layers=[0, 1])
    assert teacher.pool.bytes_read == before


def test_every_teacher_tensor_is_used_or_dropped_with_a_reason(teacher):
    plan = plan_inheritance(teacher, layers=[3, 1], reset=("embed", "norm"))
    used = {name for op in plan.ops for name in op.inputs}
    assert used | set(plan.dropped) == set(teacher.tensors)
    assert not used & set(plan.dropped)
    assert plan.dropped["layers.0.attn.q.weight"] == "layer not chosen"
    assert plan.dropped["layers.1.attn_norm.weight"] == plan.dropped["embed.weight"] == "reset"


def test_students_blocks_come_from_the_chosen_ones(teacher):
    plan = plan_inheritance(teacher, layers=[3, 1, 1])
    sources = {op.target: op.source for op in plan.ops if isinstance(op, Copy)}
    assert sources["layers.0.mlp.up.weight"] == "layers.3.mlp.up.weight"
    assert sources["layers.2.attn.o.weight"] == "layers.1.attn.o.weight"
    assert sources["head.weight"] == "head.weight"


def test_residual_projections_start_smaller_by_the_students_depth(teacher):
    plan = plan_inheritance(teacher, layers=[0, 1], reset=("attn",))
    by_name = {op.target: op for op in plan.ops}
    output = by_name["layers.0.attn.o.weight"]
    assert (output.init, output.num_layers, output.std) == ("residual", 2, 0.02)
    assert "0.01" in output.describe()


def test_as_published_inherits_blocks_and_head_alone(teacher, tied_teacher):
    untied = plan_inheritance(teacher, layers=[0], as_published=True)
    assert {op.target for op in untied.ops if isinstance(op, Init)} == {"embed.weight", "final_norm.weight"}
    tied = plan_inheritance(tied_teacher, layers=[0], as_published=True)
    expected = {"pos_embed.weight", "final_norm.weight", "final_norm.bias"}
    assert {op.target for op in tied.ops if isinstance(op, Init)} == expected
    assert "released" in tied.title


def test_head_of_a_tied_teacher_cannot_be_reset_alone(tied_teacher):
    with pytest.raises(UsageError, match="Reset embed"):
        plan_inheritance(tied_teacher, layers=[0], reset=("head",))


def test_optimizer_state_that_is_not_there_is_refused(teacher):
    with pytest.raises(PlanError, match="no optimizer state"):
        plan_conversion(teacher, optimizer=True)


def test_what_is_not_total_is_refused(teacher):
    plan = plan_conversion(teacher)
    first, *rest = plan.ops
    wrong = [
        (dataclasses.replace(plan, ops=tuple(rest)), "embed.weight of the output no source"),
        (dataclasses.replace(plan, ops=(first, *plan.ops)), "2 sources"),
        (dataclasses.replace(plan, ops=(*plan.ops, dataclasses.replace(first, target="extra"))), "no tensor of"),
        (dataclasses.replace(plan, ops=(dataclasses.replace(first, source="embd"), *rest)), "embd, which"),
        (dataclasses.replace(plan, ops=(dataclasses.replace(first, shape=(1, 2)), *rest)), "wrong shape"),
        (dataclasses.replace(plan, ops=(dataclasses.replace(first, box=((0, 3), (0, 32))), *rest)), "cannot be copied"),
        (dataclasses.replace(plan, dropped={"embed.weight": "why"}), "used and listed as dropped"),
        (dataclasses.replace(plan, ops=(_tie(first, "nothing"), *rest), dropped={"embed.weight": ""}), "the same as"),
        (dataclasses.replace(plan, ops=(_tie(first, "head.weight"), *rest)), "neither used nor listed"),
    ]
    for broken, words in wrong:
        with pytest.raises(PlanError, match=words):
            broken.check()
    tied = dataclasses.replace(plan, ops=(_tie(first, "head.weight"), *rest), dropped={"embed.weight": "tied"})
    tied.check()


def _tie(op, to):
    return Tie(target=op.target, shape=op.shape, dtype=op.dtype, to=to)


def test_a_fresh_model_needs_no_teacher():
    plan = plan_fresh(llama(), seed=3)
    assert plan.origin is None
    assert all(isinstance(op, Init) for op in plan.ops)


def test_layer_lists_are_written_shortly():
    assert describe_layers([0, 1, 2, 5, 5, 4]) == "0-2, 5, 5, 4"
