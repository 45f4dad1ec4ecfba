"""How published corpora lay out their domains: rules from a path, or from a record, to one of seven names.

RedPajama-1T keeps a folder a domain, its sample a file a domain, SlimPajama names the domain in each record. A file or
a record that no rule matches is an error, for a lost domain would change the mixture in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_inherit.base.errors import DataError

LLAMA_WEIGHTS = {
    "cc": 0.67,
    "c4": 0.15,
    "github": 0.045,
    "wikipedia": 0.045,
    "books": 0.045,
    "arxiv": 0.025,
    "stackexchange": 0.02,
}
"""Domain shares of LLaMA's pretraining data (Touvron et al., 2023, table 1)."""

_REDPAJAMA_WORDS = {
    "common_crawl": "cc",
    "cc": "cc",
    "c4": "c4",
    "github": "github",
    "wikipedia": "wikipedia",
    "wiki": "wikipedia",
    "books": "books",
    "book": "books",
    "arxiv": "arxiv",
    "stackexchange": "stackexchange",
    "stack_exchange": "stackexchange",
}
_SLIMPAJAMA_SETS = {
    "RedPajamaCommonCrawl": "cc",
    "RedPajamaC4": "c4",
    "RedPajamaGithub": "github",
    "RedPajamaWikipedia": "wikipedia",
    "RedPajamaBook": "books",
    "RedPajamaArXiv": "arxiv",
    "RedPajamaStackExchange": "stackexchange",
}
_WORD_END = re.compile(r"[._-]|$")


@dataclass(frozen=True)
class Layout:
    """A way to tell domains.

    Attributes:
        name: As ``--layout`` takes it.
        by_path: The path below the source tells the domain.
        by_record: The record's ``meta.redpajama_set_name`` tells it.
        fixed: One domain for everything, named after the corpus.
    """

    name: str
    by_path: bool = False
    by_record: bool = False
    fixed: str | None = None


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("files"),
        Layout("redpajama", by_path=True),
        Layout("slimpajama", by_record=True),
        Layout("fineweb-edu", fixed="fineweb-edu"),
        Layout("openwebtext", fixed="openwebtext"),
    )
}


def get_layout(name: str) -> Layout:
    """Looks a layout up.

    Raises:
        DataError: There is none of that name.
    """
    if name not in LAYOUTS:
        raise DataError(f"There is no layout {name!r}.", expected=f"one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def domain_of_path(relative: str) -> str:
    """Tells the RedPajama domain of a file from the first part of its path that is a domain's name.

    Args:
        relative: Path below the source, such as ``common_crawl/2023-06/en_head_0000.jsonl.zst``,
            ``cc_2019-30_sample.jsonl`` or ``c4-rp/0.jsonl``.

    Raises:
        DataError: No part names a domain.
    """
    for part in relative.split("/"):
        for word in sorted(_REDPAJAMA_WORDS, key=len, reverse=True):
            if part.lower().startswith(word) and _WORD_END.match(part, len(word)):
                return _REDPAJAMA_WORDS[word]
    raise DataError(
        f"{relative} belongs to none of RedPajama's domains.",
        expected=f"a folder or file named after one of {', '.join(sorted(set(_REDPAJAMA_WORDS)))}",
        fix="Name the domain yourself: `minherit data ingest NAME=PATH`, or use --layout files.",
    )


def domain_of_record(record: Mapping[str, Any]) -> str | None:
    """Tells the SlimPajama domain of a record, None where it has no known one."""
    meta = record.get("meta")
    name = meta.get("redpajama_set_name") if isinstance(meta, Mapping) else None
    return _SLIMPAJAMA_SETS.get(str(name))
