"""A table that a page shows as it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PageTable:
    """Text in rows and columns; the first column names the row.

    Attributes:
        title: Above it.
        lead: What it answers.
        head: Names of the columns.
        rows: Cells.
        note: How it is read.
    """

    title: str
    lead: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
