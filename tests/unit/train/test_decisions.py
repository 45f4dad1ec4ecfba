"""The loop's pure decisions: spikes, ranges given up, which checkpoints stay, whose weights differ."""

import json
import math
import os
import random
import shutil
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_inherit.base.errors import CheckpointError, DiskError, UsageError
from megatron_inherit.base.faults import fault
from megatron_inherit.base.processes import process_start
from megatron_inherit.train import pace as pace_module
from megatron_inherit.train import run_folder
from megatron_inherit.train.checkpointing import (
    KeepPolicy,
    list_steps,
    remove_leftovers,
    require_checkpoint_space,
    retire,
)
from megatron_inherit.train.pace import Pace, covered, unequal_ranks
from megatron_inherit.train.resume import Identity
from megatron_inherit.train.run_folder import RunLock, clear_exit_status, locked, write_exit_status
from megatron_inherit.train.spikes import SpikePolicy
from megatron_inherit.train.start import tell_dropout
from megatron_inherit.train.state import RunState, next_start
from megatron_inherit.train.watchdog import Watchdog


def judged(policy, losses, start=0):
    state, verdicts = RunState(), []
    for number, loss in enumerate(losses, start=start):
        state, verdict = policy.judge(state, loss, skipped=math.isnan(loss), start=number * 8)
        verdicts.append(verdict)
    return state, verdicts


def test_a_falling_noisy_loss_has_no_spike_and_a_hundredfold_one_is():
    noise = random.Random(0)
    losses = [10 * 0.99**step + noise.gauss(0, 0.1) for step in range(300)]
    state, verdicts = judged(SpikePolicy(), losses)
    assert set(verdicts) == {"fine"}
    assert len(state.losses) == 128
    state, verdicts = judged(SpikePolicy(patience=3), [*losses, 50.0, 50.0, losses[-1], 50.0, 50.0, 50.0])
    assert verdicts[-6:] == ["bad", "bad", "fine", "bad", "bad", "rollback"]
    assert state.bad_since == 303 * 8
    assert 50.0 not in state.losses


def test_skipped_steps_count_and_never_enter_the_window():
    state, verdicts = judged(SpikePolicy(patience=4), [2.0, math.nan, math.nan, 2.0, math.nan])
    assert verdicts == ["fine", "bad", "bad", "fine", "bad"]
    assert (state.skipped_steps, state.bad_steps, state.losses) == (3, 1, (2.0, 2.0))
    assert judged(SpikePolicy(patience=2), [math.nan, math.nan])[1] == ["bad", "rollback"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=4), st.integers(0, 80), st.integers(1, 12)
)  # fmt: skip
def test_a_batch_never_touches_a_given_up_range(ranges, position, count):
    skipped = [(start, start + length) for start, length in ranges]
    start = next_start(position, count, skipped)
    assert start >= position
    assert all(start >= stop or start + count <= begin for begin, stop in skipped)
    free = next(s for s in range(position, 200) if all(s >= b or s + count <= a for a, b in skipped))
    assert start >= free
    if not skipped:
        assert start == position


def test_state_survives_json_exactly():
    state = RunState(step=3, samples=24, tokens=9, seconds=0.1 + 0.2, losses=(1 / 3, 2.5))
    assert RunState.from_json({**json.loads(json.dumps(state.to_json())), "later": 1}) == state


def test_the_last_ones_and_every_so_manieth_stay(tmp_path):
    steps = list(range(100, 1100, 100))
    assert KeepPolicy(3).outdated(steps) == steps[:-3]
    assert KeepPolicy(2, every_steps=300).outdated(steps) == [100, 200, 400, 500, 700, 800]
    assert KeepPolicy(2, every_steps=300).outdated([250, 301, 400, 600, 700, 1001, 1100]) == [250, 400, 700]
    assert KeepPolicy(20).outdated(steps) == []
    for name in ("step_00000005", "step_00000100", "step_00000007.tmp-ab", "step_x", "other"):
        (tmp_path / name).mkdir()
    assert list_steps(tmp_path) == [5, 100]
    retire(tmp_path / "step_00000005")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step_00000100", "step_x"]


def test_a_checkpoint_moved_aside_comes_back_if_its_successor_never_came(tmp_path):
    for name in ("step_00000005.tmp-replaced-ab", "step_00000009.tmp-replaced-ab", "step_00000009"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert list_steps(tmp_path) == [5, 9]
    assert len(list(tmp_path.iterdir())) == 2


def test_no_room_for_two_checkpoints_is_told_with_numbers(tmp_path):
    with pytest.raises(DiskError, match=r"free.*Expected: at least"):
        require_checkpoint_space(tmp_path, 1 << 60)
    require_checkpoint_space(tmp_path, 1)


IDENTITY = Identity(model={"num_layers": 4, "hidden_size": 8}, tokenizer="t", data="d", order="o")


def test_a_checkpoint_of_another_run_names_what_differs(tmp_path):
    stored = IDENTITY.to_json()
    IDENTITY.refuse_other(json.loads(json.dumps(stored)), tmp_path)
    for change, words in (
        ({"model": {"num_layers": 5, "hidden_size": 8}}, "another model: num_layers differ. Got: num_layers = 5"),
        ({"tokenizer": "x"}, "another tokenizer"),
        ({"data": "x"}, "other data"),
        ({"order": "x"}, "another sample order"),
    ):
        with pytest.raises(CheckpointError, match=words):
            IDENTITY.refuse_other({**stored, **change}, tmp_path)


def test_a_lock_holds_while_its_process_lives(tmp_path):
    with locked(tmp_path), pytest.raises(UsageError, match=f"process {os.getpid()}"):
        RunLock(tmp_path).acquire()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("holder", "age", "stale"),
    [
        ({"pid": 2**22 + 1}, 0, True),
        ({"started": "17"}, 0, True),
        ({"host": "elsewhere"}, 0, False),
        ({"host": "elsewhere"}, 100, False),
        ({"host": "elsewhere"}, 1000, True),
        (None, 0, True),
    ],
)
def test_a_lock_is_stale_when_its_process_is_gone_or_silent(tmp_path, holder, age, stale):
    lock = RunLock(tmp_path)
    lock.path.write_text("garbage" if holder is None else json.dumps({**lock._mine, "token": "x", **holder}))
    then = lock.path.stat().st_mtime - age
    os.utime(lock.path, (then, then))
    assert lock.is_held() is not stale
    if stale:
        lock.acquire()
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("lives", [True, False])
def test_a_lock_of_another_machine_is_refused_at_a_sign_of_life_and_taken_without_one(tmp_path, monkeypatch, lives):
    lock, looks = RunLock(tmp_path), []
    lock.path.write_text(json.dumps({**lock._mine, "token": "x", "host": "elsewhere"}))

    def passes(seconds):
        looks.append(seconds)
        then = lock.path.stat().st_mtime
        if lives and len(looks) == 2:
            os.utime(lock.path, (then + 30, then + 30))
        monkeypatch.setattr(run_folder, "clock_of", lambda folder: then + sum(looks))

    monkeypatch.setattr(run_folder.time, "sleep", passes)
    if lives:
        with pytest.raises(UsageError, match=r"process \d+ on elsewhere"):
            lock.acquire()
        assert len(looks) == 2
    else:
        lock.acquire()
        assert json.loads(lock.path.read_text())["token"] == lock._mine["token"]
        assert sum(looks) == run_folder.FOREIGN_LOCK_SECONDS


def test_the_first_named_cause_stays_in_the_exit_status(tmp_path):
    write_exit_status(tmp_path, code=7, reason="full")
    write_exit_status(tmp_path, code=1, reason="a peer is gone")
    assert json.loads((tmp_path / "exit_status.json").read_text())["exit_code"] == 7
    clear_exit_status(tmp_path)
    write_exit_status(tmp_path, code=1, reason="a peer is gone")
    assert json.loads((tmp_path / "exit_status.json").read_text())["exit_code"] == 1


class Ranks:
    """Stands on one rank; the others' texts are given."""

    def __init__(self, *texts, model_rank=0, digest="a"):
        self.others, self.digest = texts, digest
        self.topology = type("Topology", (), {"model_rank": model_rank})()

    def weight_hash(self):
        return self.digest

    def gather_text(self, text):
        return [text, *self.others]


def test_unequal_weights_name_the_minority():
    def other(part, digest):
        return json.dumps({"part": part, "hash": digest})

    assert unequal_ranks(Ranks(other(0, "a"), other(0, "a"))) == []
    assert unequal_ranks(Ranks(other(0, "b"), other(0, "a"))) == [1]
    assert unequal_ranks(Ranks(other(0, "b"), other(0, "b"))) == [0]
    assert unequal_ranks(Ranks(other(0, "b"))) == [0, 1]
    assert unequal_ranks(Ranks(other(1, "b"), other(0, "a"), other(1, "b"))) == []


def other_pace(**changes):
    values = {"own": 0.01, "forward": 0.05, "busy": 0.0, "whole": 0.3, "probe": 0.0, "host": "h", "stage": 0}
    return json.dumps(values | changes)


def paced(steps=4, forward=0.04, **settings):
    """Gives the pace of a rank after some usual steps, the last of which was held up."""
    pace = Pace(0.7, **settings)
    for own in [*[0.01] * (steps - 1), 9.0]:
        pace.add(own=own, forward=forward + own, whole=own + 0.29)
    return pace


def test_a_slow_rank_has_a_low_score():
    for late in ({"own": 0.21}, {"forward": 0.25}):
        (found,) = paced().stragglers(Ranks(other_pace(**late), other_pace()))
        assert found.rank == 1
        assert found.score == pytest.approx(1 - 0.2 / 0.3)
    assert paced().stragglers(Ranks(other_pace())) == []
    others = [other_pace(forward=0.25, stage=1)] * 2
    assert paced().stragglers(Ranks(*others)) == [], "another stage has other work"


def test_passes_that_wait_for_others_accuse_nobody():
    late = other_pace(forward=0.0, own=0.2)
    assert len(paced(forward=0.2).stragglers(Ranks(late))) == 2
    (found,) = paced(forward=0.2, waiting=True).stragglers(Ranks(late))
    assert (found.rank, found.forward_seconds) == (1, 0.0)


def test_only_the_last_steps_count_and_not_so_few_that_they_are_a_warm_up():
    pace = Pace(0.7, every_steps=5)
    for own in [0.2] * 50 + [0.01] * 5:
        pace.add(own=own, forward=0.05, whole=0.3)
    assert pace.stragglers(Ranks(other_pace())) == []
    assert paced(2).stragglers(Ranks(other_pace(own=0.2))) == []
    assert paced(3, every_steps=1).stragglers(Ranks(other_pace(own=0.2)))


def test_of_a_slow_cluster_the_slowest_are_named():
    found = paced().stragglers(Ranks(*(other_pace(own=0.2 + rank / 1000) for rank in range(1, 64))))
    assert [slow.rank for slow in found] == list(range(63, 55, -1))


def test_a_throttled_device_is_named_and_one_without_room_is_not_judged(monkeypatch):
    monkeypatch.setattr(pace_module, "_probe", lambda: 0.0)
    (found,) = paced().stragglers(Ranks(other_pace(probe=0.001), other_pace(probe=0.002), other_pace(probe=0.0)))
    assert (found.rank, found.score) == (2, 0.5)
    assert str(found).endswith("0.010 s around a step, 0.050 s in it, 2.000 ms for a product of matrices.")


def test_a_full_device_stops_no_run(monkeypatch):
    import torch

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", full)
    assert pace_module._probe() == 0.0


def test_what_spans_cover_is_counted_once():
    assert covered([]) == 0.0
    assert covered([(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (2.5, 2.75)]) == 4.0


def test_a_watchdog_speaks_only_without_progress(tmp_path):
    spoken, heard = [], threading.Event()

    def speak(sentence):
        spoken.append(sentence)
        heard.set()

    with Watchdog(tmp_path, rank=0, world_size=2, timeout=1.0, on_silence=speak) as dog:
        for step in range(8):
            dog.progress(step, "train_step")
            assert not heard.wait(0.2)
        assert heard.wait(5)
    assert "No progress for 1 s: rank 0" in spoken[0]
    assert "step 7, phase train_step" in spoken[0]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_stands_still_ends_though_the_folder_of_its_heartbeats_is_gone(tmp_path):
    heard = threading.Event()
    with Watchdog(tmp_path / "heartbeats", rank=0, world_size=1, timeout=0.5, on_silence=lambda _: heard.set()):
        shutil.rmtree(tmp_path / "heartbeats")
        assert heard.wait(20)


def test_dropout_that_a_model_asks_for_is_told(caplog):
    with caplog.at_level("INFO"):
        for config in (None, {}, {"attn_pdrop": 0.0, "attention_dropout": 0.0}):
            tell_dropout(config)
        assert not caplog.records
        tell_dropout({"attn_pdrop": 0.1, "resid_pdrop": 0.0, "embd_pdrop": 0.2})
    assert "no dropout: attn_pdrop=0.1, embd_pdrop=0.2" in caplog.text


def test_faults_act_only_where_they_are_wanted(monkeypatch):
    monkeypatch.setenv("MI_FAULT", "here:0:3:raise,there:*:*:full")
    monkeypatch.setenv("RANK", "0")
    fault("here", 2)
    with pytest.raises(RuntimeError, match="here"):
        fault("here", 3)
    with pytest.raises(OSError, match="there"):
        fault("there", 9)
    monkeypatch.setenv("RANK", "1")
    fault("here", 3)


def test_a_process_is_told_from_a_later_one_of_the_same_number():
    assert process_start(os.getpid()) == process_start(os.getpid())
    assert process_start(2**22 + 1) is None
