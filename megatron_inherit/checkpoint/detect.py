"""Finds out which format a path holds and opens it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from megatron_inherit.base.errors import CheckpointError, UsageError
from megatron_inherit.checkpoint.files import is_remote
from megatron_inherit.checkpoint.stream import Source

FORMATS = {
    "learngene": "learngene",
    "hf": "hf",
    "gguf": "gguf",
    "native": "native",
    "torch_dist": "torch_dist",
    "megatron": "megatron_legacy",
    "meta": "meta",
    "ds_universal": "ds_universal",
    "ds_zero": "ds_zero",
}
"""Format -> its module in ``checkpoint.formats``, in the order in which a path is tried.

Each module has ``detect(path) -> bool`` and ``open_source(path) -> Source``; those that can be written also have
``make_sink(config, dtypes, options) -> Sink``.
"""


def format_module(name: str) -> ModuleType:
    """Imports the module of a format.

    Raises:
        UsageError: There is no such format.
    """
    if name not in FORMATS:
        raise UsageError(f"Unknown checkpoint format {name!r}.", expected=f"one of {', '.join(FORMATS)}")
    return importlib.import_module(f"megatron_inherit.checkpoint.formats.{FORMATS[name]}")


def detect_format(path: str) -> str:
    """Names the format of a path from its file names.

    Raises:
        CheckpointError: Nothing is there, or nothing that is known.
    """
    if is_remote(path):
        return "gguf" if path.endswith(".gguf") else "hf"
    if not Path(path).exists():
        raise CheckpointError(f"{path} does not exist.", fix="Check the path of the checkpoint.")
    for name in FORMATS:
        if format_module(name).detect(path):
            return name
    raise CheckpointError(
        f"{path} holds no checkpoint of a known format.",
        got=_content(Path(path)),
        expected=f"one of {', '.join(FORMATS)}",
        fix="" if Path(path).is_dir() else "Give the folder that the file lies in.",
    )


def _content(path: Path) -> str:
    if not path.is_dir():
        return "a file"
    return ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "an empty folder"


def open_source(path: str | Path, *, format: str | None = None) -> Source:
    """Opens a checkpoint by reading its headers; no tensor is read.

    Args:
        path: Folder, file or URL.
        format: Key of ``FORMATS``; default: found out.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, of an unknown format or of an unknown family.
    """
    path = str(path)
    return format_module(format or detect_format(path)).open_source(path)
