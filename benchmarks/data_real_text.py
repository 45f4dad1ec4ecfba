"""The whole pipeline on real text: ingest, tokenize, a subset and a nested one of half its size, three epochs drawn.

    python benchmarks/data_real_text.py redpajama SOURCE --layout redpajama --tokenizer tokenizer.model --prepend-bos
    python benchmarks/data_real_text.py prose NAME=FILE.jsonl ... --tokenizer tokenizer.model --prepend-bos

The RedPajama sample is the folder ``llmshearing/data/sample_redpajama`` of github.com/princeton-nlp/LLM-Shearing; prose
is any text, a source a domain. Rows go to benchmarks/results/data_real_text.csv; what must hold of them is checked.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measuring import append_rows, circumstances

from megatron_inherit.base.errors import DataError
from megatron_inherit.base.quantities import format_count, parse_count
from megatron_inherit.data.budget import make_subset
from megatron_inherit.data.drawn import report_drawn
from megatron_inherit.data.ingest import IngestOptions, ingest
from megatron_inherit.data.inspection import inspect_data
from megatron_inherit.data.loader import LoaderOptions, open_loader
from megatron_inherit.data.manifests import SubsetOptions
from megatron_inherit.data.opening import open_stream
from megatron_inherit.data.tokenize import TokenizeOptions, tokenize

SEQUENCE, EPOCHS, SPLITS = 1024, 3, {"valid_share": 0.02, "test_share": 0.0}


class Rows:
    """Rows of one corpus, shown as they come."""

    def __init__(self, corpus: str) -> None:
        self.corpus, self._where = corpus, circumstances("sentencepiece", "tokenizers", "gigatoken")

    def add(self, what: str, domain: str, documents: int | str, tokens: int, share: float, note: str = "") -> None:
        """Appends a row and prints it."""
        found: dict[str, Any] = {"corpus": self.corpus, "what": what, "domain": domain, "documents": documents}
        found |= {"tokens": tokens, "share_percent": f"{100 * share:.2f}", "note": note}
        append_rows("data_real_text", [found | self._where])
        print(" | ".join(map(str, found.values())), flush=True)

    def of_split(self, what: str, folder: Path, split: str = "train") -> None:
        """A row a domain of a subset, and one for all."""
        domains = inspect_data(folder, split=split).domains
        total = sum(domain.tokens or 0 for domain in domains)
        for domain in domains:
            tokens = domain.tokens or 0
            note = f"{domain.unique_tokens} unique tokens; weight {100 * (domain.weight or 0):.2f} %"
            self.add(what, domain.name, domain.documents, tokens, tokens / total, note)
        self.add(what, "all", sum(domain.documents for domain in domains), total, 1.0)

    def of_drawn(self, what: str, drawn: Mapping[str, int], samples: int) -> None:
        """A row a domain of what was drawn, and one for all."""
        total = sum(drawn.values())
        for name, tokens in drawn.items():
            self.add(what, name, "", tokens, tokens / total)
        self.add(what, "all", "", total, 1.0, f"{samples} samples of {SEQUENCE}")


def run(args: argparse.Namespace, work: Path) -> None:
    rows = Rows(args.corpus)
    text = ingest(args.sources, work / "text", IngestOptions(layout=args.layout), workers=args.workers)
    how = TokenizeOptions(tokenizer=args.tokenizer, prepend_bos=args.prepend_bos, backend=args.backend)
    tokenize(work / "text", work / "tokens", how, workers=args.workers)
    summary = inspect_data(work / "tokens")
    size, total = sum(shard.text_bytes for shard in text.shards), sum(one.tokens or 0 for one in summary.domains)
    for one in summary.domains:
        rows.add("corpus", one.name, one.documents, one.tokens or 0, one.share or 0.0, f"{one.text_bytes} bytes")
    note = f"{size} bytes; rejected {dict(text.rejects)}; {summary.duplicates} exact duplicates; "
    note += f"{summary.bytes_per_token:.3f} bytes a token; --backend {args.backend}"
    rows.add("corpus", "all", sum(one.documents for one in summary.domains), total, 1.0, note)
    large, small = args.tokens, args.tokens // 2
    for tokens in (large, small):
        options = SubsetOptions(tokens=tokens, **SPLITS)
        make_subset([str(work / "tokens")], work / str(tokens), options)
        rows.of_split(f"subset of {format_count(tokens)}", work / str(tokens))
    rows.of_split("held out of both", work / str(large), "valid")
    check_nested(work / str(small), work / str(large))
    rows.of_drawn(*drawn_in_epochs(work / str(large)))
    if args.layout == "redpajama":
        llama_weights(rows, work, large)


def check_nested(small: Path, large: Path) -> None:
    """Raises unless the small subset's documents are the first of the large one's, and none of them is held out."""
    parts, of_large = open_stream(small, "train"), open_stream(large, "train")
    for one, other in zip(parts.domains, of_large.domains, strict=True):
        starts = [
            stream.spans.starts[np.searchsorted(stream.spans.ends, domain.start, "right") :][: domain.documents]
            for stream, domain in ((parts, one), (of_large, other))
        ]
        must(
            np.array_equal(starts[0], starts[1][: len(starts[0])]),
            f"{one.name} of the small subset begins the large one",
        )
    held_out = [open_stream(folder, "valid").spans.starts for folder in (small, large)]
    must(np.array_equal(*held_out), "both hold out the same documents")
    must(not np.isin(of_large.spans.starts, held_out[0]).any(), "no document is trained on and held out")


def must(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"not so: {what}")


def drawn_in_epochs(folder: Path) -> tuple[str, dict[str, int], int]:
    """Reads every sample of all epochs; each window must come once an epoch."""
    loader = open_loader(LoaderOptions(str(folder), SEQUENCE, epochs=EPOCHS))
    orders = [
        loader.windows(np.arange(epoch * loader.samples_per_epoch, (epoch + 1) * loader.samples_per_epoch))
        for epoch in range(EPOCHS)
    ]
    windows = np.arange(loader.samples_per_epoch)
    must(all(np.array_equal(np.sort(order), windows) for order in orders), "each window comes once an epoch")
    must(not np.array_equal(orders[0], orders[1]), "each epoch has an order of its own")
    read = sum(
        loader.batch(at, min(64, loader.num_samples - at)).tokens.size for at in range(0, loader.num_samples, 64)
    )
    drawn = report_drawn(loader, loader.num_samples)
    must(sum(drawn.values()) == read, "what is counted is what is read")
    return f"drawn in {EPOCHS} epochs", drawn, loader.num_samples


def llama_weights(rows: Rows, work: Path, tokens: int) -> None:
    """LLaMA's shares: refused where a domain is too small, kept exactly where it may repeat."""
    draw = partial(make_subset, [str(work / "tokens")], work / "llama")
    try:
        draw(SubsetOptions(tokens=tokens, weights="llama", **SPLITS))
    except DataError as error:
        print(f"refused: {error}")
    draw(SubsetOptions(tokens=tokens, weights="llama", on_short="repeat", **SPLITS))
    rows.of_split("LLaMA's weights, repeat", work / "llama")
    what, drawn, samples = drawn_in_epochs(work / "llama")
    rows.of_drawn(f"LLaMA's weights, {what}", drawn, samples)
    part = samples // 2
    loader = open_loader(LoaderOptions(str(work / "llama"), SEQUENCE, epochs=EPOCHS))
    rows.of_drawn(f"LLaMA's weights, drawn in {EPOCHS / 2} epochs", loader.drawn(0, part), part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="its name in the rows")
    parser.add_argument("sources", nargs="+", help="as `minherit data ingest` takes them")
    parser.add_argument("--layout", default="files")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--prepend-bos", action="store_true")
    parser.add_argument("--backend", default="own")
    parser.add_argument("--tokens", type=parse_count, default=parse_count("2M"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keeps what is made there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(args, args.work or Path(folder))


if __name__ == "__main__":
    main()
