import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_inherit.config.schema import BatchRamp
from megatron_inherit.train.schedule import BatchPlan, Schedule


def test_cosine_of_the_published_runs():
    schedule = Schedule("cosine", 3e-4, 100_000, warmup_steps=2000, floor_lr=1e-5)
    values = [schedule.learning_rate(step) for step in (0, 1000, 2000, 51_000, 100_000)]
    assert values == pytest.approx([0, 1.5e-4, 3e-4, 1.55e-4, 1e-5], rel=1e-12)
    assert schedule.learning_rate(100_000) == 1e-5


def test_the_other_kinds_at_chosen_steps():
    linear = Schedule("linear", 1.0, 110, warmup_steps=10, floor_lr=0.5)
    assert [linear.learning_rate(t) for t in (5, 10, 60, 110, 200)] == pytest.approx([0.5, 1, 0.75, 0.5, 0.5])
    constant = Schedule("constant", 1.0, 100, warmup_steps=4)
    assert [constant.learning_rate(t) for t in (1, 2, 4, 99)] == [0.25, 0.5, 1, 1]
    root = Schedule("inverse-sqrt", 1.0, 1000, warmup_steps=25, floor_lr=0.3)
    assert [root.learning_rate(t) for t in (25, 100, 1000)] == pytest.approx([1, 0.5, 0.3])
    early = Schedule("cosine", 1.0, 1000, decay_steps=100, floor_lr=0.1)
    assert [early.learning_rate(t) for t in (50, 100, 1000)] == pytest.approx([0.55, 0.1, 0.1])


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_wsd_is_flat_and_then_falls(shape, middle):
    schedule = Schedule("wsd", 1.0, 100, warmup_steps=10, decay_steps=20, decay_shape=shape)
    assert [schedule.learning_rate(t) for t in (10, 50, 80, 90, 100)] == pytest.approx([1, 1, 1, middle, 0])
    assert Schedule("wsd", 1.0, 100).learning_rate(90) == 1.0
    assert Schedule("wsd", 1.0, 100).learning_rate(95) == pytest.approx(0.5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(["cosine", "linear", "constant", "inverse-sqrt", "wsd"]),
    st.integers(1, 50), st.integers(1, 500), st.floats(0, 1),
)  # fmt: skip
def test_never_above_the_peak_nor_rising_after_the_warm_up(kind, warmup, more, floor):
    schedule = Schedule(kind, 1.0, warmup + more, warmup_steps=warmup, floor_lr=floor)
    values = [schedule.learning_rate(t) for t in range(1, warmup + more + 3)]
    assert all(0 < v <= 1.0 for v in values[: warmup + more - 1])
    assert all(a >= b for a, b in itertools.pairwise(values[warmup - 1 :]))
    assert min(values[warmup:]) >= floor


def test_batch_ramp_reaches_the_full_batch_in_equal_shares():
    plan = BatchPlan(32, BatchRamp(start=8, increment=8, samples=300))
    assert [plan.size(s) for s in (0, 99, 100, 199, 200, 299, 300, 10_000)] == [8, 8, 16, 16, 24, 24, 32, 32]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(0, 5), st.integers(1, 300), st.integers(0, 60))
def test_closed_form_of_the_samples_equals_the_walk(increment, increments, samples, steps):
    ramp = BatchRamp(start=2, increment=increment, samples=samples)
    plan = BatchPlan(2 + increment * increments, ramp)
    walk = [0]
    for _ in range(steps):
        walk.append(walk[-1] + plan.size(walk[-1]))
    assert plan.samples_after(steps) == walk[-1]
    assert plan.steps_for(walk[-1]) == steps
    assert plan.steps_for(walk[-1] + 1) == steps + 1
    assert max((b - a for a, b in itertools.pairwise(walk)), default=0) <= plan.full
