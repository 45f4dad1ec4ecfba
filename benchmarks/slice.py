"""Time and memory of ``minherit inherit``, Hugging Face to Hugging Face, against ``cp`` and ``sync`` of the same bytes.

    python benchmarks/slice.py --work DIR [--repeats 5] [--teacher-layers 6 | --teacher FOLDER] [--layers first:4]

In turn: our command, then ``cp --reflink=never`` of its output and ``sync -f``; both end with durable files; the
source is in the page cache; the first pair is discarded; medians.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

from measuring import append_rows, circumstances, copy_and_sync, run_child, settle, warm
from synthetic import make_checkpoint

from megatron_inherit.arch.presets import preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder on the file system to measure")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--preset", default="llama-2-7b")
    parser.add_argument("--teacher-layers", type=int, default=6)
    parser.add_argument("--teacher", type=Path, help="a Hugging Face folder, instead of a synthetic preset")
    parser.add_argument("--rows", default="slice", help="name of the rows file in benchmarks/results")
    parser.add_argument("--layers", default="first:4")
    parser.add_argument("--more", nargs="*", default=[], help="further options of minherit inherit")
    args = parser.parse_args()
    teacher, name = args.teacher, str(args.teacher)
    if teacher is None:
        config = preset(args.preset).with_layers(args.teacher_layers)
        teacher = make_checkpoint(args.work / f"{args.preset}-{args.teacher_layers}", config)
        name = f"{args.preset} ({args.teacher_layers} layers)"
    student, copy = args.work / "student", args.work / "copy"
    ours, theirs = [], []
    for repeat in range(args.repeats + 1):
        for folder in (student, copy):
            shutil.rmtree(folder, ignore_errors=True)
        warm(sorted(teacher.glob("*.safetensors")))
        settle()
        ours.append(run_child(["inherit", str(teacher), str(student), "--layers", args.layers, *args.more]))
        warm(sorted(student.glob("*.safetensors")))
        settle()
        theirs.append(copy_and_sync(student, copy))
        note = " (discarded)" if repeat == 0 else ""
        print(f"ours {ours[-1]['seconds']:.2f} s, cp + sync {theirs[-1]:.2f} s{note}", flush=True)
    written = sum(path.stat().st_size for path in student.iterdir())
    row = {
        **circumstances("safetensors", "numpy", "xxhash"),
        "command": f"inherit {name} --layers {args.layers} {' '.join(args.more)}",
        "bytes_out": written,
        "ours_s": round(statistics.median(run["seconds"] for run in ours[1:]), 3),
        "cp_sync_s": round(statistics.median(theirs[1:]), 3),
        "ours_whole_s": round(statistics.median(run["whole_s"] for run in ours[1:]), 3),
        "anon_mib": round(max(run["anon_mib"] for run in ours[1:]), 1),
        "rss_mib": round(max(run["rss_mib"] for run in ours[1:]), 1),
        "spread_ours_s": f"{min(r['seconds'] for r in ours[1:]):.2f}-{max(r['seconds'] for r in ours[1:]):.2f}",
        "spread_cp_s": f"{min(theirs[1:]):.2f}-{max(theirs[1:]):.2f}",
    }
    row["ratio"] = round(row["ours_s"] / row["cp_sync_s"], 3)
    print(f"ratio {row['ratio']}; rows in {append_rows(args.rows, [row])}")
    for folder in (student, copy):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
