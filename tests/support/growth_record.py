"""A growth's folder as ``minherit grow`` leaves it, without the trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.run_folders import write_run

PARITY = {"reason": "parity", "layers": 6, "student": "round-02-n06"}
DEPTH = 8


def write_growth(
    folder: Path,
    *,
    rounds: int = 2,
    outcome: dict[str, Any] | None = PARITY,
    vacuous: bool = False,
    when_vacuous: str = "stop",
) -> Path:
    """Writes grow.json and the run folders of a teacher of eight blocks, a control of four, and students of 4 and 6."""
    folder.mkdir(parents=True)
    write_run(folder / "teacher", final=1.2, layers=DEPTH)
    write_run(folder / "control", final=1.5, layers=4, init="random")
    rows = []
    for number, (layers, gap) in enumerate(((4, 0.08), (6, 0.01))[:rounds], start=1):
        name = f"round-{number:02d}-n{layers:02d}"
        write_run(folder / name, final=1.2 + gap, layers=layers)
        own = {"round": number, "blocks": f"0-{layers - 1}", "trained": True, "path": name, "parity": gap <= 0.02}
        rows.append(figures(layers, 1.2 + gap) | compared(gap, clear=gap > 0.02) | own)
    control = figures(4, 1.5) | compared(0.3, clear=True) | {"path": "control", "vacuous": vacuous}
    rule = {"mode": "restart", "tolerance": 0.02, "margin": 0.03, "when_vacuous": when_vacuous}
    record = {"version": 1, "recipe": {"grow": rule}, "teacher": figures(DEPTH, 1.2), "control": control}
    (folder / "grow.json").write_text(json.dumps(record | {"rounds": rows, "outcome": outcome}))
    return folder


def figures(layers: int, loss: float) -> dict[str, Any]:
    """What is recorded of every model."""
    return {"layers": layers, "loss": loss, "stderr": 0.02, "steps": 60, "tokens": 30720, "parameters": 1000 * layers}


def compared(gap: float, *, clear: bool) -> dict[str, Any]:
    """What is recorded of a model that is held against the teacher."""
    return {"gap": gap, "gap_stderr": 0.004, "clear": clear}
