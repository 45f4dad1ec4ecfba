"""When shared stages are split, told from the rows of a run."""

import json
import math
from types import SimpleNamespace

import pytest

from megatron_inherit.config.sharing import UntieStep
from megatron_inherit.sharing.options import Sharing
from megatron_inherit.sharing.stage_plan import parse_plan
from megatron_inherit.train.untie import is_split_due, losses_since_split

ROWS = [
    {"kind": "eval", "step": 0, "loss": None},
    {"kind": "eval", "step": 2, "loss": 3.0},
    {"kind": "eval", "step": 4, "loss": 3.5},
    {"kind": "untie", "step": 4, "plan": "stages:4,4"},
]


@pytest.mark.parametrize(("plan", "losses"), [("4,4", []), ("8", [math.inf, 3.0, 3.5])])
def test_only_a_split_that_the_run_still_has_begins_a_new_count(tmp_path, plan, losses):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = SimpleNamespace(
        is_first=True,
        plan=SimpleNamespace(
            output=tmp_path, options=SimpleNamespace(sharing=Sharing(plan=parse_plan(plan))), config=None
        ),
        engine=SimpleNamespace(gather_text=lambda text: [text]),
    )
    assert losses_since_split(run) == losses
    assert is_split_due(UntieStep(plan="2,2,2,2", patience=1), 4, losses) == bool(losses)
