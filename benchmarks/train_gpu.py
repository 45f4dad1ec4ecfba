"""The arms of ``train.py gpu``: our engines and the Hugging Face trainer on one model, in the same data order."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import train

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.engines.base import EngineOptions

WARM_UP, PROFILED = 3, 2
PARTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("flash", "fmha", "sdpa", "attention", "cudnn_generated_fort"),
    "loss": ("cross_entropy", "softmax", "nll", "linear_kl", "row_pass", "_rows"),
    "norms": ("norm",),
    "rope_and_activation": ("rope", "swiglu", "silu", "gelu"),
    "optimizer": ("adam", "multi_tensor", "lpnorm", "foreach"),
    "communication": ("nccl", "c10d", "gloo"),
    "matmul": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "::mm", "addmm", "bmm", "matmul"),
}
"""Part of a step -> what its kernels' names contain; the first part that matches takes a kernel."""

Outcome = tuple[float, dict[str, float]]
"""Median seconds of a step, and each part's share of the time; ``idle`` is the device's time without a kernel."""


@dataclass(frozen=True)
class Run:
    """What an arm trains.

    Attributes:
        config: The model.
        batch, micro_batch: Sequences of a step and of a forward pass.
        length: Tokens of a sequence.
        steps: Timed steps, after the warm-up.
    """

    config: ModelConfig
    batch: int
    micro_batch: int
    length: int
    steps: int


def synchronize() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def part_of(kernel: str) -> str:
    """Names the part of a step that a kernel belongs to."""
    name = kernel.lower()
    return next((part for part, marks in PARTS.items() if any(mark in name for mark in marks)), "other")


def shares_of(profile: Any, wall_s: float) -> dict[str, float]:
    """Sums the time of kernels (of operators on a CPU) by part, as shares of the wall time."""
    cuda = torch.cuda.is_available()
    shares = dict.fromkeys((*PARTS, "other"), 0.0)
    for event in profile.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        shares[part_of(event.key)] += spent / 1e6 / wall_s
    return shares | {"idle": max(0.0, 1.0 - sum(shares.values()))}


def measure(step: train.Arm, run: Run) -> Outcome:
    """Warms up, times steps one by one and profiles two more."""
    batches = [train.random_batch(run.config, run.batch, run.length, index) for index in range(4)]
    for index in range(WARM_UP):
        step(batches[index % 4])
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = []
    for index in range(run.steps):
        began = time.perf_counter()
        step(batches[index % 4])
        synchronize()
        times.append(time.perf_counter() - began)
    with torch.profiler.profile() as profile:
        began = time.perf_counter()
        for index in range(PROFILED):
            step(batches[index % 4])
        synchronize()
        wall = time.perf_counter() - began
    return sorted(times)[len(times) // 2], shares_of(profile, wall)


def engine(kind: str, **more: Any) -> Callable[[Run], Outcome]:
    """Gives the arm of one of our engines."""

    def arm(run: Run) -> Outcome:
        options = EngineOptions(micro_batch=run.micro_batch, dtype="bf16", **more)
        return measure(train.engine_arm(kind, options, run.config), run)

    return arm


def trainer(run: Run) -> Outcome:
    """transformers.Trainer: bf16 weights' autocast, SDPA, fused AdamW, Liger kernels where they are installed."""
    from importlib.util import find_spec

    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []
    shares: dict[str, float] = {}

    class Watch(TrainerCallback):
        """Times steps and profiles the last ones."""

        profile: Any = None
        began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARM_UP and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            if state.global_step == WARM_UP + run.steps:
                self.profile = torch.profiler.profile()
                self.profile.__enter__()
                self.profile_began = time.perf_counter()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            synchronize()
            if WARM_UP < state.global_step <= WARM_UP + run.steps:
                times.append(time.perf_counter() - self.began)
            if state.global_step == WARM_UP + run.steps + PROFILED:
                wall = time.perf_counter() - self.profile_began
                self.profile.__exit__(None, None, None)
                shares.update(shares_of(self.profile, wall))

    class Data(torch.utils.data.Dataset):
        """The batches of ``measure``, sequence by sequence."""

        def __len__(self) -> int:
            return run.batch * (WARM_UP + run.steps + PROFILED)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            batch = train.random_batch(run.config, run.batch, run.length, index // run.batch % 4)
            tokens = torch.from_numpy(batch.tokens[index % run.batch])
            return {"input_ids": tokens, "labels": tokens}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=run.micro_batch,
            gradient_accumulation_steps=run.batch // run.micro_batch,
            max_steps=WARM_UP + run.steps + PROFILED,
            learning_rate=1e-4,
            adam_beta2=0.95,
            weight_decay=0.1,
            optim="adamw_torch_fused",
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            use_liger_kernel=torch.cuda.is_available() and find_spec("liger_kernel") is not None,
            dataloader_num_workers=4 if torch.cuda.is_available() else 0,
            logging_steps=10**9,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = LlamaForCausalLM(train.transformers_config(run.config))
        model.config.use_cache = False
        loop = Trainer(model=model, args=arguments, train_dataset=Data(), callbacks=[Watch()])
        loop._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(loop.train_dataset)
        loop.train()
    return sorted(times)[len(times) // 2], shares


ARMS: dict[str, Callable[[Run], Outcome]] = {
    "megatron": engine("megatron"),
    "deepspeed": engine("deepspeed", zero_stage=1),
    "trainer": trainer,
}
