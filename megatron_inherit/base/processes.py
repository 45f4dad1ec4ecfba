"""Which processes live, and which machine this is."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path


def process_start(pid: int) -> str | None:
    """Gives when a process started, which tells it from a later one of the same number.

    Args:
        pid: Its number.

    Returns:
        Clock ticks since the machine started, as text; ``unknown`` where there is no ``/proc``; None if no such process
        runs, or it has ended and only waits for its parent to ask.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)
    except PermissionError:
        return "unknown"
    except OSError:
        return None
    return "unknown"


def machine_mark() -> str:
    """Gives six hexadecimal digits that stand for this machine's name."""
    return hashlib.blake2b(platform.node().encode(), digest_size=3).hexdigest()
