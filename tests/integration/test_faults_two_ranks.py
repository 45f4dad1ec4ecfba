"""Faults of one of two ranks that talk over gloo."""

import itertools
import json
import time

import pytest

from tests.support import forked_world, tiny_run
from tests.support.sabotage import dawdle, poison, sabotage, spike
from tests.support.tiny_run import curve, recipe, rows, saved_hashes, status

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    forked_world.preload()
    return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, corpus):
    """The uninterrupted run of two ranks."""
    folder = tmp_path_factory.mktemp("reference")
    ended = train(folder, corpus)
    assert ended.codes == [0, 0], ended.text
    return folder / "run"


def train(folder, corpus, *overrides, fault="", size=2, sections=None, **more):
    path = recipe(folder, corpus, **(sections or {}))
    return forked_world.run(folder, ["train", path, *overrides], size=size, MI_FAULT=fault, **more)


def same(run, reference):
    assert curve(run) == curve(reference)
    assert saved_hashes(run, 20) == saved_hashes(reference, 20)


def test_two_ranks_train_as_one(tmp_path, corpus, reference):
    assert train(tmp_path, corpus, size=1).codes == [0]
    one, two = rows(tmp_path / "run"), rows(reference)
    assert [row["samples"] for row in one] == [row["samples"] for row in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    for a, b in zip(rows(tmp_path / "run", "eval"), rows(reference, "eval"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_two_one_two_ranks_see_the_same_samples(tmp_path, corpus, reference):
    assert train(tmp_path, corpus, "train.stop_after=7").codes == [75, 75]
    assert train(tmp_path, corpus, "train.stop_after=6", size=1).codes == [75]
    assert train(tmp_path, corpus).codes == [0, 0]
    for a, b in zip(rows(tmp_path / "run"), rows(reference), strict=True):
        assert a["samples"] == b["samples"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("fault", "resumes_after"),
    [("mid_shard_write:1:15:kill", 10), ("before_manifest:0:15:kill", 10), ("before_latest:0:15:kill", 15)],
)
def test_a_rank_killed_while_saving(tmp_path, corpus, reference, fault, resumes_after):
    ended = train(tmp_path, corpus, fault=fault)
    assert -9 in ended.codes
    assert 0 not in ended.codes
    ended = train(tmp_path, corpus)
    assert ended.codes == [0, 0], ended.text
    assert f"Resuming after step {resumes_after} of 20" in ended.text
    same(tmp_path / "run", reference)


def test_a_rank_killed_while_training_is_named_by_the_other(tmp_path, corpus, reference):
    ended = train(tmp_path, corpus, fault="step_start:1:13:kill")
    assert ended.codes == [1, -9], ended.text
    assert "Lost rank 1" in ended.texts[0]
    assert "step 13" in ended.texts[0]
    assert "Lost rank 1" in status(tmp_path / "run")["reason"]
    assert train(tmp_path, corpus).codes == [0, 0]
    same(tmp_path / "run", reference)


def test_a_clock_that_jumps_changes_nothing(tmp_path, corpus, reference):
    def jumping():
        real, calls = time.time, itertools.count()
        time.time = lambda: real() + 86400 * (-1) ** next(calls)

    ended = train(tmp_path, corpus, before=jumping)
    assert ended.codes == [0, 0], ended.text
    same(tmp_path / "run", reference)


def test_a_signal_to_one_rank_saves_on_both_at_the_same_step(tmp_path, corpus, reference):
    ended = train(tmp_path, corpus, fault="step_start:1:13:term")
    assert ended.codes == [75, 75], ended.text
    assert json.loads((tmp_path / "run/checkpoints/step_00000013/manifest.json").read_text())["world_size"] == 2
    assert status(tmp_path / "run")["exit_code"] == 75
    assert train(tmp_path, corpus).codes == [0, 0]
    same(tmp_path / "run", reference)


def test_swapped_shards_are_found(tmp_path, corpus, reference):
    assert train(tmp_path, corpus, "train.stop_after=12").codes == [75, 75]
    newest = tmp_path / "run/checkpoints/step_00000012"
    for name in ("json", "safetensors"):
        one, two = newest / f"rank_00000.{name}", newest / f"rank_00001.{name}"
        one.rename(newest / "x")
        two.rename(one)
        (newest / "x").rename(two)
    ended = train(tmp_path, corpus)
    assert ended.codes == [0, 0]
    assert "Skipping step_00000012" in ended.text
    same(tmp_path / "run", reference)


def test_a_disk_full_for_one_rank_stops_both(tmp_path, corpus):
    ended = train(tmp_path, corpus, fault="mid_shard_write:1:10:full", sections={"checkpoint": {"asynchronous": True}})
    assert ended.codes == [7, 7], ended.text
    assert status(tmp_path / "run")["exit_code"] == 7
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000005"]


def test_a_stopped_rank_is_named_and_nothing_is_left(tmp_path, corpus):
    ended = train(
        tmp_path, corpus, fault="step_start:1:7:stop", sections={"guard": {"watchdog_seconds": 3}}, timeout=60
    )
    assert ended.codes == [1, -9], ended.text
    assert "No progress for 3 s: rank 1" in ended.texts[0]
    assert "step 7, phase data" in ended.texts[0]
    assert "rank 1" in status(tmp_path / "run")["reason"]


@pytest.mark.parametrize("place", ["before", "inside"])
def test_a_slow_rank_is_reported_and_the_loss_is_the_same(tmp_path, corpus, reference, place):
    if place == "before":
        ended = train(tmp_path, corpus, fault="step_start:1:*:sleep=0.2")
    else:
        ended = train(tmp_path, corpus, before=sabotage(dawdle(0.1)))  # of two micro-batches a step
    assert ended.codes == [0, 0], ended.text
    reports = rows(tmp_path / "run", "straggler")
    assert {row["rank"] for row in reports} == {1}
    assert min(row["score"] for row in reports) < 0.7
    assert curve(tmp_path / "run") == curve(reference)
    assert not rows(reference, "straggler")


GATHERED = ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
WAITING = {
    "tp2": ["parallel.tp=2"],
    "zero3": ["engine=deepspeed", "deepspeed.zero_stage=3"],
    "overlapped": [f"megatron.{key}=true" for key in GATHERED],
}


@pytest.mark.parametrize("layout", WAITING.values(), ids=WAITING)
def test_a_slow_rank_for_which_the_others_wait_within_the_step_is_reported(tmp_path, corpus, layout):
    words = [*layout, "train.steps=10"]
    ended = train(tmp_path / "calm", corpus, *words)
    assert ended.codes == [0, 0], ended.text
    assert not rows(tmp_path / "calm/run", "straggler")
    ended = train(tmp_path / "slow", corpus, *words, before=sabotage(dawdle(0.1)))
    assert ended.codes == [0, 0], ended.text
    first, *more = rows(tmp_path / "slow/run", "straggler")
    assert (first["rank"], first["step"]) == (1, 5)
    assert first["score"] < 0.7
    assert first["busy_seconds"] > 0.2
    assert {report["rank"] for report in more} <= {1}
    assert curve(tmp_path / "slow/run") == curve(tmp_path / "calm/run")


def test_who_waits_for_a_slow_rank_is_not_taken_for_one(tmp_path, corpus):
    ended = train(tmp_path, corpus, "parallel.tp=2", fault="step_start:1:*:sleep=0.2")
    assert ended.codes == [0, 0], ended.text
    reports = rows(tmp_path / "run", "straggler")
    assert {row["rank"] for row in reports} == {1}
    assert [row["step"] for row in reports] == [5, 10, 15, 20], "looks without a record too"


def test_a_gradient_that_is_not_finite_is_skipped_on_both(tmp_path, corpus, reference):
    ended = train(tmp_path, corpus, before=sabotage(poison(lambda first: first // 8 == 6)))
    assert ended.codes == [0, 0], ended.text
    (skip,) = rows(tmp_path / "run", "skip")
    assert skip["step"] == 7
    assert skip["sample_ids"] == [48, 55]
    assert skip["skipped_steps"] == 1
    assert len(rows(tmp_path / "run")) == 20
    assert curve(tmp_path / "run")[:6] == curve(reference)[:6]
    state = json.loads((tmp_path / "run/checkpoints/step_00000020/state.json").read_text())
    assert state["updates"] == 19
    assert state["run"]["skipped_steps"] == 1


def test_bad_samples_are_rolled_back_over(tmp_path, corpus):
    bad = poison(lambda first: 56 <= first < 88)
    ended = train(tmp_path, corpus, before=sabotage(bad))
    assert ended.codes == [0, 0], ended.text
    (rollback,) = rows(tmp_path / "run", "rollback")
    assert (rollback["step"], rollback["from_step"], rollback["sample_ids"]) == (5, 11, [56, 87])
    taken = [row["samples"] for row in rows(tmp_path / "run")]
    assert taken[:9] == [8, 16, 24, 32, 40, 48, 56, 96, 104]
    assert len(taken) == 20
    assert rows(tmp_path / "run", "skip") == []
    assert len((tmp_path / "run/metrics.discarded.jsonl").read_text().splitlines()) > 6


def test_a_run_that_never_recovers_gives_up_with_6(tmp_path, corpus):
    bad = poison(lambda first: first >= 56)
    ended = train(tmp_path, corpus, before=sabotage(bad))
    assert ended.codes == [6, 6], ended.text
    assert "did not recover" in ended.text
    assert status(tmp_path / "run")["exit_code"] == 6
    again = train(tmp_path, corpus, before=sabotage(bad))
    assert again.codes == [6, 6]


def test_a_finite_spike_is_rolled_back_over(tmp_path, corpus, reference):
    ended = train(tmp_path, corpus, before=sabotage(spike(lambda first: 72 <= first < 104)))
    assert ended.codes == [0, 0], ended.text
    (rollback,) = rows(tmp_path / "run", "rollback")
    assert (rollback["step"], rollback["from_step"], rollback["sample_ids"]) == (5, 13, [72, 103])
    discarded = [json.loads(line) for line in (tmp_path / "run/metrics.discarded.jsonl").read_text().splitlines()]
    spikes = [row for row in discarded if row["kind"] == "spike"]
    assert [row["sample_ids"] for row in spikes] == [[72, 79], [80, 87], [88, 95], [96, 103]]
    assert all(row["loss"] > 5 * rows(reference)[0]["loss"] for row in spikes)
    taken = rows(tmp_path / "run")
    assert [row["samples"] for row in taken] == [*range(8, 80, 8), *range(112, 200, 8)]
    assert [row["loss"] for row in taken[:9]] == [row["loss"] for row in rows(reference)[:9]]
    assert json.loads((tmp_path / "run/skipped_samples.json").read_text()) == [[72, 104]]


def test_a_spike_that_stays_ends_with_6(tmp_path, corpus):
    ended = train(tmp_path, corpus, before=sabotage(spike(lambda first: first >= 72)))
    assert ended.codes == [6, 6], ended.text
    assert "did not recover" in ended.text
    assert rows(tmp_path / "run", "skip") == []


def test_weights_that_silently_differ_are_found(tmp_path, corpus):
    seen = []

    def change(engine, rank, micro_batches):
        seen.append(rank)
        if rank == 1 and len(seen) == 7:
            next(engine.chunks[0].parameters()).data.view(-1)[5] += 1e-4

    ended = train(tmp_path, corpus, before=sabotage(change))
    assert ended.codes == [6, 6], ended.text
    assert "Ranks 0, 1 hold other weights than their replicas after step 10" in ended.text
