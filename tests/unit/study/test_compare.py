"""Claims are judged by the figures."""

from types import SimpleNamespace

import pytest

from megatron_inherit.base.errors import UsageError
from megatron_inherit.eval.groups import Estimate, Sooner
from megatron_inherit.study.compare import Line, find_studies, judge, table_of
from megatron_inherit.study.schema import ClaimSection
from tests.unit.study.test_schema import study


class Curve:
    """An arm whose loss falls on a line from ``start`` to ``end``."""

    def __init__(self, start, end):
        self.start, self.end = start, end

    def at(self, share):
        return self.start + share * (self.end - self.start)


ARMS = {"good": Curve(4, 2), "bad": Curve(6, 2.5), "other": Curve(4, 2.25)}


@pytest.mark.parametrize(
    ("claim", "gains", "holds"),
    [
        ({"by": 0.5}, (0.5,), True),
        ({"by": 0.6}, (0.5,), False),
        ({"at": [0, 1], "by": [2, 0.4]}, (2.0, 0.5), True),
        ({"at": [0, 1], "by": [2.1, 0.4]}, (2.0, 0.5), False),
        ({"within": 0.5}, (0.5,), True),
        ({"within": 0.4}, (0.5,), False),
        ({"lower": "bad", "higher": "good", "within": 0.4}, (-0.5,), False),
        ({"at": [0, 0.5, 1], "shrinks": True}, (2.0, 1.25, 0.5), True),
        ({"lower": "good", "higher": "other", "at": [0, 1], "shrinks": True}, (0.0, 0.25), False),
        ({"lower": "other", "share": 0.5, "of": "good"}, (0.25,), True),
        ({"lower": "other", "share": 0.4, "of": "good"}, (0.25,), False),
        ({"higher": "good", "at": 0.5, "higher_at": 0, "by": 1}, (1.0,), True),
    ],
)
def test_a_claim_holds_or_not(claim, gains, holds):
    found = judge(ClaimSection(**{"id": "C", "says": "x", "lower": "good", "higher": "bad"} | claim), ARMS)
    assert found.gains == pytest.approx(gains)
    assert found.holds == holds


def line(arm, parameters, gap=None):
    final = Estimate(2.0, 0.03, None)
    sooner = None if gap is None else Sooner(2.0, "≥")
    return Line(arm, (0, 1), (1, 2), 400, parameters, 5.0, (4.0, 3.0), final, gap, sooner, is_control=gap is None)


def test_parameters_are_a_column_where_arms_differ_in_them():
    gap = Estimate(-0.5, 0.01, 0.02)
    head, (first, second) = table_of(SimpleNamespace(lines=(line("all", 442368), line("wide", 884736, gap))))
    assert dict(zip(head, second, strict=True))["parameters"] == "885k"
    assert len(first) == len(head)
    head, (_, second) = table_of(SimpleNamespace(lines=(line("all", 442368), line("same", 442368, gap))))
    assert "parameters" not in head
    row = dict(zip(head, second, strict=True))
    assert row == {
        "arm": "same", "blocks": "0-1", "steps": "400", "start": "5.000", "2.5%": "4.000", "25%": "3.000",
        "final": "2.000", "± windows": "0.030", "± seeds": "-", "gap": "-0.500", "± gap": "0.010 / 0.020",
        "sooner": "≥2.0x",
    }  # fmt: skip


def test_only_studies_are_taken_for_studies(tmp_path):
    (tmp_path / "grow.yaml").write_text("run: {output: here}\n")
    with pytest.raises(UsageError, match="holds no study"):
        find_studies(tmp_path)
    path = study(tmp_path)
    assert find_studies(tmp_path) == [path]
