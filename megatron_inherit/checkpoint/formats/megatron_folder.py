"""The folder of one iteration and the tracker beside it, as Megatron-LM names them for all its formats."""

from __future__ import annotations

from pathlib import Path

from megatron_inherit.base.atomic import write_bytes
from megatron_inherit.base.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"


def iteration_name(iteration: int) -> str:
    """Names the folder of an iteration; 0 is ``release``, weights without a run."""
    return f"iter_{iteration:07d}" if iteration else "release"


def iteration_folder(path: Path) -> Path:
    """Gives the folder the tracker names, or the path itself where there is no tracker.

    Raises:
        CheckpointError: The tracker holds neither a number nor ``release``, or its folder is missing.
    """
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    text = tracker.read_text(errors="replace")[:64].strip()
    if text != "release" and not text.isdecimal():
        raise CheckpointError(f"{tracker} holds no iteration.", got=repr(text), expected="a number or release")
    folder = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise missing_folder(tracker, folder)
    return folder


def missing_folder(tracker: Path, folder: Path) -> CheckpointError:
    """Says that a tracker names a folder that is not there."""
    others = sorted(entry.name for entry in tracker.parent.iterdir() if entry.is_dir())
    return CheckpointError(
        f"{tracker} names {folder.name}, which is missing.",
        got=", ".join(others[:8]) or "no folder",
        fix="Copy that folder too, or give the path of another one.",
    )


def write_tracker(root: Path, iteration: int) -> None:
    """Writes the tracker, which makes a checkpoint the latest."""
    write_bytes(root / TRACKER, (str(iteration) if iteration else iteration_name(0)).encode())
