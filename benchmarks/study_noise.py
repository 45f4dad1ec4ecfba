"""How much a loss moves with the seed alone, and the smallest threshold that a claim about two arms may have.

    python benchmarks/study_noise.py FOLDER/STUDY.csv ... --leave-out no-residual

Reads the rows that ``minherit study show`` writes. The standard deviation within an arm is pooled over a study's arms
that ran with two seeds or more; a difference of two single runs moves sqrt(2) times as much, and a threshold is four
times that. Writes benchmarks/results/study_noise.csv, against which ``tests/unit/study/test_published.py`` holds the
claims of the shipped studies.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "study_noise.csv"
MARKS = {"loss_2.5pct": 0.025, "loss_25pct": 0.25, "loss": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--leave-out", nargs="*", default=[], help="Arms that are a noise of their own.")
    options = parser.parse_args()
    rows = [row for path in options.rows for row in noise(path, options.leave_out)]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(RESULTS.read_text())


def noise(path: Path, left_out: list[str]) -> Iterator[dict[str, Any]]:
    """Gives a row a mark for one study."""
    arms: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in csv.DictReader(path.open()):
        if row["arm"] not in (*left_out, "teacher"):
            arms[row["arm"]].append(row)
    counted = [runs for runs in arms.values() if len(runs) > 1]
    for column, share in MARKS.items():
        groups = [[float(row[column]) for row in runs] for runs in counted]
        freedom = sum(len(group) - 1 for group in groups)
        deviation = math.sqrt(sum(statistics.variance(group) * (len(group) - 1) for group in groups) / freedom)
        yield {
            "study": counted[0][0]["study"],
            "share_of_steps": share,
            "arms": len(groups),
            "degrees_of_freedom": freedom,
            "seed_sd_nats": round(deviation, 5),
            "least_threshold_nats": round(4 * math.sqrt(2) * deviation, 4),
            "left_out": " ".join(left_out),
            "date": max(run["date"] for runs in counted for run in runs)[:10],
        }


if __name__ == "__main__":
    main()
