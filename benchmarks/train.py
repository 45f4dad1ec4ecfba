"""Training speed: our engines against plain loops on a CPU, against the Hugging Face trainer on a GPU.

    python benchmarks/train.py cpu                     # 10M-parameter LLaMA, fp32; rows in results/train_cpu.csv
    python benchmarks/train.py gpu                     # 13-layer OpenLLaMA-3B, bf16; rows in results/train_gpu.csv
    python benchmarks/train.py gpu --toy               # the same code at toy size on any machine; writes no row

On a CPU the arms take turns in one process, so that a busy machine slows all of them, and both wall and processor time
are reported. On a GPU each arm runs in a process of its own, after a warm-up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import append_rows, circumstances

from megatron_inherit.arch.counts import count_parameters, flops_per_token, peak_flops
from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.presets import preset
from megatron_inherit.data.loader import Batch
from megatron_inherit.engines.base import EngineOptions

PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers", "triton", "liger-kernel")
TEN_MILLION = dataclasses.replace(
    preset("llama-tiny"),
    num_layers=6,
    hidden_size=320,
    num_heads=5,
    num_kv_heads=5,
    head_dim=64,
    ffn_size=864,
    vocab_size=4096,
    max_positions=256,
)
STUDENT = preset("openllama-3b").with_layers(13)
TOY = dataclasses.replace(
    STUDENT, num_layers=2, hidden_size=200, num_heads=2, num_kv_heads=2, ffn_size=512, vocab_size=512
)
Arm = Callable[[Batch], float]
"""Trains one step on a batch and gives its loss."""


def random_batch(config: ModelConfig, sequences: int, length: int, step: int) -> Batch:
    """Gives the batch of a step, the same for all arms."""
    tokens = np.random.default_rng(step).integers(0, config.vocab_size, (sequences, length + 1))
    mask = np.ones((sequences, length), dtype=bool)
    return Batch(tokens=tokens[:, :-1], labels=tokens[:, 1:], loss_mask=mask, sample_ids=np.arange(sequences))


def transformers_config(config: ModelConfig) -> Any:
    """Gives transformers' LlamaConfig of the same shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied,
    )


def plain_arm(config: ModelConfig, micro_batch: int) -> Arm:
    """The plain loop: transformers, AdamW of torch (fused), clipping, gradient accumulation."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(transformers_config(config)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batch: Batch) -> float:
        pieces = len(batch) // micro_batch
        total = 0.0
        for start in range(0, len(batch), micro_batch):
            piece = batch.select(start, start + micro_batch)
            logits = model(torch.from_numpy(piece.tokens), use_cache=False).logits
            labels = torch.from_numpy(piece.labels)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) / pieces
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def deepspeed_script_arm(config: ModelConfig, micro_batch: int) -> Arm:
    """DeepSpeed's own minimal script, ZeRO-1, on transformers' model."""
    from transformers import LlamaForCausalLM

    from megatron_inherit.engines.deepspeed.config import import_deepspeed

    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, dist_init_required=False)
    model = LlamaForCausalLM(transformers_config(config)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(batch: Batch) -> float:
        pieces = len(batch) // micro_batch
        total = 0.0
        for start in range(0, len(batch), micro_batch):
            piece = batch.select(start, start + micro_batch)
            engine.set_gradient_accumulation_boundary(start + micro_batch == len(batch))
            logits = engine(torch.from_numpy(piece.tokens), use_cache=False).logits
            labels = torch.from_numpy(piece.labels)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) / pieces
            engine.backward(loss, scale_wrt_gas=False)
            total += loss.item()
        engine.step()
        return total

    return step


def engine_arm(kind: str, options: EngineOptions, config: ModelConfig) -> Arm:
    """One of our engines."""
    from megatron_inherit.engines.create import create_engine

    engine = create_engine(kind, options, config, seed=0)  # type: ignore[arg-type]
    size = options.micro_batch

    def step(batch: Batch) -> float:
        pieces = [batch.select(start, start + size) for start in range(0, len(batch), size)]
        return engine.train_step(pieces, lr=1e-4).loss

    return step


def run_cpu(args: argparse.Namespace) -> None:
    """Times all arms in turns and appends one row an arm."""
    config, micro = TEN_MILLION, args.batch // 2
    arms = {
        "plain transformers loop": plain_arm(config, micro),
        "engine=megatron": engine_arm("megatron", EngineOptions(micro_batch=micro), config),
        "engine=deepspeed (ZeRO-1)": engine_arm("deepspeed", EngineOptions(micro_batch=micro), config),
        "DeepSpeed's minimal script (ZeRO-1)": deepspeed_script_arm(config, micro),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for round_ in range(args.rounds + 1):
        batch = random_batch(config, args.batch, args.length, round_)
        for name, arm in arms.items():
            wall, processor = time.perf_counter(), time.process_time()
            arm(batch)
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    where = circumstances(*PACKAGES)
    base = times["plain transformers loop"][1:]
    rows = []
    for name, measured in times.items():
        found = measured[1:]  # the first round warms up
        wall = statistics.median(b[0] / f[0] for b, f in zip(base, found, strict=True))
        processor = statistics.median(b[1] / f[1] for b, f in zip(base, found, strict=True))
        tokens = args.batch * args.length
        rows.append(
            {
                "arm": name,
                "parameters": count_parameters(config),
                "batch": f"{args.batch}x{args.length}",
                "threads": torch.get_num_threads(),
                "rounds": args.rounds,
                "tokens_per_s": round(tokens / statistics.median(f[0] for f in found), 1),
                "tokens_per_cpu_s": round(tokens / statistics.median(f[1] for f in found), 1),
                "ratio_wall": round(wall, 3),
                "ratio_cpu": round(processor, 3),
            }
            | where
        )
        print(
            f"{name}: {rows[-1]['tokens_per_s']} tokens/s, {wall:.3f} of the plain loop ({processor:.3f} by CPU time)"
        )
    append_rows("train_cpu", rows)


def run_gpu(args: argparse.Namespace) -> None:
    """Runs each arm in its own process and appends one row an arm."""
    if not args.toy and not torch.cuda.is_available():
        print("train.py gpu needs one CUDA GPU with 80 GB of memory or more; --toy runs the same code anywhere.")
        print("pip install 'megatron-inherit[megatron,deepspeed,kernels,hf,rivals]' brings all arms.")
        raise SystemExit(2)
    rows = []
    for arm in args.arms:
        words = [sys.executable, __file__, "gpu-arm", arm, *(["--toy"] if args.toy else []), "--steps", str(args.steps)]
        words += ["--micro-batch", str(args.micro_batch), "--batch", str(args.batch), "--length", str(args.length)]
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "row.json"
            subprocess.run([*words, "--output", str(output)], check=True)
            rows.append(json.loads(output.read_text()) | circumstances(*PACKAGES))
        print(json.dumps(rows[-1], indent=1))
    speeds = {row["arm"]: row["tokens_per_s"] for row in rows}
    if "trainer" in speeds and "megatron" in speeds:
        print(f"megatron engine / Hugging Face trainer: {speeds['megatron'] / speeds['trainer']:.2f}")
    if args.toy:
        print("No row was written: this is no GPU measurement.")
        return
    append_rows("train_gpu", rows)


def run_gpu_arm(args: argparse.Namespace) -> None:
    """Measures one arm: tokens/s, MFU by both formulas, peak memory, share of time by part."""
    import train_gpu

    config = TOY if args.toy else STUDENT
    run = train_gpu.Run(config, args.batch, args.micro_batch, args.length, args.steps)
    seconds, shares = train_gpu.ARMS[args.arm](run)
    speed = args.batch * args.length / seconds
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "cpu"
    peak = peak_flops(device) if cuda else None
    row: dict[str, Any] = {
        "arm": args.arm,
        "device": device,
        "parameters": count_parameters(config),
        "batch": f"{args.batch}x{args.length}",
        "micro_batch": args.micro_batch,
        "step_s": round(seconds, 4),
        "tokens_per_s": round(speed, 1),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else "",
        "peak_tflops": peak / 1e12 if peak else "",
    }
    for formula in ("palm", "causal"):
        flops = speed * flops_per_token(config, args.length, formula)  # type: ignore[arg-type]
        row[f"tflops_{formula}"] = round(flops / 1e12, 3)
        row[f"mfu_{formula}"] = round(flops / peak, 4) if peak else ""
    row |= {f"share_{part}": round(share, 4) for part, share in shares.items()}
    Path(args.output).write_text(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu")
    cpu.add_argument("--batch", type=int, default=16)
    cpu.add_argument("--length", type=int, default=256)
    cpu.add_argument("--rounds", type=int, default=7)
    cpu.set_defaults(run=run_cpu)
    gpu = commands.add_parser("gpu")
    gpu.add_argument("--arms", nargs="+", default=["megatron", "deepspeed", "trainer"])
    arm = commands.add_parser("gpu-arm")
    arm.add_argument("arm")
    arm.add_argument("--output", required=True)
    for one, run in ((gpu, run_gpu), (arm, run_gpu_arm)):
        one.add_argument("--toy", action="store_true")
        one.add_argument("--steps", type=int, default=20)
        one.add_argument("--micro-batch", type=int, default=8)
        one.add_argument("--batch", type=int, default=64)
        one.add_argument("--length", type=int, default=2048)
        one.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
