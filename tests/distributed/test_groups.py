"""A model that is built anew, for stages that are split, leaves no process group and no thread behind."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from tests.support import forked_world
from tests.support.engine_world import MODELS, learning_rate, replica_batches

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ENGINES = {
    "megatron": {"pp": 2},
    "deepspeed": {"zero_stage": 2},
}
PLANS = ("6,2", "4,2,2", "2,2,2,2")


def rebuild(kind, folder):
    """Splits stages that lie on both ranks again and again; writes groups, threads and loss after every split."""
    import torch.distributed as dist

    from megatron_inherit.engines.base import EngineOptions
    from megatron_inherit.engines.create import create_engine
    from megatron_inherit.model.load import random_reader
    from megatron_inherit.sharing.options import Sharing
    from megatron_inherit.sharing.stage_plan import parse_plan

    gather = dist.all_gather_object

    def guarded(*words, **more):
        assert not sys._getframe(1).f_globals["__name__"].startswith("megatron_inherit"), "our own text is pickled"
        return gather(*words, **more)

    dist.all_gather_object = guarded
    sharing = Sharing(plan=parse_plan("8"), allow_cross_rank=True, guard_every_steps=1)
    options = EngineOptions(micro_batch=2, sharing=sharing, **ENGINES[kind])
    engine = create_engine(kind, options, MODELS["llama"], seed=3)
    place = {"data_rank": engine.topology.data_rank, "data_size": engine.topology.data_size, "micro_batch": 2}
    rows = []
    for step, plan in enumerate(("", *PLANS)):
        if plan:
            finer = dataclasses.replace(options, sharing=dataclasses.replace(sharing, plan=parse_plan(plan)))
            engine.rebuild(finer, random_reader(engine.config, 3))
        loss = engine.train_step(replica_batches(step, **place), lr=learning_rate(step)).loss
        rows.append((len(dist.distributed_c10d._world.pg_map), len(os.listdir("/proc/self/task")), loss))
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(rows))
    engine.close()
    return 0


@pytest.mark.parametrize("kind", ENGINES)
def test_groups_and_threads_are_as_many_as_before(tmp_path, kind):
    forked_world.preload("megatron_inherit.engines.deepspeed.engine")
    ended = forked_world.World(tmp_path, 2, lambda: rebuild(kind, tmp_path), {}).wait()
    assert ended.codes == [0, 0], ended.text
    for rank in range(2):
        groups, threads, losses = zip(*json.loads(Path(tmp_path, f"{rank}.json").read_text()), strict=True)
        assert len(set(groups)) == 1, groups
        assert len(set(threads)) == 1, threads
        assert len(set(losses)) == len(losses)


def keep_by_purpose(folder):
    """Makes Megatron-Core's groups three times, as with NCCL: one group a purpose."""
    import torch
    import torch.distributed as dist

    from megatron_inherit.model import groups

    groups.start_processes()
    torch.cuda.is_available = lambda: True
    counts = []
    for _ in range(3):
        made = groups.make_groups(tp=2)
        counts.append(len(dist.distributed_c10d._world.pg_map))
    value = torch.ones(1)
    dist.all_reduce(value, group=made.tp)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps([*counts, made.tp is made.mp, value.item()]))
    torch.cuda.is_available = lambda: False
    groups.leave_processes()
    return 0


def test_groups_of_different_purposes_stay_apart_and_are_kept(tmp_path):
    forked_world.preload()
    ended = forked_world.World(tmp_path, 2, lambda: keep_by_purpose(tmp_path), {}).wait()
    assert ended.codes == [0, 0], ended.text
    first, *again, same, total = json.loads((tmp_path / "1.json").read_text())
    assert first > 10
    assert again == [first, first]
    assert (same, total) == (False, 2.0)


def tell_timeouts(folder):
    """Writes after how many seconds collectives of the model's groups are given up."""
    import torch

    from megatron_inherit.model import groups

    groups.start_processes(timeout_s=77.0)
    made = groups.make_groups(tp=2)
    found = [made.tp, made.dp, made.mp, made.pp, made.dp_cp, groups.group_of([0, 1], "shared stage")]
    seconds = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in found]
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(seconds))
    groups.leave_processes()
    return 0


def test_every_group_has_the_timeout_of_the_run(tmp_path):
    forked_world.preload()
    ended = forked_world.World(tmp_path, 2, lambda: tell_timeouts(tmp_path), {}).wait()
    assert ended.codes == [0, 0], ended.text
    assert json.loads((tmp_path / "1.json").read_text()) == [77.0] * 6
