"""What the results pages say is what the rows say, and no claim has a threshold that the seed alone could cross."""

import csv
import re
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

from megatron_inherit.config.load import recipe_names
from megatron_inherit.study.schema import SHIPPED, load_study

ROOT = Path(__file__).resolve().parents[3]
ROWS = ROOT / "benchmarks" / "results"
PAGES = {
    "initialisation.md": "study_initialisation.csv",
    "layer-choice.md": "study_layers.csv",
    "depth.md": "study_depth.csv",
    "baselines.md": "study_baselines.csv",
    "repetition.md": "study_repetition.csv",
    "rewarming.md": "study_rewarming.csv",
}


def table_of(page):
    """Gives the rows of a page's first table by their first cell."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:] if len(row) == len(cells[0])}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_the_rows_say(page):
    runs = defaultdict(list)
    with (ROWS / PAGES[page]).open() as file:
        for row in csv.DictReader(file):
            runs[row["arm"]].append(row)
    table = table_of(ROOT / "docs" / "results" / page)
    assert set(table) == set(runs) - {"teacher"}
    for arm, cells in table.items():
        assert len(runs[arm]) >= 2, "two seeds or more"
        for column, cell in (
            ("loss", "final"),
            ("loss_start", "start"),
            ("loss_2.5pct", "2.5%"),
            ("loss_25pct", "25%"),
        ):
            mean = statistics.fmean(float(row[column]) for row in runs[arm])
            assert float(cells[cell]) == pytest.approx(mean, abs=6e-4), (arm, column)


def test_thresholds_are_beyond_what_the_seed_moves():
    least = defaultdict(dict)
    with (ROWS / "study_noise.csv").open() as file:
        for row in csv.DictReader(file):
            least[row["study"]][float(row["share_of_steps"])] = float(row["least_threshold_nats"])
    held = 0
    for name in recipe_names(SHIPPED):
        for claim in load_study(name).section.claims:
            bounds = claim.by or ([claim.within] * len(claim.at) if claim.within is not None else [])
            for share, bound in zip(claim.at, bounds, strict=False):
                assert bound == 0 or abs(bound) >= least[name][share], (name, claim.id, share)
                held += bound != 0
    assert held >= 12


def test_every_check_of_the_method_names_what_there_is():
    page = (ROOT / "docs" / "study.md").read_text()
    rows = re.findall(r"^\| ([AB]\d+[^|]*) \|(.*)\|$", page, re.MULTILINE)
    assert {f"A{number}" for number in range(1, 15)} <= {what.split()[0] for what, _ in rows}
    for file, name in re.findall(r"`(\w+\.py)::(\w+)`", page):
        texts = [path.read_text() for path in (ROOT / "tests").rglob(file)]
        assert any(f"def {name}(" in text for text in texts), f"{file}::{name}"
    claims = {claim.id for study in recipe_names(SHIPPED) for claim in load_study(study).section.claims}
    for number in set(range(1, 13)) - {10}:
        assert any(re.fullmatch(rf"B{number}[a-d]?", claim) for claim in claims), f"B{number}"
