"""What a run tells about itself: rows of metrics.jsonl always, any number of loggers beside it, and its speed.

Rows have a ``kind``: ``run`` (a session begins), ``train`` (a step), ``eval``, ``skip`` (a step whose gradient was not
finite, with its sample ids), ``rollback``, ``save``, ``straggler``.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_inherit.arch.counts import FlopsFormula, flops_per_token, peak_flops
from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.atomic import write_text
from megatron_inherit.base.log import get_logger

logger = get_logger(__name__)

METRICS = "metrics.jsonl"
DISCARDED = "metrics.discarded.jsonl"
Row = Mapping[str, Any]


class MetricsLogger(Protocol):
    """A receiver of numbers beside metrics.jsonl."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes the numbers of a step."""
        ...

    def close(self) -> None:
        """Hands over what is left."""
        ...


class MetricsLog:
    """Appends rows to metrics.jsonl and hands their numbers to loggers, none of which can stop the run.

    Args:
        folder: The run's folder; None writes nothing (ranks other than 0).
        loggers: By name. One that raises is told of once and left out from then on.
    """

    def __init__(self, folder: Path | None, loggers: Mapping[str, MetricsLogger] | None = None) -> None:
        self._path = None if folder is None else folder / METRICS
        self._loggers = dict(loggers or {})
        self._waiting: list[str] = []

    def write(self, row: Row) -> None:
        """Appends a row; NaN and infinity become null. What a full disk refuses is tried again with the next row."""
        if self._path is None:
            return
        self._waiting.append(json.dumps({key: _finite(value) for key, value in row.items()}))
        try:
            _append(self._path, "".join(line + "\n" for line in self._waiting).encode())
            self._waiting.clear()
        except OSError as error:
            logger.warning("%s cannot be written (%s); %d rows wait.", self._path, error.strerror, len(self._waiting))

    def send(self, row: Row) -> None:
        """Gives a row's numbers to the loggers as ``kind/name``."""
        values = {f"{row['kind']}/{key}": float(value) for key, value in row.items() if _is_number(key, value)}
        for name in list(self._loggers):
            self._attempt(name, lambda receiver: receiver.log(values, row["step"]))

    def close(self) -> None:
        """Closes the loggers."""
        for name in list(self._loggers):
            self._attempt(name, lambda receiver: receiver.close())

    def _attempt(self, name: str, action: Any) -> None:
        try:
            action(self._loggers[name])
        except Exception as error:
            logger.warning("The logger %s failed and is left out: %s: %s", name, type(error).__name__, error)
            del self._loggers[name]


def trim(folder: Path, step: int) -> int:
    """Moves rows beyond a step, and a line that a crash cut off, to metrics.discarded.jsonl.

    Args:
        folder: The run's folder.
        step: Where the run goes on.

    Returns:
        How many rows were moved.
    """
    path = folder / METRICS
    if not path.exists():
        return 0
    kept: list[str] = []
    gone: list[str] = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            (kept if json.loads(line)["step"] <= step else gone).append(line)
        except (ValueError, KeyError, TypeError):
            gone.append(line)
    if gone:
        with (folder / DISCARDED).open("a") as file:
            file.writelines(line + "\n" for line in gone)
        write_text(path, "".join(line + "\n" for line in kept))
    return len(gone)


@dataclass(frozen=True)
class Speedometer:
    """Turns tokens and seconds into rates.

    Attributes:
        formula: Convention of the operations counted, see ``arch.counts.flops_per_token``.
        flops_per_token: Operations of a training step per token.
        peak: Of all devices together in FLOP/s, or None where it is unknown: then no utilisation is given.
    """

    formula: FlopsFormula
    flops_per_token: float
    peak: float | None

    def utilisation(self, tokens_per_s: float) -> float | None:
        """Gives the model FLOPs utilisation as a share of one."""
        return tokens_per_s * self.flops_per_token / self.peak if self.peak else None


def speedometer(
    config: ModelConfig,
    *,
    sequence_length: int,
    formula: FlopsFormula,
    world_size: int,
    device_name: str,
    peak_tflops: float | None = None,
) -> Speedometer:
    """Makes a run's speedometer.

    Args:
        config: The model.
        sequence_length: Tokens of a sequence.
        formula: ``palm`` or ``causal``.
        world_size: Number of devices.
        device_name: Of one device, to look its peak up.
        peak_tflops: Peak of one device, instead of the data sheet's.
    """
    peak = peak_tflops * 1e12 if peak_tflops else peak_flops(device_name)
    per_token = flops_per_token(config, sequence_length, formula)
    return Speedometer(formula, per_token, peak * world_size if peak else None)


def session_row(step: int, meter: Speedometer, facts: Row) -> dict[str, Any]:
    """Makes the row with which a session begins."""
    return {
        "kind": "run",
        "step": step,
        "flops_formula": meter.formula,
        "flops_per_token": meter.flops_per_token,
        "peak_flops": meter.peak,
        **facts,
    }


def _append(path: Path, data: bytes) -> None:
    """Appends all of the bytes or, where they do not fit, none: half a line would damage the one that follows."""
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if file.write(data) < len(data):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(key: str, value: Any) -> bool:
    return key not in ("kind", "step") and isinstance(value, int | float) and not isinstance(value, bool)
