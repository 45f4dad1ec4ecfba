"""``minherit share`` without training: plans drawn and laid over pipelines, families, and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_inherit.arch.presets import preset
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.cli.main import main
from megatron_inherit.cli.share_place import probe_windows
from megatron_inherit.data.windows import EvalWindows
from megatron_inherit.inherit.inheritune import plan_fresh
from megatron_inherit.plan.execute import execute


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
    assert "  rank   0  0  0  1  1  1  2  2  2  2  3  3  3  4  4  4" in text
    assert "layout Ettt|ttt|tttt|ttt|tttL" in text
    assert "equal stages, or several a rank" in text
    assert "none, each stage lies on one rank (0 B sent a rank and step)" in text


def test_a_stage_on_two_ranks_is_refused_unless_told(capsys):
    code, text = run(capsys, "4", "--pp", "2", "--model", "llama-2-7b")
    assert code == 3
    assert "--allow-cross-rank" in text
    code, text = run(capsys, "4", "--pp", "2", "--model", "llama-2-7b", "--allow-cross-rank")
    assert code == 0
    assert "at most 772.03 MiB sent a rank and step" in text
    assert "tied on ranks 0,1: attn 0, mlp 0, norm 0" in text
    assert "equal stages" not in text
    assert "their bytes need a model" in run(capsys, "4", "--pp", "2", "--allow-cross-rank")[1]


def test_interleaved_chunks_take_whole_stages(capsys):
    code, text = run(capsys, "2,2,2,2", "--pp", "2", "--vpp", "2")
    assert code == 0
    assert text.count("\n   1      1") == 1
    assert run(capsys, "4,4", "--pp", "2", "--vpp", "2")[0] == 3


@pytest.mark.parametrize(
    "plan", ["", "3,0", "cycle:3", "attn=2;mlp=3", "heap:3", "attn=4;8", "attn=4;attn=2,2", "attn=4;mlp=", "cycle:0:3"]
)
def test_what_is_no_plan_is_refused_in_one_message(capsys, plan):
    code, text = run(capsys, plan)
    assert code == 3
    assert "Traceback" not in text


def test_a_path_to_nothing_is_told_from_a_plan(capsys, tmp_path):
    for text in ("runs/auxiliary", str(tmp_path / "gene"), "gene"):
        code, said = run(capsys, text)
        assert code == 5
        assert f"{text} is no stage plan, and there is no such file or folder" in said


def test_json_is_what_a_program_reads(capsys):
    code, text = run(capsys, "2,2", "--pp", "2", "--json")
    assert code == 0
    assert json.loads(text) == {
        "plan": {name: [0, 0, 1, 1] for name in ("attn", "mlp", "norm")},
        "chunks": [{"rank": 0, "chunk": 0, "layers": [0, 2]}, {"rank": 1, "chunk": 0, "layers": [2, 4]}],
        "layout": "Ett|ttL",
        "balance": 1.0,
        "ties": [],
    }
    _, text = run(capsys, "4", "--pp", "2", "--json", "--allow-cross-rank", "--model", "llama-2-7b")
    found = json.loads(text)
    assert found["ties"][1] == {"component": "mlp", "physical": 0, "ranks": [0, 1]}
    assert found["tie_bytes"] == [809_533_440, 809_533_440]
    assert found["virtual"] > found["unique"]


@pytest.fixture(scope="module")
def gene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gene")
    execute(plan_fresh(preset("gpt2-tiny").with_layers(4), seed=1), folder / "teacher")
    assert main(["share", "init", str(folder / "teacher"), str(folder / "gene"), "--plan", "1,1,1,1"]) == 0
    return folder / "gene"


def said(capsys, *words):
    capsys.readouterr()
    code = main(["share", *map(str, words)])
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return code, text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--depth 3", "--place even"),
        ("--depth 3 --place front", "--place even"),
        ("--depth 3 --place 0,1", "3 numbers from 0 to 3"),
        ("--depth 4 --place sideways", "front, middle, back"),
        ("--depth 4 --place auto", "minherit data windows"),
        ("--depth 4 --compress int3", "int8, int4, 2:4"),
        ("--depth 4 --probe-tokens many", "not a quantity"),
        ("--depth 4 --pp 2", "--pp 2 means nothing to the format hf"),
        ("--depth 4 --format learngene", "hf, meta, megatron, torch_dist, ds_universal"),
        ("--depth 1001", "--depth"),
    ],
)
def test_descendants_that_cannot_be_made_are_refused_with_the_fix(capsys, gene, tmp_path, words, message):
    code, text = said(capsys, "expand", gene, tmp_path / "out", *words.split())
    assert code == 2
    assert message in text
    assert not (tmp_path / "out").exists()


def test_nothing_is_measured_for_an_output_that_is_in_the_way(capsys, gene, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    code, text = said(capsys, "expand", gene, tmp_path / "out", "--depth", 5, "--place", "auto", "--windows", "none")
    assert code == 2
    assert "out exists already" in text


def test_targets_do_not_go_into_a_file(capsys, tmp_path):
    (tmp_path / "out").touch()
    code, text = said(capsys, "cache", "tiny-llama-cpu", tmp_path / "out")
    assert code == 2
    assert "out is a file" in text


@pytest.mark.parametrize("share", ["2/2", "1", "-1/2", "a/b"])
def test_a_share_that_is_none_is_refused(capsys, tmp_path, share):
    code, text = said(capsys, "cache", "tiny-llama-cpu", tmp_path / "out", "--share", share)
    assert code == 2
    assert "INDEX/COUNT" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("largest", "length", "message"), [(10**6, 8, "beyond"), (5, 4096, "longer than")])
def test_windows_that_do_not_fit_the_learngene_are_refused(capsys, gene, tmp_path, largest, length, message):
    ids = np.full((2, length + 1), largest)
    EvalWindows(ids, 1).save(tmp_path / "windows")
    words = ("--place", "auto", "--windows", tmp_path / "windows")
    for command in (("expand", gene, tmp_path / "out", "--depth", 5), ("family", gene, tmp_path / "out")):
        code, text = said(capsys, *command, *words)
        assert code == 4
        assert message in text
        assert "minherit data windows" in text


def test_a_probe_takes_the_first_windows_only(tmp_path):
    ids = np.arange(5 * 9).reshape(5, 9)
    EvalWindows(ids, 1).save(tmp_path / "windows")
    config = preset("llama-tiny")
    assert np.array_equal(probe_windows(str(tmp_path / "windows"), 17, config), ids[:2])
    assert len(probe_windows(str(tmp_path / "windows"), 1, config)) == 1
    assert len(probe_windows(str(tmp_path / "windows"), 10**6, config)) == 5
    assert probe_windows("", 10, config) is None


@pytest.mark.parametrize("depths", ["", "all", "0-3", "6-4", "first:3", "3,x", "1-99999999", "-3"])
def test_what_are_no_depths_is_refused(capsys, gene, tmp_path, depths):
    code, text = said(capsys, "family", gene, tmp_path / "out", f"--depths={depths}")
    assert code == 2
    assert "4,6-10,16" in text


def test_a_family_is_whole_or_not_begun(capsys, gene, tmp_path):
    code, text = said(capsys, "family", gene, tmp_path / "out", "--depths", "4-6", "--place", "0,1,2,3")
    assert code == 2
    assert "each of the 5 layers" in text
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "depth-06").mkdir(parents=True)
    (tmp_path / "out" / "depth-06" / "mine").touch()
    assert said(capsys, "family", gene, tmp_path / "out", "--depths", "4-6")[0] == 2
    assert not (tmp_path / "out" / "depth-04").exists()


def test_a_family_counts_parameters_and_steps_with_denominators(capsys, gene, tmp_path):
    code, text = said(capsys, "family", gene, tmp_path / "out", "--scratch-steps", 500)
    assert code == 2
    assert "--auxiliary-steps 0" in text
    steps = ("--auxiliary-steps", 500, "--tuning-steps", 20, "--scratch-steps", 500)
    words = ("family", gene, tmp_path / "out", "--depths", "4,6-7", "--compress", "int8", *steps)
    assert main(["share", *map(str, words)]) == 0
    said_last = capsys.readouterr().out.splitlines()[-1]
    assert "3 x 500 from scratch / (500 auxiliary + 3 x 20 tuning) = 2.68x" in said_last
    found = json.loads((tmp_path / "out" / "family.json").read_text())
    assert found["saving"] == said_last
    assert found["counts"]["depths"] == [4, 6, 7]
    assert found["counts"]["stored_ratio"] == found["counts"]["separate"] / found["counts"]["stored"]
    assert found["counts"]["step_ratio"] == pytest.approx(1500 / 560)
    assert found["members"][0]["stages"] == [0, 1, 2, 3]
    for depth in (4, 6, 7):
        folder = tmp_path / "out" / f"depth-{depth:02d}"
        assert {"README.md", "inherit.json", "manifest.json", "environment.json"} <= {p.name for p in folder.iterdir()}
        with open_source(folder) as source:
            assert source.config.num_layers == depth
            values = source.read("layers.0.mlp.up.weight").array()
            assert len(np.unique(values[0])) <= 255


def test_a_family_that_has_no_room_is_not_begun(capsys, gene, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 * 2**20))
    code, text = said(capsys, "family", gene, tmp_path / "out", "--depths", "4-12")
    assert code == 7
    assert "Not enough space" in text
    assert not (tmp_path / "out").exists()


def test_an_interrupted_family_goes_on_with_its_own_members_only(capsys, gene, tmp_path):
    words = ("family", gene, tmp_path / "out", "--depths", "4-5")
    assert said(capsys, *words)[0] == 0
    assert "exists already" in said(capsys, *words)[1]
    (tmp_path / "out" / "family.json").unlink()
    assert "depth-04 exists already" in said(capsys, *words, "--dtype", "bf16")[1]
    assert said(capsys, *words)[0] == 0
    assert (tmp_path / "out" / "family.json").exists()
