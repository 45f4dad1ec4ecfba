"""Data: tokenizing against the libraries in memory, the loader, the order, and subsets of 10^6 to 10^8 documents.

    python benchmarks/data.py tokenize --text FOLDER --tokenizer PATH ...   # FOLDER: what `minherit data ingest` wrote
    python benchmarks/data.py stages --text FOLDER --tokenizer PATH ...     # what gigatoken leaves to us
    python benchmarks/data.py loader
    python benchmarks/data.py order
    python benchmarks/data.py subset --documents 1e6 1e7 1e8

Rows go to benchmarks/results/data.csv and data_tokenizing.csv. ``cpu_s`` is the figure to compare on a machine that
others use, ``wall_s`` stands beside it. Rivals run in turn with us on the same documents.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from data_tokenizing import bench_stages, bench_tokenize
from measuring import append_rows, circumstances

from megatron_inherit.data.budget import make_subset
from megatron_inherit.data.indexed import IndexedWriter, bin_path, idx_path
from megatron_inherit.data.integrity import BLOCK_BYTES
from megatron_inherit.data.loader import Loader, LoaderOptions, open_loader
from megatron_inherit.data.manifests import (
    MANIFEST,
    FileRecord,
    ShardRecord,
    SubsetOptions,
    TokenizerRecord,
    TokensManifest,
)
from megatron_inherit.data.permutation import KeyedPermutation
from megatron_inherit.data.tokenize import DOCUMENT_DTYPE

Cost = tuple[float, float]
"""Wall and CPU seconds."""


def row(claim: str, case: str, value: float, unit: str, cost: Cost = (0.0, 0.0), note: str = "") -> None:
    """Appends a row and prints it."""
    where = circumstances("numpy", "tokenizers", "sentencepiece", "datasets", "gigatoken")
    found = {"claim": claim, "case": case, "value": f"{value:.4g}", "unit": unit}
    costs = {"wall_s": f"{cost[0]:.2f}", "cpu_s": f"{cost[1]:.2f}"}
    append_rows("data", [found | costs | {"note": note} | where])
    print(" | ".join([*found.values(), *costs.values(), note]), flush=True)


def cpu_seconds() -> float:
    parts = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in parts)


def measure(work: Callable[[], object]) -> Cost:
    """Runs once."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    work()
    return time.perf_counter() - wall, cpu_seconds() - cpu


class AnonymousMemory:
    """Peak RssAnon (MiB) of this process inside the block, less what it had before."""

    def __enter__(self) -> AnonymousMemory:
        self._before = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self._now())

    def _now(self) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.grown = max(self.peak, self._now()) - self._before


def bench_loader(sequence: int) -> None:
    """Samples out of a memory map: permutation, pieces, copy, check of ids."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for mean in (300, 1000):
            lengths = rng.geometric(1 / mean, 60_000_000 // mean)
            with IndexedWriter(Path(folder) / f"d{mean}", np.dtype("u2")) as writer:
                writer.add_documents(rng.integers(0, 32000, lengths.sum()), lengths)
            make_subset([f"{folder}/d{mean}"], f"{folder}/s{mean}", SubsetOptions(valid_share=0, test_share=0))
            for boundary in ("packed", "reset"):
                for batch in (8, 64):
                    loader = open_loader(
                        LoaderOptions(f"{folder}/s{mean}", sequence, epochs=0, vocab_size=32000, boundary=boundary)  # type: ignore[arg-type]
                    )
                    costs = [measure(partial(read, loader, start, batch)) for start in range(0, 5 * 4096, 4096)]
                    best = (min(wall for wall, _ in costs), min(cpu for _, cpu in costs))
                    case = f"{boundary}, batches of {batch}, documents of {mean} tokens in random order"
                    note = f"4096 samples of {sequence} tokens, one thread, least of 5"
                    row("loader", case, 4096 * sequence / best[1] / 1e6, "M tokens/CPU-s", best, note)


def read(loader: Loader, start: int, batch: int) -> None:
    for at in range(start, start + 4096, batch):
        loader.batch(at, batch)


def bench_order() -> None:
    """The order of 10^9 samples is a keyed permutation: nothing is built, so the cost is per sample."""
    permutation = KeyedPermutation(10**9, 1)
    index = np.random.default_rng(0).integers(0, 10**9, 1 << 20)
    with AnonymousMemory() as memory:
        costs = [measure(partial(permutation, index)) for _ in range(5)]
    best = (min(wall for wall, _ in costs), min(cpu for _, cpu in costs))
    note = f"nothing built; {memory.grown:.0f} MiB, most of it the results"
    row("order", "keyed permutation of 1e9, random access", best[1] / len(index) * 1e9, "ns/sample", best, note)
    row(
        "order",
        "all of 1e9 samples, one thread",
        best[1] / len(index) * 1e9,
        "CPU-s",
        note="COMPUTED: 1e9 x the row above",
    )


def bench_subset(counts: list[int], work: Path | None) -> None:
    """Index over synthetic documents: hashes at random, tokens in sparse files that are never read whole."""
    slopes = []
    for count in counts:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            store, subset = Path(folder) / "tokens", Path(folder) / "subset"
            synthetic_store(store, count)
            one_percent = SubsetOptions(tokens=16 * count // 100)
            for name, options in (("everything", SubsetOptions()), ("1% of the tokens", one_percent)):
                with AnonymousMemory() as memory:
                    cost = measure(partial(make_subset, [str(store)], subset, options, overwrite=True))
                note = f"peak {memory.grown:.0f} MiB anonymous"
                case = f"{count:.0e} documents, {name}"
                row("subset", case, cost[1] / count * 1e6, "CPU-us/document", cost, note)
                slopes.append(cost[1] / count)
                with AnonymousMemory() as memory:
                    cost = measure(partial(open_and_read, subset))
                row("worker", case, memory.grown, "MiB anonymous", cost, "opens and reads 256 samples of 2048")
    for count in (10**9, 10**10):
        row(
            "subset",
            f"{count:.0e} documents, everything",
            slopes[-2] * count,
            "CPU-s",
            note="COMPUTED from the last slope",
        )


def open_and_read(subset: Path) -> None:
    loader = open_loader(LoaderOptions(str(subset), 2048, vocab_size=32000, epochs=0))
    for start in range(0, 256, 8):
        loader.batch(start, 8)


def synthetic_store(folder: Path, documents: int, *, per_shard: int = 5_000_000) -> None:
    """Writes a folder of tokens of 1 to 31 tokens a document whose ids are the zeros of sparse files."""
    rng, shards = np.random.default_rng(1), []
    folder.mkdir(parents=True)
    for number, begin in enumerate(range(0, documents, per_shard)):
        count = min(per_shard, documents - begin)
        prefix, docs = folder / f"{number:04d}", folder / f"{number:04d}.docs"
        lengths = rng.integers(1, 32, count)
        with IndexedWriter(prefix, np.dtype("u2")) as writer:
            writer.add_documents(np.empty(0, "u2"), lengths)
        size = int(lengths.sum()) * 2
        os.truncate(bin_path(prefix), size)
        table = np.empty(count, DOCUMENT_DTYPE)
        table["low"], table["high"] = (rng.integers(0, 2**64, count, np.uint64) for _ in range(2))
        table["bytes"] = lengths * 4
        table.tofile(docs)
        not_hashed = ["0" * 16] * -(-size // BLOCK_BYTES)
        shards.append(
            ShardRecord(
                name=prefix.name,
                domain="text",
                dtype="<u2",
                documents=count,
                tokens=size // 2,
                text_bytes=size * 2,
                max_token=0,
                files={
                    "bin": FileRecord.of(bin_path(prefix), not_hashed),
                    "idx": FileRecord.of(idx_path(prefix)),
                    "docs": FileRecord.of(docs),
                },
            )
        )
    TokensManifest(source="synthetic", tokenizer=synthetic_tokenizer(), shards=tuple(shards)).save(folder / MANIFEST)


def synthetic_tokenizer() -> TokenizerRecord:
    return TokenizerRecord(
        kind="bytes",
        path="bytes",
        fingerprint="none",
        vocab_size=257,
        eos_id=256,
        bos_id=None,
        append_eos=False,
        prepend_bos=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokenize", "stages", "loader", "order", "subset"])
    parser.add_argument("--text", type=Path, help="folder that `minherit data ingest` wrote")
    parser.add_argument("--tokenizer", nargs="+", default=[])
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of the cases to run")
    parser.add_argument("--repeats", type=int, default=5, help="of tokenize and stages")
    parser.add_argument("--documents", nargs="+", type=lambda text: int(float(text)), default=[10**6, 10**7])
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--work", type=Path, help="where synthetic files go; 10^8 documents need 12 GB")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.what == "tokenize":
        bench_tokenize(args.text, args.tokenizer, args.only, args.repeats)
    elif args.what == "stages":
        bench_stages(args.text, args.tokenizer, args.repeats)
    elif args.what == "loader":
        bench_loader(args.sequence_length)
    elif args.what == "order":
        bench_order()
    else:
        bench_subset(args.documents, args.work)


if __name__ == "__main__":
    main()
