"""Numbers as people write them: token budgets (``50B``), sizes (``2GiB``) and their readable forms."""

from __future__ import annotations

import re

from megatron_inherit.base.errors import UsageError

_COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _BYTES |= {_letter + "b": 1000**_power, _letter + "ib": 1024**_power, _letter: 1000**_power}
_FORM = re.compile(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def _parse(text: str | int, units: dict[str, int], example: str) -> int:
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _FORM.fullmatch(str(text))
    if match is None or match[2].lower() not in units:
        raise UsageError(f"{text!r} is not a quantity.", expected=f"a number with an optional unit, such as {example}")
    number = match[1].replace("_", "").replace(",", "")
    scale = units[match[2].lower()]
    if number.isdigit():
        return int(number) * scale
    value = float(number) * scale
    if value != int(value):
        raise UsageError(f"{text!r} is not a whole number.", got=value)
    return int(value)


def parse_count(text: str | int) -> int:
    """Reads a count such as ``"1B"``, ``"2.5M"``, ``"50_000"`` or ``1000`` (decimal units k, M, B, T)."""
    return _parse(text, _COUNT, "1B, 2.5M or 50000")


def parse_bytes(text: str | int) -> int:
    """Reads a size in bytes such as ``"2GiB"`` (binary), ``"5GB"`` (decimal) or ``4096``."""
    return _parse(text, _BYTES, "2GiB, 500MB or 4096")


def format_count(count: float) -> str:
    """Writes a count with three significant digits: ``1.82B``, ``134M``, ``512``."""
    for scale, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(count) >= scale:
            return f"{count / scale:.3g}{letter}"
    return f"{count:.3g}" if count != int(count) else str(int(count))


def format_bytes(size: float) -> str:
    """Writes a size in binary units: ``1.50 GiB``."""
    for scale, unit in ((1024**4, "TiB"), (1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB")):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{int(size)} B"


def format_seconds(seconds: float) -> str:
    """Writes a duration: ``3h04m``, ``5m09s`` or ``12.3s``."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"
    if seconds >= 60:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    return f"{seconds:.1f}s"
