"""``minherit share plan``: the drawing, the pipeline's segments, what a token passes and what ties cost."""

import json

import pytest

from megatron_inherit.cli.main import main


def run(capsys, *words):
    code = main(["share", "plan", *words])
    out = capsys.readouterr()
    return code, out.out + out.err


def test_a_plan_is_drawn_and_laid_over_a_pipeline(capsys):
    code, text = run(capsys, "3,3,4,3,3", "--pp", "5", "--model", "llama-2-7b")
    assert code == 0
    assert "stages:3,3,4,3,3" in text
    assert "1,274,064,896 stored, 3,500,281,856 passed by a token (2.75x)" in text
    assert "balance 80%" in text
    assert "   2      0  6-9      2" in text
    assert "at most 0 B sent a rank and step" in text


def test_a_stage_on_two_ranks_is_refused_unless_told(capsys):
    code, text = run(capsys, "4", "--pp", "2", "--model", "llama-2-7b")
    assert code == 3
    assert "--allow-cross-rank" in text
    code, text = run(capsys, "4", "--pp", "2", "--model", "llama-2-7b", "--allow-cross-rank")
    assert code == 0
    assert "at most 772.03 MiB sent a rank and step" in text


def test_interleaved_chunks_take_whole_stages(capsys):
    code, text = run(capsys, "2,2,2,2", "--pp", "2", "--vpp", "2")
    assert code == 0
    assert text.count("\n   1      1") == 1
    assert run(capsys, "4,4", "--pp", "2", "--vpp", "2")[0] == 3


@pytest.mark.parametrize("plan", ["", "3,0", "cycle:3", "attn=2;mlp=3", "heap:3"])
def test_what_is_no_plan_is_refused_in_one_message(capsys, plan):
    code, text = run(capsys, plan)
    assert code == 3
    assert "Traceback" not in text


def test_json_is_what_a_program_reads(capsys):
    code, text = run(capsys, "2,2", "--pp", "2", "--json")
    assert code == 0
    assert json.loads(text) == {
        "plan": {name: [0, 0, 1, 1] for name in ("attn", "mlp", "norm")},
        "bounds": [0, 2, 4],
        "balance": 1.0,
    }
