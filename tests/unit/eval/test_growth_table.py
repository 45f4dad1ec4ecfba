"""A growth's record as a table: every decision with what it was taken on."""

import json

import pytest

from megatron_inherit.base.errors import DataError
from megatron_inherit.eval.growth_table import find_growths
from tests.support.growth_record import write_growth


def decisions(growth):
    return [row.decision for row in growth.rows]


def test_rounds_say_what_followed_from_them(tmp_path):
    write_growth(tmp_path / "growth")
    (found,) = find_growths([tmp_path])
    assert found.name == "growth"
    assert (found.teacher.layers, found.teacher.loss, found.teacher.stderr) == (8, 1.2, 0.02)
    assert [row.name for row in found.rows] == ["control", "round 1", "round 2"]
    assert decisions(found) == ["not vacuous: grow", "does not match: grow to 6", "matches: stop"]
    assert [row.layers for row in found.rounds] == [4, 6]
    assert found.rounds[0].blocks == "0-3"
    assert (found.rounds[1].gap, found.rounds[1].gap_stderr, found.rounds[1].clear) == (0.01, 0.004, False)
    assert (found.verdict, found.caution) == ("6 of 8 blocks match the teacher", "")
    assert found.has_student


def test_a_growth_that_goes_on_says_so(tmp_path):
    write_growth(tmp_path / "growth", outcome=None, rounds=1)
    (found,) = find_growths([tmp_path / "growth"])
    assert decisions(found)[-1] == "does not match: go on"
    assert found.verdict == "Not ended yet, after 1 rounds"
    assert not found.has_student


@pytest.mark.parametrize(("when", "decision"), [("stop", "vacuous: stop"), ("continue", "vacuous: grow")])
def test_a_vacuous_question_is_said(tmp_path, when, decision):
    outcome = {"reason": "vacuous", "layers": None, "student": None} if when == "stop" else None
    ended = {"rounds": 0, "outcome": outcome} if when == "stop" else {}
    write_growth(tmp_path / "growth", vacuous=True, when_vacuous=when, **ended)
    (found,) = find_growths([tmp_path])
    assert decisions(found)[0] == decision
    assert "a random student does as well as the teacher" in found.verdict + found.caution


def test_no_student_may_match(tmp_path):
    write_growth(tmp_path / "growth", outcome={"reason": "all blocks", "layers": 8, "student": "round-02-n08"})
    (found,) = find_growths([tmp_path])
    assert found.verdict == "No student matches the teacher, not even one of all 8 blocks"


def test_before_its_teacher_is_scored_there_is_no_table_and_a_foreign_file_is_refused(tmp_path):
    folder = write_growth(tmp_path / "growth")
    record = json.loads((folder / "grow.json").read_text())
    (folder / "grow.json").write_text(json.dumps(record | {"teacher": None}))
    assert find_growths([tmp_path]) == []
    for foreign in ({"rounds": []}, [], record | {"outcome": "parity"}):
        (folder / "grow.json").write_text(json.dumps(foreign))
        with pytest.raises(DataError, match=r"grow\.json is no record of a growth"):
            find_growths([tmp_path])
