"""Claims are judged by the figures."""

import pytest

from megatron_inherit.study.compare import judge
from megatron_inherit.study.schema import ClaimSection


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
