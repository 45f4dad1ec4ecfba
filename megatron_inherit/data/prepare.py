"""Text to training data in one call: ingest, tokenize and subset, each step skipped where its result is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_inherit.base.errors import DataError
from megatron_inherit.data.budget import make_subset
from megatron_inherit.data.ingest import IngestOptions, ingest
from megatron_inherit.data.jobs import Report, start_server
from megatron_inherit.data.loader import LoaderOptions, open_loader
from megatron_inherit.data.manifests import MANIFEST, ShardRecord, SubsetManifest, SubsetOptions, TokensManifest
from megatron_inherit.data.tokenize import TokenizeOptions, tokenize
from megatron_inherit.data.tokenizer import open_tokenizer
from megatron_inherit.data.windows import EvalWindows


def prepare(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str,
    tokens: int | None = None,
    seed: int = 0,
    valid_share: float = 0.05,
    test_share: float = 0.0,
    pattern: str = "*",
    as_text: bool = False,
    ingest_options: IngestOptions | None = None,
    tokenize_options: TokenizeOptions | None = None,
    subset_options: SubsetOptions | None = None,
    workers: int = 1,
    on_progress: Report | None = None,
) -> Path:
    """Makes ``OUT/text``, ``OUT/tokens`` and ``OUT/subset``; the last is what ``LoaderOptions.path`` takes.

    Args:
        sources: See :func:`megatron_inherit.data.sources.find_sources`.
        out: Folder of the three.
        tokenizer: See :func:`megatron_inherit.data.tokenizer.open_tokenizer`.
        tokens: Training tokens; None takes all.
        seed: Of the order of documents.
        valid_share: Share of the documents held out for validation, by hash.
        test_share: Share held out for tests.
        pattern: Shell pattern for file names inside folders.
        as_text: Every file is plain text.
        ingest_options: More about reading.
        tokenize_options: More about tokenizing; its tokenizer is replaced.
        subset_options: More about drawing; its budget, seed and shares are replaced.
        workers: Processes.
        on_progress: Gets what is done.

    Returns:
        Folder of the subset.

    Raises:
        DataError: As the three steps do.
    """
    out = Path(out)
    if workers > 1:
        start_server("megatron_inherit.data.tokenize")
    jobs: dict[str, Any] = {"workers": workers, "on_progress": on_progress}
    ingest(list(sources), out / "text", ingest_options, pattern=pattern, as_text=as_text, **jobs)
    how = (tokenize_options or TokenizeOptions(tokenizer=tokenizer)).model_copy(update={"tokenizer": tokenizer})
    tokens_manifest = tokenize(out / "text", out / "tokens", how, **jobs)
    chosen = {"tokens": tokens, "seed": seed, "valid_share": valid_share, "test_share": test_share}
    draw = (subset_options or SubsetOptions()).model_copy(update=chosen)
    subset = out / "subset"
    if not _is_drawn(subset, draw, tokens_manifest):
        make_subset([str(out / "tokens")], subset, draw, overwrite=True)
    return subset


def _is_drawn(folder: Path, options: SubsetOptions, tokens: TokensManifest) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    made = SubsetManifest.load(folder / MANIFEST)
    same = [shard.files for shard in made.shards] == [shard.files for shard in sorted(tokens.shards, key=_place)]
    return made.options == options and same


def _place(shard: ShardRecord) -> tuple[str, str]:
    return shard.domain, shard.name


def make_windows(
    subset: str | Path, out: str | Path, *, tokenizer: str, sequence_length: int, windows: int, split: str = "valid"
) -> EvalWindows:
    """Writes fixed evaluation windows of a subset's held-out split, or reads the file if it is there.

    Args:
        subset: Folder of the subset.
        out: The file.
        tokenizer: What made the ids.
        sequence_length: Predicted tokens a window.
        windows: How many; fewer if the split is smaller.
        split: Which.

    Raises:
        DataError: The split is missing or too small, or the file holds windows of another length.
    """
    out = Path(out)
    if not out.is_file():
        loader = open_loader(LoaderOptions(str(subset), sequence_length, split=split))
        made = EvalWindows.build(loader, open_tokenizer(tokenizer), windows=windows)
        out.parent.mkdir(parents=True, exist_ok=True)
        made.save(out)
        return made
    found = EvalWindows.load(out)
    if found.tokens.shape[1] != sequence_length + 1:
        raise DataError(
            f"{out} holds windows of another length.",
            got=found.tokens.shape[1] - 1,
            expected=sequence_length,
            fix="Remove the file, or name another.",
        )
    return found
