"""What the SWS study on a CPU is held to: its committed rows, and a run of one seed."""

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ("warmup_steps", "weight_decay")
ROWS = ROOT / "benchmarks" / "results" / "sws_cpu.csv"


class Study:
    """Losses of a text's last run by what was measured; runs differ in the recipe of their auxiliaries."""

    def __init__(self, rows, text):
        rows = [row for row in rows if (row["text"] or "library") == text]
        recipe = [rows[-1][name] for name in RECIPE]
        rows = [row for row in rows if [row[name] for name in RECIPE] == recipe]
        self.losses = {
            (r["seed"], r["what"], r["arm"], int(r["depth"]), r["placement"], int(r["steps"])): float(
                r["loss_nats_per_byte"]
            )
            for r in rows
            if r["what"] != "study"
        }
        self.seeds = sorted({seed for seed, what, *_ in self.losses if what == "fine-tuning"})

    def untrained(self, seed, arm, depth):
        return self.losses[seed, "zero-tuning", arm, depth, "front", 0]

    def order(self, seed, depth, placement):
        return self.losses[seed, "order", "sws", depth, placement, 0]

    def tuned(self, seed, arm, depth, steps):
        return self.losses[seed, "fine-tuning", arm, depth, "" if arm == "scratch" else "front", steps]


def check(study, transferred):
    for seed in study.seeds:
        auxiliary = study.losses[seed, "auxiliary", "sws", 8, "own", 500]
        assert study.untrained(seed, "sws", 8) == pytest.approx(auxiliary, abs=1e-4)
        for depth in transferred:
            assert study.untrained(seed, "sws", depth) <= auxiliary + 0.10
        for depth in (6, 7):
            assert study.untrained(seed, "sws", depth) <= auxiliary + 0.20
        for depth, margin in ((12, 0.15), (16, 0.25)):
            assert study.untrained(seed, "no-guidance", depth) >= study.untrained(seed, "sws", depth) + margin
        assert study.order(seed, 8, "reversed") >= study.order(seed, 8, "own") + 1.0
        assert study.order(seed, 8, "interleaved") >= study.order(seed, 8, "own") + 0.03
        for depth in (6, 10):
            assert study.tuned(seed, "sws", depth, 20) <= study.tuned(seed, "scratch", depth, 500)


def test_the_committed_rows_say_what_the_page_says():
    with ROWS.open() as file:
        rows = list(csv.DictReader(file))
    studies = {text: Study(rows, text) for text in ("library", "modules")}
    assert all(study.seeds == ["1", "2"] for study in studies.values())
    check(studies["modules"], (9, 10, 12, 16))
    check(studies["library"], (9, 10, 12))
    for text, expected in (("library", [0.111, 0.123]), ("modules", [0.063, 0.057])):
        study = studies[text]
        lost = [study.untrained(seed, "sws", 16) - study.untrained(seed, "sws", 8) for seed in study.seeds]
        assert lost == pytest.approx(expected, abs=1e-3)
        for arm, depth in itertools.product(("no-stages", "no-guidance"), (6, 10)):
            gains = [study.tuned(s, arm, depth, 100) - study.tuned(s, "sws", depth, 100) for s in study.seeds]
            assert max(map(abs, gains)) <= 0.03


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(2400)
def test_a_run_of_one_seed_gives_it_again(tmp_path):
    environ = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SWS_WORK": str(tmp_path),
        "SWS_SEEDS": "1",
        "SWS_TEXT": "modules",
    }
    done = subprocess.run(["bash", "examples/sws_cpu.sh"], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check(Study(json.loads((tmp_path / "rows.json").read_text()), "modules"), (9, 10, 12, 16))
    page = (tmp_path / "report.html").read_text()
    assert "Before any training, by depth" in page
    assert "Training 10 layers" in page
