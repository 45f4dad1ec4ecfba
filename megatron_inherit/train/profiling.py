"""A torch trace of a few steps, to open in Perfetto or chrome://tracing."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

WAIT_STEPS = 10


def quiet_profiler() -> ModuleType:
    """Imports torch.profiler, which else announces each of its starts and stops on the terminal."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return importlib.import_module("torch.profiler")


class Profiler:
    """Traces some steps of a session after others that warm caches up; without a folder it does nothing.

    Args:
        folder: Where ``rank_00000.json`` goes, or None.
        rank: This process's.
        steps: Steps to trace.
        session_steps: Steps there are; a short session waits less.
    """

    def __init__(self, folder: Path | None, rank: int, steps: int, session_steps: int) -> None:
        self._profile: Any = None
        if folder is None:
            return
        torch_profiler = quiet_profiler()
        folder.mkdir(parents=True, exist_ok=True)
        steps = min(steps, max(1, session_steps - 1))
        wait = max(0, min(WAIT_STEPS, session_steps - steps - 1))
        self._profile = torch_profiler.profile(
            schedule=torch_profiler.schedule(wait=wait, warmup=1, active=steps, repeat=1),
            on_trace_ready=lambda done: done.export_chrome_trace(str(folder / f"rank_{rank:05d}.json")),
            record_shapes=True,
        )

    def __enter__(self) -> Profiler:
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile is not None:
            self._profile.__exit__(*error)

    def step(self) -> None:
        """Marks the end of a step."""
        if self._profile is not None:
            self._profile.step()
