"""Processes in which DeepSpeed itself trains a tiny model for two steps and saves what we shall read."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from pathlib import Path
from typing import Any


def run_world(world: int, cases: list[dict[str, Any]], folder: Path, *, timeout: float = 900) -> None:
    """Runs all cases in ``world`` processes over gloo; raises with the first process's traceback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_enter, args=(rank, world, port, cases, str(folder))) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    for process in processes:
        if process.is_alive():
            process.kill()
    failures = sorted(folder.glob("failure.*"))
    assert not failures, failures[0].read_text()
    assert all(process.exitcode == 0 for process in processes)


def _enter(rank: int, world: int, port: int, cases: list[dict[str, Any]], folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    try:
        import deepspeed.ops
        import torch

        torch.set_num_threads(1)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        for case in cases:
            _train(case, rank, world)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        (Path(folder) / f"failure.{rank}").write_text(traceback.format_exc())
        os._exit(1)


def _train(case: dict[str, Any], rank: int, world: int) -> None:
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(case["config"])
    options = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case["dtype"] == "bf16"},
        "zero_optimization": {
            "stage": case["stage"],
            "stage3_param_persistence_threshold": case.get("persistence", 0),
            "sub_group_size": case.get("sub_group_size", 10**9),
        },
        "checkpoint": {"load_universal": bool(case.get("load"))},
    }
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if case["dtype"] == "bf16":
        model.bfloat16()
    plain = [p for p in model.parameters() if p.dim() == 1]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain}], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
    if case.get("load"):
        engine.load_checkpoint(case["load"], tag=case["tag"])
    losses = []
    for step in range(case.get("first", 0), case.get("first", 0) + case.get("steps", 2)):
        generator = torch.Generator().manual_seed(step * 8 + rank)
        tokens = torch.randint(0, config.vocab_size, (1, 8), generator=generator)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / world)
    if case.get("save"):
        engine.save_checkpoint(case["save"], tag=case["tag"])
    if case.get("losses") and rank == 0:
        Path(case["losses"]).write_text(repr(losses))
    engine.destroy()
