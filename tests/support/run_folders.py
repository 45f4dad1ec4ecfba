"""Run folders as training writes them, without the training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml


def write_run(
    folder: Path,
    *,
    steps: int = 60,
    start: float = 6.0,
    final: float = 2.5,
    init: str = "weights",
    fingerprint: str = "windows",
    mfu: float | None = None,
    layers: int = 4,
    model_path: str = "student",
) -> Path:
    """Writes metrics.jsonl, run.yaml and environment.json of a run whose loss falls from ``start`` to ``final``."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(steps + 1):
        share = (step / steps) ** 0.25
        loss = start + (final - start) * share
        if step:
            rows.append(_train_row(step, loss, mfu))
        if step % max(1, steps // 10) == 0 or step == steps:
            rows.append(_eval_row(step, loss, fingerprint))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "run": {"name": folder.name, "output": str(folder)},
        "model": {"path": model_path, "init": init},
        "train": {"steps": steps},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    environment = {
        "world_size": 2,
        "device": "cpu",
        "num_layers": layers,
        "parameters": 1000 * layers,
        "command": f"/opt/venv/bin/minherit train {folder.name}",
        "date": "2026-01-01T00:00:00Z",
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def _train_row(step: int, loss: float, mfu: float | None) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "tokens": step * 512,
        "samples": step * 8,
        "loss": loss + 0.05 * math.sin(step),
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens_per_s": 5000.0 + (step % 3 - 1),
        "mfu": mfu,
        "seconds": step * 0.1,
    }


def _eval_row(step: int, loss: float, fingerprint: str) -> dict[str, Any]:
    return {
        "kind": "eval",
        "step": step,
        "tokens": step * 512,
        "loss": loss,
        "stderr": 0.02,
        "bits_per_byte": loss / 3,
        "perplexity": math.exp(loss),
        "windows": 64,
        "fingerprint": fingerprint,
    }
