"""DeepSpeed's asynchronous reads and writes: a C++ extension that torch builds where it first is needed."""

from __future__ import annotations

import time
from pathlib import Path

SILENT_SECONDS = 300.0
"""A build in whose folder nothing changes for so long is taken for dead."""


def operation_problem() -> str:
    """Builds the extension unless it is built; gives what forbids it and, on a second line, the remedy, or nothing."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import _get_build_directory

    fix = (
        "Install libaio's headers (apt-get install libaio-dev), a C++ compiler and ninja, "
        "or leave deepspeed.nvme_path out."
    )
    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        return f"deepspeed.nvme_path: DeepSpeed's async_io operation needs libaio, which was not found.\n{fix}"
    for name in ("pin_memory", builder.name):
        lock = await_build(Path(_get_build_directory(name, verbose=False)))
        if lock is not None:
            what = f"deepspeed.nvme_path: another process builds DeepSpeed's {name} operation and seems dead."
            return f"{what}\nDelete {lock} and start again."
    try:
        builder.load(verbose=False)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        return f"deepspeed.nvme_path: DeepSpeed's async_io operation cannot be built: {reason}.\n{fix}"
    return ""


def await_build(folder: Path) -> Path | None:
    """Waits for another process's build of an extension, as torch does, but not for ever.

    Torch's lock is a file that a killed process leaves, and names no process.

    Args:
        folder: Of the extension.

    Returns:
        The lock, if it stays and nothing else in the folder changes for ``SILENT_SECONDS``.
    """
    lock, seen, since = folder / "lock", None, time.monotonic()
    while lock.exists():
        now = _times(folder)
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > SILENT_SECONDS:
            return lock
        time.sleep(min(1.0, SILENT_SECONDS / 10))
    return None


def _times(folder: Path) -> dict[str, int]:
    found = {}
    for path in folder.iterdir():
        try:
            found[path.name] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return found
