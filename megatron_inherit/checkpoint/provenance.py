"""One small file that says where weights come from and travels with them through slicing, training and export."""

from __future__ import annotations

import json

from megatron_inherit.checkpoint.stream import SideFile, Source

NAME = "provenance.json"


def provenance_file(note: str, licence: str) -> SideFile:
    """Makes the file.

    Args:
        note: What every table and card must say of the weights (``NAME, dequantised from Q4_1``).
        licence: Their licence.
    """
    return SideFile(NAME, content=(json.dumps({"note": note, "licence": licence}, indent=2) + "\n").encode())


def read_provenance(source: Source) -> tuple[str, str]:
    """Gives (note, licence) of a checkpoint; empty strings where nothing is known."""
    found: dict[str, str] = {}
    for side in source.side_files:
        if side.name == NAME:
            try:
                value = json.loads(side.read(source.pool))
            except ValueError:
                continue
            found = value if isinstance(value, dict) else {}
    return str(found.get("note", "")), source.licence or str(found.get("licence", ""))
