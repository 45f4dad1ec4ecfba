"""Time and memory of ``minherit convert`` and of ``--zero-copy``, for the bars of the README.

    python benchmarks/convert.py --work DIR [--cases contiguous tp memory zero-copy mergekit] [--repeats 5]

``contiguous`` and ``tp``: a 7B-shaped checkpoint of at least 6 GB to another format, against ``cp`` and ``sync`` of the
output, in turn. ``transposed``: the same for 12 layers of GPT-2 XL, whose weights Hugging Face stores transposed.
``memory``: peak RssAnon over the imports at 0.5 GB and at 6 GB. ``zero-copy``: torch_dist students by hard links, 7B
and 70B shapes. ``mergekit``: the same slice by mergekit's passthrough in an environment of its own (``--mergekit
PYTHON``), whole processes, side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from measuring import append_rows, circumstances, copy_and_sync, run_child, settle, warm
from synthetic import make_checkpoint, make_sparse

from megatron_inherit.arch.presets import preset

CONTIGUOUS = {
    "hf to hf": ["--format", "hf"],
    "hf to megatron": ["--format", "megatron"],
    "hf to torch_dist": ["--format", "torch_dist"],
}
SPLIT = {
    "hf to megatron tp 2": ["--format", "megatron", "--tp", "2"],
    "hf to torch_dist tp 2": ["--format", "torch_dist", "--tp", "2"],
    "hf to meta tp 2": ["--format", "meta", "--tp", "2"],
}


TRANSPOSED = {
    "hf to hf": ["--format", "hf"],
    "hf to megatron": ["--format", "megatron"],
}


def paired(name: str, source: Path, words: list[str], work: Path, repeats: int) -> dict[str, Any]:
    """Measures our command and ``cp`` of its output in turn."""
    ours, theirs, out, copy = [], [], work / "out", work / "copy"
    for _ in range(repeats + 1):
        for folder in (out, copy):
            shutil.rmtree(folder, ignore_errors=True)
        warm(sorted(path for path in source.rglob("*") if path.is_file()))
        settle()
        ours.append(run_child(["convert", str(source), str(out), *words, "--json"]))
        warm(sorted(path for path in out.rglob("*") if path.is_file()))
        settle()
        theirs.append(copy_and_sync(out, copy))
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    for folder in (out, copy):
        shutil.rmtree(folder, ignore_errors=True)
    seconds, other = statistics.median(run["seconds"] for run in ours[1:]), statistics.median(theirs[1:])
    row = {
        "case": name,
        "bytes_out": written,
        "ours_s": round(seconds, 3),
        "cp_sync_s": round(other, 3),
        "ratio": round(seconds / other, 3),
        "ours_whole_s": round(statistics.median(run["whole_s"] for run in ours[1:]), 3),
        "bytes_read_ratio": round(max(run["bytes_read"] / run["bytes_to_read"] for run in ours[1:]), 4),
        "anon_mib": round(max(run["anon_mib"] for run in ours[1:]), 1),
        "rss_mib": round(max(run["rss_mib"] for run in ours[1:]), 1),
        "spread_ours_s": _spread([run["seconds"] for run in ours[1:]]),
        "spread_cp_s": _spread(theirs[1:]),
    }
    print(row, flush=True)
    return row


def _spread(seconds: list[float]) -> str:
    return f"{min(seconds):.2f}-{max(seconds):.2f}"


def memory(work: Path) -> Iterator[dict[str, Any]]:
    """Measures memory at two sizes of the same width."""
    shape = preset("llama-2-7b")
    for config in (dataclasses.replace(shape.with_layers(1), vocab_size=8000), shape.with_layers(14)):
        source = make_checkpoint(work / f"llama-2-7b-{config.num_layers}", config)
        for name, words in (CONTIGUOUS | SPLIT).items():
            shutil.rmtree(work / "out", ignore_errors=True)
            run = run_child(["convert", str(source), str(work / "out"), *words])
            size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
            case = f"memory, {name}"
            row = {
                "case": case,
                "bytes_in": size,
                "anon_mib": round(run["anon_mib"], 1),
                "rss_mib": round(run["rss_mib"]),
            }
            print(row, flush=True)
            yield row
    shutil.rmtree(work / "out", ignore_errors=True)


def zero_copy(work: Path) -> list[dict[str, Any]]:
    """Slices torch_dist checkpoints by links; the 70B one is sparse, as its bytes are never read."""
    rows = []
    for name, tp, layers in (("llama-2-7b", 1, "first:8"), ("llama-2-70b", 8, "first:20")):
        source, out = make_sparse(work / f"{name}-sparse", preset(name), tp=tp), work / "linked"
        seconds = []
        for _ in range(4):
            shutil.rmtree(out, ignore_errors=True)
            words = ["inherit", str(source), str(out), "--layers", layers, "--format", "torch_dist", "--zero-copy"]
            seconds.append(run_child(words)["seconds"])
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.stat().st_nlink == 1)
        row = {"case": f"zero-copy, {name} tp {tp}, {layers}", "ours_s": round(statistics.median(seconds[1:]), 3)}
        rows.append(row | {"bytes_out": written})
        print(rows[-1], flush=True)
        shutil.rmtree(out, ignore_errors=True)
    return rows


def mergekit(work: Path, python: str, layers: int, depth: int, repeats: int) -> dict[str, Any]:
    """Makes the same slice by mergekit and by us, whole processes in turn, and compares the tensors."""
    teacher = make_checkpoint(work / f"llama-2-7b-{depth}", preset("llama-2-7b").with_layers(depth))
    recipe = work / "passthrough.yml"
    source = {"model": str(teacher), "layer_range": [0, layers]}
    recipe.write_text(
        json.dumps({"merge_method": "passthrough", "dtype": "bfloat16", "slices": [{"sources": [source]}]})
    )
    ours_out, theirs_out = work / "ours", work / "theirs"
    ours, theirs, ours_start, theirs_start = [], [], [], []
    for _ in range(repeats + 1):
        for folder in (ours_out, theirs_out):
            shutil.rmtree(folder, ignore_errors=True)
        warm(sorted(teacher.glob("*.safetensors")))
        settle()
        ours.append(run_child(["inherit", str(teacher), str(ours_out), "--layers", f"first:{layers}"]))
        ours_start.append(ours[-1]["whole_s"] - ours[-1]["seconds"])
        settle()
        words = [str(recipe), str(theirs_out), "--no-copy-tokenizer"]
        theirs.append(_other([python, "-m", "mergekit.scripts.run_yaml", *words]))
        theirs_start.append(_other([python, "-m", "mergekit.scripts.run_yaml", "--help"])[0])
    subprocess.run([sys.executable, "-m", "megatron_inherit", "verify", str(ours_out), str(theirs_out)], check=True)
    own, other = statistics.median(run["whole_s"] for run in ours[1:]), statistics.median(run[0] for run in theirs[1:])
    bare = statistics.median(run["seconds"] for run in ours[1:]), other - statistics.median(theirs_start[1:])
    row = {
        "case": f"slice {layers} of {depth} layers, mergekit passthrough beside it",
        "bytes_out": sum(path.stat().st_size for path in ours_out.glob("*.safetensors")),
        "ours_whole_s": round(own, 3),
        "mergekit_whole_s": round(other, 3),
        "ratio": round(other / own, 2),
        "ratio_without_start": round(bare[1] / bare[0], 2),
        "rss_mib": round(max(run["rss_mib"] for run in ours[1:])),
        "mergekit_rss_mib": round(max(run[1] for run in theirs[1:])),
    }
    print(row, flush=True)
    for folder in (ours_out, theirs_out):
        shutil.rmtree(folder, ignore_errors=True)
    return row


def _other(command: list[str]) -> tuple[float, float]:
    """Runs a foreign program; gives seconds and peak RSS in MiB."""
    began = time.perf_counter()
    timed = [sys.executable, "-c", _WATCH, *command]
    output = subprocess.run(timed, check=True, capture_output=True, text=True).stdout
    return time.perf_counter() - began, int(output.splitlines()[-1]) / 1024


_WATCH = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder on the file system to measure")
    parser.add_argument("--cases", nargs="+", default=["contiguous", "tp", "memory", "zero-copy"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="takes only the conversion of this name")
    parser.add_argument("--layers", type=int, default=14, help="14 layers of the 7B shape are 6.2 GB")
    parser.add_argument("--mergekit", default="", help="Python of an environment with mergekit")
    args = parser.parse_args()
    kinds = {"contiguous": CONTIGUOUS, "tp": SPLIT}
    for case in args.cases:
        rows: Iterable[dict[str, Any]] = []
        if case in kinds:
            shape = preset("llama-2-7b").with_layers(args.layers)
            source = make_checkpoint(args.work / f"llama-2-7b-{args.layers}", shape)
            rows = (
                paired(name, source, words, args.work, args.repeats)
                for name, words in kinds[case].items()
                if args.only in ("", name)
            )
        elif case == "transposed":
            source = make_checkpoint(args.work / "gpt2-xl-12", preset("gpt2-xl").with_layers(12), dtype="F32")
            rows = (
                paired(f"gpt2-xl, {name}", source, words, args.work, args.repeats)
                for name, words in TRANSPOSED.items()
                if args.only in ("", name)
            )
        elif case == "memory":
            rows = memory(args.work)
        elif case == "zero-copy":
            rows = zero_copy(args.work)
        elif case == "mergekit":
            rows = (
                mergekit(args.work, args.mergekit, n, depth, args.repeats)
                for n, depth in ((4, 6), (13, 14))
                if args.only in ("", f"{n} of {depth}")
            )
        for row in rows:
            print(append_rows("convert", [circumstances("safetensors", "numpy", "xxhash") | row]))


if __name__ == "__main__":
    main()
