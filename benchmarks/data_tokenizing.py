"""Tokenizing against the libraries: each case in a fresh process, in turn, on the same documents.

    python benchmarks/data.py tokenize --text FOLDER --tokenizer PATH ...   # FOLDER: what `minherit data ingest` wrote

``call``: after imports, from the text shards on disk to finished, durable ``.bin/.idx`` files; theirs from a list in
memory to ids; ``datasets.map`` opens the tokenizer in each of its processes. ``process``: from fork to exit, with all
that each has to import; ours is the command, theirs reads the texts from the same shards first. CPU seconds count
workers too.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from measuring import append_rows, circumstances

from megatron_inherit.data.giga import choose_encoder
from megatron_inherit.data.ingest import open_documents
from megatron_inherit.data.text_shards import read_batches
from megatron_inherit.data.tokenize import TokenizeOptions, document_table, tokenize, with_ends
from megatron_inherit.data.tokenizer import flatten, open_tokenizer

PR_SET_CHILD_SUBREAPER = 36
RATIOS = (
    ("ours, own, 1 process", "library in memory, 1 thread"),
    ("ours, own, 2 processes", "datasets.map num_proc=2"),
    ("ours, gigatoken, 1 process", "gigatoken in memory, 1 thread"),
    ("ours, gigatoken, 2 processes", "datasets.map num_proc=2"),
)
CASES = tuple(dict.fromkeys(case for pair in RATIOS for case in pair))
FIGURES = {"call_s": "wall of the call", "call_cpu_s": "CPU of the call", "process_s": "wall of the process"} | {
    "process_cpu_s": "CPU of the process"
}


def bench_tokenize(text: Path, tokenizers: list[str], only: list[str], repeats: int) -> None:
    """Rows of every case, of the ratios, and of the stages of one process."""
    size = sum(shard.text_bytes for shard in open_documents(text).shards)
    cases = [case for case in CASES if not only or any(part in case for part in only)]
    for name in tokenizers:
        label = f"{open_tokenizer(name).kind} {Path(name).parent.name}/{Path(name).name}"
        taken: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
        for _ in range(repeats):
            for case in cases:
                taken[case].append(in_a_process(case, text, name))
        middle = {
            case: {figure: statistics.median(one[figure] for one in found) for figure in FIGURES if figure in found[0]}
            for case, found in taken.items()
        }
        rows = []
        for case, found in middle.items():
            note = f"{size} bytes of text in {len(open_documents(text).shards)} shards; medians of {repeats}"
            speed = f"{size / found['call_s'] / 1e6:.4g}"
            rows.append(row("tokenize", f"{label}: {case}", speed, "MB/s", note) | rounded(found))
        for ours, theirs in RATIOS:
            for figure, what in FIGURES.items():
                if figure in middle.get(ours, {}) and figure in middle.get(theirs, {}):
                    ratio = f"{middle[theirs][figure] / middle[ours][figure]:.4g}"
                    rows.append(row("tokenize ratio", f"{label}: {ours} / {theirs}", ratio, f"x ({what})", note))
        publish(rows)


def row(claim: str, case: str, value: str, unit: str, note: str) -> dict[str, Any]:
    return {"claim": claim, "case": case, "value": value, "unit": unit, "note": note}


def rounded(figures: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.3f}" for name, value in figures.items()}


def publish(rows: list[dict[str, Any]]) -> None:
    where = circumstances("numpy", "tokenizers", "sentencepiece", "datasets", "gigatoken")
    append_rows("data_tokenizing", [one | where for one in rows])
    for one in rows:
        print(" | ".join(str(value) for value in one.values()), flush=True)


def in_a_process(case: str, text: Path, tokenizer: str) -> dict[str, float]:
    """Runs a case in a child for the call, and ours a second time as the command for the process."""
    output, wall, cpu = timed([sys.executable, __file__, case, str(text), tokenizer])
    figures = json.loads(output.splitlines()[-1])
    if "processes" in case or "num_proc" in case:
        del figures["call_cpu_s"]
    if "in memory" in case:  # its process reads the texts into memory, which is not its work
        return figures
    if case.startswith("ours"):
        _, backend, workers = case.split(", ")
        with tempfile.TemporaryDirectory(dir=text.parent) as folder:
            words = ["data", "tokenize", str(text), f"{folder}/tokens", "-t", tokenizer, "--backend", backend]
            _, wall, cpu = timed([sys.executable, "-m", "megatron_inherit", *words, "--workers", workers[0]])
    return figures | {"process_s": wall, "process_cpu_s": cpu}


def timed(command: list[str]) -> tuple[str, float, float]:
    """Gives output, wall and CPU seconds; the child's orphans come to this process, so that their time is counted."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    began, before = time.perf_counter(), children_cpu()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    wall = time.perf_counter() - began
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    return output, wall, children_cpu() - before


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read_texts(folder: Path) -> list[str]:
    return [
        text for shard in open_documents(folder).shards for batch in read_batches(folder / shard.name) for text in batch
    ]


@contextlib.contextmanager
def prepared(case: str, text: Path, name: str) -> Iterator[Callable[[], object]]:
    """Yields what the clock runs over; libraries are imported, their inputs in memory and their tables built before."""
    with tempfile.TemporaryDirectory(dir=text.parent) as folder:
        if case.startswith("ours"):
            _, backend, workers = case.split(", ")
            options = TokenizeOptions(tokenizer=name, backend=backend)  # type: ignore[arg-type]
            yield partial(tokenize, text, Path(folder) / "tokens", options, workers=int(workers[0]))
            return
        texts = read_texts(text)
        if case.startswith("gigatoken"):
            yield partial(choose_encoder(open_tokenizer(name), "gigatoken", texts[:8]), texts)
        elif case.startswith("datasets"):
            import datasets

            datasets.disable_progress_bars()
            data = datasets.Dataset.from_dict({"text": texts})
            cache = f"{folder}/mapped.arrow"
            how: dict[str, Any] = {"batched": True, "num_proc": 2, "remove_columns": ["text"]}
            yield partial(data.map, MapTokenizer(name), cache_file_name=cache, **how)
        else:
            yield partial(library(name), texts)


def library(name: str) -> Callable[[list[str]], list[Any]]:
    """Gives the library's own encode, on one thread."""
    own = open_tokenizer(name)
    if own.kind == "sentencepiece":
        import sentencepiece

        return partial(sentencepiece.SentencePieceProcessor(model_file=own.path).encode, num_threads=1)
    from tokenizers import Tokenizer

    opened = Tokenizer.from_str(own.to_json())  # type: ignore[attr-defined]
    return partial(opened.encode_batch_fast, add_special_tokens=False)


class MapTokenizer:
    """The function of ``datasets.map``; opens the library's tokenizer once a process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._encode: Callable[[list[str]], list[Any]] | None = None

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        """Encodes a batch."""
        self._encode = self._encode or library(self._name)
        return {"input_ids": [one if isinstance(one, list) else one.ids for one in self._encode(batch["text"])]}

    def __getstate__(self) -> dict[str, object]:
        return {"_name": self._name, "_encode": None}


def bench_stages(text: Path, tokenizers: list[str], repeats: int) -> None:
    """CPU seconds of each part of tokenizing with gigatoken in one process: what limits it."""
    size = sum(shard.text_bytes for shard in open_documents(text).shards)
    for name in tokenizers:
        label = f"{open_tokenizer(name).kind} {Path(name).parent.name}/{Path(name).name}"
        command = [sys.executable, __file__, "stages", str(text), name]
        found = [json.loads(subprocess.check_output(command, text=True)) for _ in range(repeats)]
        shards = len(open_documents(text).shards)
        note = f"{size} bytes of text in {shards} shards; medians of {repeats}, each in a fresh process"
        rows = []
        for stage in found[0]:
            value = f"{statistics.median(one[stage] for one in found):.4f}"
            rows.append(row("tokenize stages, gigatoken", f"{label}: {stage}", value, "CPU-s", note))
        publish(rows)


def stages(text: Path, name: str) -> dict[str, float]:
    """CPU seconds by stage, in the order a job pays them; then gigatoken's second pass, when its cache is full."""
    out: dict[str, float] = {}
    began = time.process_time()

    def lap(stage: str) -> None:
        nonlocal began
        now = time.process_time()
        out[stage], began = out.get(stage, 0.0) + now - began, time.process_time()

    own, options = open_tokenizer(name), TokenizeOptions(tokenizer=name)
    lap("open the tokenizer")
    import awkward  # noqa: F401  gigatoken gives its ids in one of its arrays
    import gigatoken  # noqa: F401

    lap("once a process: import gigatoken and awkward")
    choose_encoder(own, "gigatoken", ["a"])
    lap("once a process: build gigatoken's tables")
    began = time.process_time()
    for shard in open_documents(text).shards:
        encoder = None
        with open(os.devnull, "wb") as file:
            for batch in read_batches(text / shard.name):
                lap("read JSON lines")
                encoder = encoder or choose_encoder(own, "gigatoken", batch)
                lap("once a shard: compare ids on a sample")
                ids, lengths = encoder(batch)
                lap("gigatoken")
                ids, lengths = with_ends(ids, lengths, own, options)
                file.write(ids.astype("u2").tobytes())
                lap("lay out with EOS")
                document_table(batch)
                lap("hash the documents")
    texts = read_texts(text)
    began = time.process_time()
    encoder = choose_encoder(own, "gigatoken", texts)
    began = time.process_time()
    encoder(texts)
    lap("(gigatoken again, its cache warm)")
    flatten(own.encode_batch(texts))
    lap("(the tokenizer itself)")
    return out


def child(case: str, text: Path, tokenizer: str) -> None:
    if case == "stages":
        print(json.dumps(stages(text, tokenizer)))
        return
    with prepared(case, text, tokenizer) as work:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        print(json.dumps({"call_s": time.perf_counter() - wall, "call_cpu_s": time.process_time() - cpu}))


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    child(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
