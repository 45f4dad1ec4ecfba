"""The text on which a model is measured: windows of a user's text, or of the one that every Python installation has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_inherit.base.errors import DataError

if TYPE_CHECKING:
    import torch

MOST_CHARACTERS = 1_000_000
"""Of one document: a book is not read to its end."""

SPREAD = 8
"""Text is read until it holds this many times the tokens that are wanted."""


def sample_windows(tokenizer: Any, text: Path | str | None, *, sequences: int, tokens: int) -> torch.Tensor:
    """Cuts windows of equal length, evenly spread over as much of the text as is read.

    Args:
        tokenizer: Of transformers.
        text: A file (plain text, JSON lines, parquet, compressed or not) or a folder of them; without it Python's own
            language reference (``pydoc_data.topics``).
        sequences: Windows.
        tokens: Tokens of each.

    Returns:
        int64 [sequences, tokens].

    Raises:
        DataError: The text is missing, cannot be read or is too short.
    """
    import torch

    ids: list[int] = []
    for document in _reference() if text is None else _documents(Path(text)):
        ids += tokenizer.encode(document[:MOST_CHARACTERS], add_special_tokens=False)
        if len(ids) >= SPREAD * sequences * tokens:
            break
    if len(ids) < sequences * tokens:
        raise DataError(
            f"The text of {text or 'the Python reference'} is too short.",
            got=f"{len(ids)} tokens",
            expected=f"{sequences} windows of {tokens} tokens",
            fix="Give a longer --text, or fewer --sequences.",
        )
    stride = (len(ids) - tokens) // max(1, sequences - 1) if sequences > 1 else 0
    return torch.tensor([ids[start * stride : start * stride + tokens] for start in range(sequences)])


def _reference() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _documents(path: Path) -> Iterator[str]:
    from megatron_inherit.data.layouts import get_layout
    from megatron_inherit.data.records import Document, ReadOptions, read_documents
    from megatron_inherit.data.sources import find_sources

    layout = get_layout("files")
    for file in find_sources([str(path)], layout):
        for document in read_documents(file, ReadOptions(layout)):
            if isinstance(document, Document):
                yield document.text
