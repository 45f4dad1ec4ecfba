"""Writes one row a run, taken from the runs' own files, and prints them as a Markdown table.

python benchmarks/arms.py RUN... --out benchmarks/results/quickstart.csv

With --tasks, the task scores that ``minherit evaluate`` left in the runs, and those in the files of --evaluation, go
into a table of their own.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
from pathlib import Path

from megatron_inherit.eval.run_facts import arms_of
from megatron_inherit.eval.runs import find_runs
from megatron_inherit.eval.task_table import task_tables

FIELDS = ("layers", "parameters", "steps", "tokens", "start_loss", "loss", "stderr", "bits_per_byte", "gap")
TIMES = ("tokens_per_second", "seconds")


def machine() -> dict[str, str]:
    """Gives date, hardware and versions."""
    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().split("\n") if "model name" in line),
        "",
    )
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} cores of {model or platform.machine()}"
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": device,
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
    }


def task_rows(runs: list[Path], files: list[Path]) -> list[dict]:
    """Prints the task scores of models side by side, and gives them as rows."""
    given = [json.loads(path.read_text()) for path in files]
    results = [(Path(result["checkpoint"]).name, result) for result in given]
    results += [(run.label, result) for run in find_runs(runs) for result in run.evaluations]
    rows = []
    for table in task_tables(results):
        print(f"| task | metric | {' | '.join(table.models)} |\n|---|---|{'---|' * len(table.models)}")
        for row in table.rows:
            cells = [_cell(row.values.get(model)) for model in table.models]
            print(f"| {row.task} | {row.metric} | {' | '.join(cells)} |")
            common = {"task": row.task, "metric": row.metric, "shots": row.shots, "items": row.items}
            rows += [{"model": model} | common | {"value": v, "stderr": e} for model, (v, e) in row.values.items()]
    return rows


def _cell(cell: tuple[float, float | None] | None) -> str:
    """Writes a score; a perplexity may have no standard error, and a model may not have been scored."""
    if cell is None:
        return ""
    value, error = cell
    return f"{value:.2f}" + ("" if error is None else f" ± {error:.2f}")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes rows of equal keys as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Reads the runs, writes the rows, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, help="CSV of the task scores")
    parser.add_argument(
        "--evaluation", type=Path, action="append", default=[], help="JSON of 'minherit evaluate --out'"
    )
    options = parser.parse_args()
    common = machine()
    rows = []
    for arm in arms_of(find_runs(options.runs)):
        values = {name: getattr(arm, name) for name in (*FIELDS, *TIMES)}
        rounded = {name: round(v, 4) if isinstance(v, float) else v for name, v in values.items()}
        rows.append({"arm": arm.label, **rounded, "windows": arm.fingerprint, **common})
    write_rows(options.out, rows)
    if options.tasks:
        write_rows(options.tasks, [row | common for row in task_rows(options.runs, options.evaluation)])
    print("| arm | blocks | tokens | loss at step 0 | final loss | against random |\n|---|---|---|---|---|---|")
    for row in rows:
        gap = "" if row["gap"] is None else f"{row['gap']:+.3f}"
        print(
            f"| {row['arm']} | {row['layers']} | {row['tokens']:,} | {row['start_loss']:.3f} "
            f"| {row['loss']:.3f} ± {row['stderr']:.3f} | {gap} |"
        )
    print(json.dumps(common))


if __name__ == "__main__":
    main()
