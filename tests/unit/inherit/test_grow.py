"""The decisions of growth, and whose blocks a student has."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.inherit.grow import Gap, Rule, continued, first_blocks, groups_of, patched


def follow(rule, gap_of, advantage=None):
    """Plays a growth whose students' losses are known beforehand."""
    rounds = []
    while isinstance(decision := rule.next(rounds, advantage), int):
        rounds.append((decision, Gap(gap_of(decision), 0.001)))
    return [depth for depth, _ in rounds], decision


@st.composite
def rules(draw):
    depth = draw(st.integers(2, 60))
    tolerance = draw(st.floats(0, 0.2))
    return Rule(
        depth=depth,
        start=draw(st.integers(1, depth)),
        increment=draw(st.integers(1, 9)),
        tolerance=tolerance,
        margin=tolerance + draw(st.floats(0, 0.1)),
    )


@given(rules(), st.integers(1, 60), st.floats(1e-6, 5.0))
def test_it_stops_at_the_first_depth_that_reaches_a_planted_threshold(rule, threshold, excess):
    depths, reason = follow(rule, lambda n: rule.tolerance if n >= threshold else rule.tolerance + excess)
    assert depths[0] == rule.start
    assert depths == list(rule.depths[: len(depths)])
    assert all(n < threshold for n in depths[:-1])
    if threshold <= rule.depth:
        assert reason == "parity"
        assert depths[-1] >= threshold
        assert depths[-1] == rule.start or depths[-1] - rule.increment < threshold
    else:
        assert reason == "all blocks"
        assert depths[-1] == rule.depth


@given(rules())
def test_a_diverged_student_never_matches(rule):
    assert follow(rule, lambda n: math.nan)[1] == "all blocks"


@given(rules(), st.floats(-1, 1))
def test_a_teacher_no_better_than_a_random_student_ends_it_before_it_begins(rule, lead):
    depths, reason = follow(rule, lambda n: 0.0, Gap(lead, 0.01))
    assert (reason == "vacuous") == (lead < rule.margin)
    assert bool(depths) == (lead >= rule.margin)
    through = Rule(depth=rule.depth, start=rule.start, tolerance=0.0, margin=0.0, through_vacuous=True)
    assert follow(through, lambda n: 0.0, Gap(lead, 0.01)) == ([rule.start], "parity")


def test_inheritune_starts_at_half_and_adds_two():
    assert Rule(depth=24, start=12).depths == (12, 14, 16, 18, 20, 22, 24)
    assert follow(Rule(depth=24, start=12), lambda n: 0.06 if n < 16 else 0.016) == ([12, 14, 16], "parity")
    assert Rule(depth=9, start=4, increment=3).depths == (4, 7, 9)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"depth": 1, "start": 1}, "one block"),
        ({"depth": 8, "start": 9}, "grow.start"),
        ({"depth": 8, "start": 0}, "grow.start"),
        ({"depth": 8, "start": 4, "increment": 0}, "grow.increment"),
        ({"depth": 8, "start": 4, "tolerance": 0.05, "margin": 0.04}, "grow.margin"),
    ],
)
def test_rules_that_cannot_work_are_refused(values, key):
    with pytest.raises(ConfigError, match=key):
        Rule(**values)


def test_a_decision_is_clear_from_two_standard_errors_on():
    assert Gap(0.05, 0.01).is_clear(0.02)
    assert Gap(-0.05, 0.01).is_clear(0.02)
    assert not Gap(0.03, 0.01).is_clear(0.02)
    assert not Gap(0.5, None).is_clear(0.02)


@given(st.integers(1, 60), st.data())
def test_groups_share_the_teacher_out_where_hidden_states_are_compared(depth, data):
    from megatron_inherit.distill.losses import stage_ends

    blocks = data.draw(st.integers(1, depth))
    groups = groups_of(depth, blocks)
    assert [block for group in groups for block in group] == list(range(depth))
    assert all(groups)
    assert tuple(group.stop for group in groups) == stage_ends((1,) * blocks, depth)
    assert first_blocks("patch", depth, blocks) == tuple(group[0] for group in groups)
    assert first_blocks("restart", depth, blocks) == tuple(range(blocks))


@given(st.integers(1, 40), st.data())
def test_patching_puts_the_teachers_groups_behind_the_students_blocks(depth, data):
    trained = data.draw(st.integers(1, depth))
    at_least = data.draw(st.integers(trained, depth))
    blocks = patched(depth, trained, at_least)
    own = [block for owner, block in blocks if owner == "student"]
    teachers = [block for owner, block in blocks if owner == "teacher"]
    groups = groups_of(depth, trained)
    assert own == list(range(len(own)))
    assert teachers == [block for group in groups[len(own) :] for block in group]
    assert blocks == tuple(("student", b) for b in own) + tuple(("teacher", b) for b in teachers)
    assert at_least <= len(blocks) < at_least + max(map(len, groups))
    assert patched(depth, trained, depth) == tuple(("teacher", block) for block in range(depth))


def test_continuing_keeps_the_trained_blocks_and_appends_the_next():
    assert continued(2, 4) == (("student", 0), ("student", 1), ("teacher", 2), ("teacher", 3))
