"""Several processes over gloo that run many engine cases one after another, because imports cost more than cases."""

from __future__ import annotations

import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.multiprocessing as mp

from megatron_inherit.arch.model_config import ModelConfig, Rope
from megatron_inherit.data.loader import Batch

GLOBAL_BATCH, SEQUENCE, VOCAB, LAYERS = 8, 16, 97, 8
_SHAPE: dict[str, Any] = {
    "num_layers": LAYERS,
    "hidden_size": 32,
    "num_heads": 4,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_positions": SEQUENCE,
}
MODELS = {
    "llama": ModelConfig(
        family="llama", **_SHAPE, num_kv_heads=2, ffn_size=64, norm_eps=1e-6, tied=False, rope=Rope(theta=1000.0)
    ),
    "gpt2": ModelConfig(
        family="gpt2",
        **_SHAPE,
        num_kv_heads=4,
        ffn_size=128,
        norm_eps=1e-5,
        tied=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        norm_bias=True,
    ),
}


def global_batch(step: int, *, masked: bool = True) -> Batch:
    """Gives the global batch of a step: tokens that mostly follow a rule, a few of them not counted."""
    random = np.random.default_rng(step)
    tokens = random.integers(0, VOCAB // 8, (GLOBAL_BATCH, SEQUENCE + 1))
    for at in range(1, SEQUENCE + 1):
        follow = random.random(GLOBAL_BATCH) < 0.8
        tokens[follow, at] = (3 * tokens[follow, at - 1] + 5) % VOCAB
    mask = random.random((GLOBAL_BATCH, SEQUENCE)) > (0.1 if masked else -1.0)
    ids = np.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
    return Batch(tokens=tokens[:, :-1], labels=tokens[:, 1:], loss_mask=mask, sample_ids=ids)


def replica_batches(step: int, *, data_rank: int, data_size: int, micro_batch: int) -> list[Batch]:
    """Cuts a replica's contiguous share of a step's batch into micro-batches."""
    share = GLOBAL_BATCH // data_size
    mine = global_batch(step).select(data_rank * share, (data_rank + 1) * share)
    return [mine.select(start, start + micro_batch) for start in range(0, share, micro_batch)]


def learning_rate(step: int) -> float:
    """A short warm-up, so that a wrong step count or rate shows."""
    return 3e-3 * min(1.0, (step + 1) / 5)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _worker(rank: int, world: int, port: int, job: Callable[..., Any], argument: Any, results: Any) -> None:
    environment = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, job(argument), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_world(world: int, job: Callable[[Any], Any], argument: Any = None, *, timeout_s: float = 300.0) -> list[Any]:
    """Runs ``job(argument)`` in ``world`` spawned processes and gives the results by rank.

    Args:
        world: Number of processes.
        job: A function of a module (it is pickled by name).
        argument: Handed to each process.
        timeout_s: Seconds after which the processes are ended and the test fails.
    """
    context = mp.get_context("spawn")
    results, port = context.Queue(), _free_port()
    processes = [
        context.Process(target=_worker, args=(rank, world, port, job, argument, results), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < world:
            rank, value, error = results.get(timeout=timeout_s)
            if error:
                raise AssertionError(f"rank {rank}:\n{error}")
            found[rank] = value
        for process in processes:
            process.join(30)
    except queue.Empty:
        raise AssertionError(f"only ranks {sorted(found)} answered within {timeout_s} s") from None
    finally:
        for process in processes:
            process.kill()
    return [found[rank] for rank in range(world)]
