"""Checkpoints: how long training stands still for one, written by a thread and written in line.

    python benchmarks/checkpoint_stall.py [--hidden 640] [--folder DIR]

Trains a LLaMA of random weights on random tokens through ``minherit train`` and reads the ``save`` rows of the run. The
steps between two saves take longer than writing one, as in any real run. The bar: stall / 1800 s <= 1%, one save in
half an hour. Rows go to benchmarks/results/checkpoint_stall.csv; on a machine that others use the seconds are upper
bounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from measuring import append_rows, circumstances

from megatron_inherit.data.indexed import IndexedWriter

HALF_HOUR, STEPS = 1800.0, 40
VOCABULARY = 8192


def write_recipe(folder: Path, hidden: int, *, asynchronous: bool) -> Path:
    """Writes tokens and the recipe of a run that saves five times."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 200_000).astype(np.uint16)
    with IndexedWriter(folder / "tokens", np.dtype(np.uint16)) as writer:
        writer.add_documents(tokens, [len(tokens)])
    shape = {
        "num_layers": 8,
        "hidden_size": hidden,
        "num_heads": hidden // 64,
        "num_kv_heads": hidden // 64,
        "head_dim": 64,
        "ffn_size": hidden * 8 // 3 // 64 * 64,
        "vocab_size": VOCABULARY,
    }
    recipe: dict[str, Any] = {
        "run": {"output": str(folder / "run")},
        "model": {"preset": "llama-tiny", "init": "random", "shape": shape},
        "data": {"path": str(folder / "tokens"), "split": "all", "epochs": 0},
        "train": {"steps": STEPS, "global_batch": 1, "micro_batch": 1, "sequence_length": 128, "dtype": "fp32"},
        "checkpoint": {"every_steps": STEPS // 5, "keep_last": 1, "asynchronous": asynchronous},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def measure(parent: Path | None, hidden: int, *, asynchronous: bool) -> dict[str, Any]:
    """Runs once and gives the row."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        recipe = write_recipe(folder, hidden, asynchronous=asynchronous)
        subprocess.run([sys.executable, "-m", "megatron_inherit", "train", str(recipe)], check=True)
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        newest = max((folder / "run" / "checkpoints").glob("step_*/rank_00000.safetensors"))
        size = newest.stat().st_size
    saves = [row for row in rows if row["kind"] == "save"][:-1]  # the last one has nothing to hide behind
    stall = statistics.median(row["stall_seconds"] for row in saves)
    total = statistics.median(row["total_seconds"] for row in saves)
    return {
        "case": "a thread writes" if asynchronous else "in line",
        "checkpoint_mib": round(size / 2**20),
        "saves": len(saves),
        "stall_s": round(stall, 3),
        "total_s": round(total, 3),
        "stall_gib_per_s": round(size / 2**30 / stall, 2),
        "share_of_half_an_hour": f"{stall / HALF_HOUR:.3%}",
    }


def main() -> None:
    """Measures both ways and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=640, help="Width; a multiple of 64.")
    parser.add_argument("--folder", type=Path, help="Where to write, default the temporary folder.")
    options = parser.parse_args()
    where = circumstances("torch", "megatron-core")
    rows = [measure(options.folder, options.hidden, asynchronous=kind) for kind in (False, True)]
    append_rows("checkpoint_stall", [row | where for row in rows])
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
