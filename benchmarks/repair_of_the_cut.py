"""Zero-shot loss of cuts of a teacher, plain and with each repair, on held-out windows of Python's reference.

    python benchmarks/repair_of_the_cut.py TEACHER --blocks 15 --label "SmolLM2-135M-Instruct, dequantised from Q4_1"
    python benchmarks/repair_of_the_cut.py TEACHER --blocks 15 --label "..." --seeds 1 2 3 --keep-last

Every repair of a cut is fitted on the same windows; the teacher's states are computed once. With --seeds each seed
draws its windows to fit on from four times as many, and all are scored on the same others. Appends rows to
benchmarks/results/repair_of_the_cut.csv, or with seeds to repair_seeds.csv beside it.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import platform
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_inherit.eval.calibration import sample_windows
from megatron_inherit.eval.cut import Cut
from megatron_inherit.eval.hf_folder import load_model, load_tokenizer
from megatron_inherit.eval.repair import Repair, keep_last, refit_final_norm, refit_head, rescale_blocks

RESULTS = Path(__file__).parent / "results"
POOL = 4
"""Times as many windows as are fitted on from which a seed draws."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--blocks", type=int, required=True, help="Blocks of the student.")
    parser.add_argument("--label", required=True, help="What the teacher is.")
    parser.add_argument("--text", type=Path, help="Default: Python's language reference.")
    parser.add_argument("--sequences", type=int, default=12, help="Windows to fit on; a third as many are held out.")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="Draws of the windows to fit on.")
    parser.add_argument("--keep-last", type=int, nargs="*", default=[1, 2], help="Last blocks kept in further cuts.")
    options = parser.parse_args()
    model = load_model(options.teacher)
    held_out, draws = windows_of(options)
    depth, first = model.config.num_hidden_layers, tuple(range(options.blocks))
    teacher = Cut(model, range(depth))
    shared: dict[str, object] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "teacher": options.label,
        "text": options.text.name if options.text else "pydoc_data.topics",
        "fit_tokens": options.sequences * (options.tokens - 1),
        "held_out_tokens": held_out.shape[0] * (held_out.shape[1] - 1),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, shared",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    write = functools.partial(
        record, RESULTS / ("repair_seeds.csv" if options.seeds else "repair_of_the_cut.csv"), shared
    )
    seeded: dict[str, object] = {"seed": ""} if options.seeds else {}
    write(seeded, f"all {depth}", "teacher", teacher.loss(held_out), 0.0)
    write(seeded, "none", "uniform guess", math.log(model.config.vocab_size), 0.0)
    choices = {f"first:{options.blocks}": first}
    choices |= {f"first:{options.blocks - m} + last:{m}": keep_last(first, m, depth) for m in options.keep_last}
    for seed, fitted in draws.items():
        y = teacher.teacher_states(fitted)
        for name, layers in choices.items():
            for repair, loss, seconds in repaired(model, layers, fitted, held_out, y, gap=layers != first):
                write(seeded and {"seed": seed}, name, repair, loss, seconds)


def windows_of(options: argparse.Namespace) -> tuple[torch.Tensor, dict[int | None, torch.Tensor]]:
    """Gives the windows that are scored, and those to fit on by seed; None without seeds."""
    held, wanted = options.sequences // 3, options.sequences
    pool = wanted * (POOL if options.seeds else 1)
    windows = sample_windows(
        load_tokenizer(options.teacher), options.text, sequences=pool + held, tokens=options.tokens
    )
    step = len(windows) // held
    rest = windows[[i for i in range(len(windows)) if (i + 1) % step or i >= step * held]]
    draws: dict[int | None, torch.Tensor] = {None: rest} if not options.seeds else {}
    for seed in options.seeds:
        draws[seed] = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:wanted]]
    return windows[step - 1 :: step][:held], draws


def repaired(
    model: Any, layers: Sequence[int], fitted: torch.Tensor, held_out: torch.Tensor, y: torch.Tensor, *, gap: bool
) -> Iterator[tuple[str, float, float]]:
    """Yields name, held-out loss and seconds of the fit for the plain cut and each of its repairs."""
    cut = Cut(model, layers)
    yield "none", cut.loss(held_out), 0.0
    began = time.perf_counter()
    x = cut.student_states(fitted)
    seen = time.perf_counter() - began
    for name, refit in (("final-norm", refit_final_norm), ("affine", refit_head)):
        cut, began = Cut(model, layers), time.perf_counter()
        refit(cut, x, y, Repair(tuple(layers)))
        seconds = seen + time.perf_counter() - began
        yield name, cut.loss(held_out), seconds
    if gap:
        cut, began = Cut(model, layers), time.perf_counter()
        rescale_blocks(cut, fitted, Repair(tuple(layers)))
        seconds = time.perf_counter() - began
        yield "block-scale", cut.loss(held_out), seconds
        began = time.perf_counter()
        refit_final_norm(cut, cut.student_states(fitted), y, Repair(tuple(layers)))
        seconds += time.perf_counter() - began
        yield "block-scale,final-norm", cut.loss(held_out), seconds


def record(
    path: Path,
    shared: dict[str, object],
    seed: dict[str, object],
    layers: str,
    repair: str,
    loss: float,
    seconds: float,
) -> None:
    values = {"layers": layers, "repair": repair, "loss_nats": f"{loss:.4f}", "fit_seconds": f"{seconds:.1f}"}
    row = {**shared, **seed, **values}
    print(f"{layers:22s} {repair:24s} {loss:8.3f} nats  {seconds:6.1f} s", flush=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
