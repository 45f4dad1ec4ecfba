"""Writes one row a model of each growth, taken from its grow.json, and prints them as a Markdown table.

python benchmarks/growth.py GROWTH... --out benchmarks/results/growth.csv
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from arms import machine

FIGURES = ("layers", "parameters", "steps", "tokens", "loss", "stderr", "gap", "gap_stderr", "clear")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Gives a growth's teacher, control and rounds."""
    record = json.loads((folder / "grow.json").read_text())
    section = record["recipe"]["grow"]
    found = [("teacher", record["teacher"]), ("control", record["control"])]
    found += [(f"round {row['round']}", row) for row in record["rounds"]]
    return [
        {
            "growth": folder.name,
            "mode": section["mode"],
            "tolerance": section["tolerance"],
            "model": name,
            "blocks": row.get("blocks", ""),
            **{key: _rounded(row.get(key)) for key in FIGURES},
            "matches": row.get("parity", ""),
            "outcome": record["outcome"]["reason"],
        }
        for name, row in found
        if row is not None
    ]


def main() -> None:
    """Reads the growths, writes the rows, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("growths", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = [row | machine() for folder in options.growths for row in rows_of(folder)]
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print("| growth | model | blocks | steps | loss | above the teacher | matches |\n|---|---|---|---|---|---|---|")
    for row in rows:
        gap = "" if row["gap"] is None else _pair(row["gap"], row["gap_stderr"], "+")
        matches = {True: "yes", False: "no"}.get(row["matches"], "")
        blocks = f"{row['layers']}" + (f" ({row['blocks']})" if row["blocks"] else "")
        loss = _pair(row["loss"], row["stderr"])
        print(f"| {row['growth']} | {row['model']} | {blocks} | {row['steps']} | {loss} | {gap} | {matches} |")


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _pair(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


if __name__ == "__main__":
    main()
