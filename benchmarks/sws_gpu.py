"""Measures on a GPU what a stage of shared weights saves and costs, and what the fused divergence saves.

    python benchmarks/sws_gpu.py           # one CUDA GPU with 80 GB or more; rows in benchmarks/results/sws_gpu.csv
    python benchmarks/sws_gpu.py --cpu     # all of it but speed on a CPU with 24 GB; rows in .../sws_cpu_width.csv
    python benchmarks/sws_gpu.py --toy     # the same code, tiny, on any machine; writes no row

One stage of four layers at LLaMA-2-7B's width against four layers of their own: sequences of 4096 tokens in bf16,
whole blocks recomputed, each arm in a process of its own. Expected: 3 x 18 bytes a parameter of a layer less (weight,
fp32 gradient, master, two moments) within 5%, tokens/s within 3%. The divergence of two heads of 32,000 tokens over
8192 rows, fused against whole logits: equal within 1e-3, at most 55% of the peak memory, gradients included.

On a CPU a step has one sequence of 512 tokens and the vocabulary 1024 tokens (what a stage saves depends on neither),
and the divergence runs in Triton's interpreter, in the chunks of a GPU; that one truncates to bf16, so that the norm of
its gradients comes out 0.27% small. Memory is then the largest resident set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from measuring import append_rows, circumstances

LAYERS, BYTES, CPU_VOCAB = 4, 18, 1024
SIZES = {
    "gpu": {"length": 4096, "pieces": 8, "warm_up": 3, "steps": 10, "rows": 8192, "width": 1024, "vocab": 32000},
    "cpu": {"length": 512, "pieces": 1, "warm_up": 1, "steps": 3, "rows": 8192, "width": 1024, "vocab": 32000},
    "toy": {"length": 32, "pieces": 2, "warm_up": 1, "steps": 2, "rows": 48, "width": 32, "vocab": 96},
}
ARMS = ("shared", "unshared", "divergence")


def measure_stage(arm: str, size: dict[str, int], *, toy: bool) -> list[dict[str, Any]]:
    """Trains a few steps and gives tokens/s and the largest memory held after the first ones."""
    import torch
    import train

    from megatron_inherit.arch.presets import preset
    from megatron_inherit.engines.base import EngineOptions
    from megatron_inherit.sharing.options import Sharing
    from megatron_inherit.sharing.stage_plan import contiguous
    from megatron_inherit.sharing.tensors import count_shared

    config, plan = preset("llama-tiny" if toy else "llama-2-7b").with_layers(LAYERS), contiguous((LAYERS,))
    if not torch.cuda.is_available():
        config = dataclasses.replace(config, vocab_size=CPU_VOCAB)
    sharing = Sharing(plan=plan) if arm == "shared" else None
    options = EngineOptions(dtype="fp32" if toy else "bf16", recompute="full", sharing=sharing)
    step = train.engine_arm("megatron", options, config)
    batches = [train.random_batch(config, size["pieces"], size["length"], seed) for seed in range(4)]
    times = []
    for index in range(size["warm_up"] + size["steps"]):
        if index == size["warm_up"]:
            peak(reset=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        step(batches[index % 4])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    times = sorted(times[size["warm_up"] :])
    counts = count_shared(config, plan)
    row = {"arm": arm, "tokens_per_s": round(size["pieces"] * size["length"] / times[len(times) // 2], 2)}
    expected = (LAYERS - 1) * counts.layer * BYTES
    return [row | {"peak_bytes": peak(), "layer_parameters": counts.layer, "expected_saving_bytes": expected}]


def measure_divergence(size: dict[str, int], *, toy: bool) -> list[dict[str, Any]]:
    """Gives value, gradients' largest difference and peak memory of the fused divergence and of whole logits."""
    import torch

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.float32 if toy else torch.bfloat16
    if device == "cpu":
        os.environ.update(TRITON_INTERPRET="1", MINHERIT_KERNELS="triton")
    from megatron_inherit.kernels import dispatch
    from megatron_inherit.kernels import head as chunks

    chunks.BUFFER_BYTES["cpu"] = chunks.BUFFER_BYTES["cuda"]
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype) * scale

    hidden, teacher = draw(size["rows"], size["width"]).requires_grad_(), draw(size["rows"], size["width"])
    head = draw(size["vocab"], size["width"], scale=0.05).requires_grad_()
    teacher_head = draw(size["vocab"], size["width"], scale=0.05)

    def whole() -> torch.Tensor:
        log_q, log_p = (
            torch.log_softmax((h @ w.t()).float(), -1) for h, w in ((hidden, head), (teacher, teacher_head))
        )
        return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def fused() -> torch.Tensor:
        return dispatch.linear_kl(hidden, head, teacher, teacher_head).mean()

    rows = []
    for name, run in (("fused", fused), ("whole logits", whole)):
        if device == "cuda":
            torch.autograd.grad(run(), (hidden, head))  # compiles, and fills the caches of the libraries
        before = peak(reset=True)
        began = time.perf_counter()
        loss = run()
        gradients = torch.autograd.grad(loss, (hidden, head))
        value = float(loss)
        rows.append({"arm": name, "loss": value, "seconds": round(time.perf_counter() - began, 5)})
        rows[-1] |= {"peak_bytes": peak() - before}
        rows[-1] |= {"gradient_norm": float(torch.stack([one.float().norm() for one in gradients]).norm())}
    return rows


def peak(*, reset: bool = False) -> int:
    """Gives the most bytes held on the GPU, or resident without one; ``reset`` starts from what is held now."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def verdicts(rows: list[dict[str, Any]], *, toy: bool) -> list[str]:
    """Compares what was measured with what is expected; a toy's memory is its libraries'."""
    found = {row["arm"]: row for row in rows}
    shared, unshared = found["shared"], found["unshared"]
    said = [
        f"tokens/s shared / unshared: {shared['tokens_per_s'] / unshared['tokens_per_s']:.3f} (expected 0.97 to 1.03)"
    ]
    if not toy:
        saved = unshared["peak_bytes"] - shared["peak_bytes"]
        share = saved / shared["expected_saving_bytes"]
        said.append(f"saved {saved / 1e9:.2f} GB: {share:.3f} of what is expected (0.95 to 1.05)")
    fused, whole = found["fused"], found["whole logits"]
    said.append(f"divergence fused / whole: {fused['loss'] / whole['loss']:.6f} (expected within 1e-3 of 1)")
    said.append(f"norm of gradients fused / whole: {fused['gradient_norm'] / whole['gradient_norm']:.6f}")
    if not toy:
        said.append(f"peak fused / whole: {fused['peak_bytes'] / whole['peak_bytes']:.3f} (expected at most 0.55)")
    return said


def main() -> int:
    """Runs each arm in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", dest="size", action="store_const", const="cpu", default="gpu")
    parser.add_argument("--toy", dest="size", action="store_const", const="toy")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    toy = options.size == "toy"
    if options.arm:
        measure = measure_divergence if options.arm == "divergence" else partial(measure_stage, options.arm)
        options.output.write_text(json.dumps(measure(SIZES[options.size], toy=toy)))
        return 0
    import torch

    if options.size == "gpu" and not torch.cuda.is_available():
        print("sws_gpu.py needs one CUDA GPU with 80 GB of memory or more; --cpu measures all but speed without one,")
        print("--toy runs the same code anywhere.")
        return 2
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for arm in ARMS:
            output = Path(folder) / f"{arm}.json"
            size = [] if options.size == "gpu" else [f"--{options.size}"]
            subprocess.run([sys.executable, __file__, "--arm", arm, "--output", str(output), *size], check=True)
            rows += json.loads(output.read_text())
    for row in rows:
        print(json.dumps(row))
    print("\n".join(verdicts(rows, toy=toy)))
    if toy:
        print("No row was written: this is no measurement.")
        return 0
    common = circumstances("torch", "megatron-core", "triton") | {"device": device}
    name = "sws_gpu" if options.size == "gpu" else "sws_cpu_width"
    print(append_rows(name, [row | common for row in rows]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
