"""A whole small study: run, killed in the middle of an arm, resumed to the same table, shown, and refused."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from megatron_inherit.cli.main import main
from megatron_inherit.study import runner
from tests.support import forked_world
from tests.support.forked_trainer import ForkedTrainer
from tests.support.tiny_run import recipe, write_corpus

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    forked_world.preload("megatron_inherit.study.runner", "megatron_inherit.cli.study")
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def write_study(folder, corpus, **changes):
    values = {
        "name": "toy",
        "question": "Does inheriting help?",
        "output": str(folder / "out"),
        "control": "random",
        "seeds": [1],
        "recipe": yaml.safe_load(Path(recipe(folder, corpus, train={"steps": 30})).read_text()),
        "set": {"train.steps": 10},
        "arms": [
            {"name": "all", "layers": "first:1"},
            {"name": "random", "layers": "first:1", "init": "random"},
        ],
        "claims": [
            {"id": "T1", "says": "inherited beats random", "lower": "all", "higher": "random", "by": 0.01},
            {"id": "T2", "says": "the other way round", "lower": "random", "higher": "all", "by": 0.01},
        ],
    } | changes
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def begin(path, groups=None):
    """Runs ``minherit study run`` in a process of its own, on some groups of devices."""

    def work():
        runner.Trainer = ForkedTrainer
        if groups is not None:
            runner.device_groups = lambda processes: groups
        return main(["study", "run", str(path)])

    return forked_world.World(path.parent / "console", 1, work, {})


def run(path, groups=None):
    ended = begin(path, groups).wait()
    assert ended.codes == [0], ended.text


def figures(folder):
    """Gives the CSV without the columns that tell when and how fast."""
    rows = [line.split(",") for line in (folder / "toy.csv").read_text().splitlines()]
    kept = [place for place, name in enumerate(rows[0]) if name not in ("seconds", "date")]
    return [[row[place] for place in kept] for row in rows]


def test_killed_in_an_arm_and_resumed_it_gives_the_same_table(tmp_path, corpus, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_study(folder, corpus)
    run(whole / "toy.yaml")
    shutil.copytree(whole / "out/teacher", killed / "out/teacher")
    arm = killed / "out/arms/all/seed1"
    world = begin(killed / "toy.yaml")
    deadline = time.monotonic() + 100
    while not list(arm.glob("checkpoints/step_*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(world.pids[0], signal.SIGKILL)
    assert world.wait().codes == [-signal.SIGKILL]
    assert not (killed / "out/arms/random/seed1/metrics.jsonl").exists(), "it was to die in the first arm"
    run(killed / "toy.yaml", groups=[(0,), (1,)])  # both arms at a time
    for folder in (whole, killed):
        assert main(["study", "show", str(folder / "out")]) == 0
    assert figures(killed / "out") == figures(whole / "out")
    shown = capsys.readouterr().out
    assert re.search(r"T1 +holds +inherited beats random: \+", shown)
    assert re.search(r"T2 +DOES NOT HOLD", shown)
    assert (whole / "out/toy.png").read_bytes().startswith(b"\x89PNG")
    assert "| all | 0 | 10 |" in (whole / "out/toy.md").read_text()
    assert main(["study", "show", str(whole / "out"), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)[0]
    assert main(["report", str(whole / "out")]) == 0
    page = (whole / "out/report.html").read_text()
    assert "<h2>Study toy</h2>" in page
    assert '<td class="words">the other way round</td>' in page, "the claims"
    assert value["missing"] == []
    assert value["lines"][0]["gap"]["mean"] < 0
    stamps = [path.stat().st_mtime_ns for path in (whole / "out").rglob("metrics.jsonl")]
    run(whole / "toy.yaml")
    assert [path.stat().st_mtime_ns for path in (whole / "out").rglob("metrics.jsonl")] == stamps, "ran again"
    _another_study_is_not_taken_for_this_one(whole, corpus, capsys)


def _another_study_is_not_taken_for_this_one(folder, corpus, capsys):
    write_study(folder, corpus, arms=[{"name": "random", "layers": "last:1", "init": "random"}], claims=[])
    assert main(["study", "run", str(folder / "toy.yaml"), "seeds=[1,2]", "train.steps=11"]) == 3
    assert "another recipe: train.steps differs" in capsys.readouterr().err
    other = folder / "out/arms/random/seed1/manifest.json"
    manifest = json.loads(other.read_text())
    other.write_text(json.dumps(manifest | {"identity": manifest["identity"] | {"order": "another"}}))
    write_study(folder, corpus, claims=[])
    (folder / "out/toy.yaml").write_text((folder / "toy.yaml").read_text())
    assert main(["study", "show", str(folder / "out")]) == 4
    assert "trained on different data" in capsys.readouterr().err


def test_mistakes_end_with_their_code(tmp_path, corpus, capsys):
    path = write_study(tmp_path, corpus)
    assert main(["study", "run", "initialisation_cpu"]) == 3
    assert "Nearest: initialisation-cpu" in capsys.readouterr().err
    assert main(["study", "run", str(path), "--arm", "nobody"]) == 2
    assert main(["study", "run", str(path), "eval.windows=null"]) == 3
    assert "needs eval.windows" in capsys.readouterr().err
    assert main(["study", "run", str(path), "data.pth=x"]) == 3
    assert "unknown key. Nearest: data.path" in capsys.readouterr().err
    assert main(["study", "show", str(tmp_path / "nowhere")]) == 2
    assert main(["study", "run", str(path), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("to run") == 3
    assert not (tmp_path / "out").exists()
