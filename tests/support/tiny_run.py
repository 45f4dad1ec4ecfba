"""A tiny corpus and the recipe of a run on it, a second or two long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_inherit.data.indexed import IndexedWriter
from megatron_inherit.data.windows import EvalWindows

VOCABULARY = 512
LENGTH = 32


def write_corpus(folder: Path, *, documents: int = 300, seed: int = 0) -> Path:
    """Writes token files in which every token has four likely successors, and evaluation windows of the same kind."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    successors = rng.integers(0, VOCABULARY, (VOCABULARY, 4))

    def walk(length: int) -> list[int]:
        tokens = [int(rng.integers(VOCABULARY))]
        while len(tokens) < length:
            tokens.append(int(successors[tokens[-1], rng.integers(4)]))
        return tokens

    with IndexedWriter(folder / "corpus", np.dtype(np.uint16)) as writer:
        for _ in range(documents):
            tokens = walk(int(rng.integers(40, 120)))
            writer.add_documents(np.array(tokens, np.uint16), [len(tokens)])
    windows = np.array([walk(LENGTH + 1) for _ in range(9)], np.int64)
    EvalWindows(windows, num_bytes=9 * LENGTH * 3).save(folder / "windows.safetensors")
    return folder


def recipe(folder: Path, corpus: Path, **sections: dict[str, Any]) -> str:
    """Writes a recipe of 20 steps with a checkpoint every five; gives its path."""
    values: dict[str, Any] = {
        "run": {"output": str(folder / "run")},
        "model": {
            "preset": "llama-tiny",
            "init": "random",
            "shape": {"num_layers": 2, "hidden_size": 32, "head_dim": 8, "ffn_size": 64},
        },
        "data": {"path": str(corpus / "corpus"), "split": "all", "epochs": 0},
        "train": {
            "steps": 20, "global_batch": 8, "micro_batch": 2, "sequence_length": LENGTH, "dtype": "fp32",
            "deterministic": True,
        },
        "optimizer": {"lr": 3.0e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 2, "floor_lr": 3.0e-4},
        "checkpoint": {"every_steps": 5, "asynchronous": False},
        "eval": {"windows": str(corpus / "windows.safetensors"), "every_steps": 10},
        "guard": {"watchdog_seconds": 60, "weight_hash_every_steps": 5, "straggler_every_steps": 5},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    path = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return str(path)


def rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Reads the rows of a kind."""
    parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in parsed if row["kind"] == kind]


def curve(run: Path) -> list[tuple[Any, ...]]:
    """Gives what must be the same, bit for bit, in two equal runs."""
    return [(r["step"], r["samples"], r["tokens"], r["loss"], r["grad_norm"], r["lr"]) for r in rows(run)] + [
        (r["step"], r["loss"]) for r in rows(run, "eval")
    ]


def saved_hashes(run: Path, step: int) -> dict[str, str]:
    """Gives the hashes of a checkpoint's tensor files."""
    manifest = json.loads((run / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())
    return {name: file["xxh3"] for name, file in manifest["files"].items() if name.endswith(".safetensors")}


def status(run: Path) -> dict[str, Any]:
    """Reads exit_status.json."""
    return json.loads((run / "exit_status.json").read_text())
