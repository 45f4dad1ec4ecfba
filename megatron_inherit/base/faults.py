"""Faults on demand: ``MI_FAULT="<point>:<rank>:<step>:<action>"`` makes a named point of a run fail, for its tests.

Several faults are separated by commas; ``*`` stands for every rank or step. Actions: ``kill``, ``stop``, ``term``,
``usr1`` and ``int`` send this process that signal, ``raise`` raises RuntimeError, ``full`` raises the error of a full
disk, ``sleep=SECONDS`` sleeps. Without the variable a point costs one look-up.
"""

from __future__ import annotations

import errno
import os
import signal
import time

VARIABLE = "MI_FAULT"
_SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
    "int": signal.SIGINT,
}


def fault(point: str, step: int) -> None:
    """Fails here if the environment asks for it.

    Args:
        point: Name of the place.
        step: The run's step.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    rank = os.environ.get("RANK", "0")
    for entry in wanted.split(","):
        place, who, when, action = entry.split(":")
        if place == point and who in ("*", rank) and when in ("*", str(step)):
            _act(action, point)


def _act(action: str, point: str) -> None:
    if action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
    elif action == "full":
        raise OSError(errno.ENOSPC, f"fault at {point}")
    elif action.startswith("sleep="):
        time.sleep(float(action.removeprefix("sleep=")))
    else:
        raise RuntimeError(f"fault at {point}: {action}")
