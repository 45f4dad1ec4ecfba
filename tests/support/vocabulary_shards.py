"""Runs the fused heads on two gloo processes that each hold half the vocabulary, and on one that holds it all."""

from __future__ import annotations

import multiprocessing
import queue
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from megatron_inherit.kernels.head import Shard
from megatron_inherit.kernels.linear_kl.reference import KINDS
from tests.support.kernel_proof import tensor

ROWS, WIDTH, SIZE = 6, 8, 2
Results = dict[str, torch.Tensor]


def losses(lce: ModuleType, kl: ModuleType, vocab: int, padded: int, group: dist.ProcessGroup | None) -> Results:
    """Gives every loss of the heads with its gradients, on this rank's half of ``padded`` rows or on all of them.

    Args:
        lce: Implementation of linear_cross_entropy.
        kl: Implementation of linear_kl.
        vocab: True number of tokens.
        padded: Rows of the head over all ranks.
        group: The two ranks, or None for the whole.
    """
    rows = padded // SIZE if group else padded
    start = dist.get_rank() * rows if group else 0
    shard = Shard(start, max(0, min(rows, vocab - start)), vocab, group)
    hidden = tensor(ROWS, WIDTH, seed=1, dtype=torch.float32).requires_grad_()
    weight = tensor(padded, WIDTH, seed=2, dtype=torch.float32)[start : start + rows].clone().requires_grad_()
    teacher = tensor(ROWS, 5, seed=3, dtype=torch.float32), tensor(padded, 5, seed=4, dtype=torch.float32)
    labels = torch.arange(ROWS) * 2 % vocab
    options: dict[str, Any] = {
        "counted": labels != 4, "shard": shard, "per_token_grad": False, "reduce_hidden_grad": True
    }  # fmt: skip
    log_p = (teacher[0] @ teacher[1][:vocab].t() / 2).log_softmax(-1)
    values, ids = log_p.topk(3)
    runs = {"cross-entropy": lambda: lce.linear_cross_entropy(hidden, weight, labels, z_loss=1e-3, **options)}
    for kind in KINDS:
        runs[kind] = lambda kind=kind: kl.linear_kl(
            hidden, weight, teacher[0], teacher[1][start : start + rows],
            labels=labels, temperature=2.0, kind=kind, alpha=0.4, **options,
        )  # fmt: skip
    ghost = torch.log1p(-values.exp().sum(-1))
    runs["top k"] = lambda: kl.linear_topk_kl(hidden, weight, ids, values, ghost, temperature=2.0, **options)
    found: Results = {}
    for name, run in runs.items():
        loss = run()
        grads = torch.autograd.grad(loss.sum(), (hidden, weight))
        found |= {f"{name} loss": loss.detach(), f"{name} hidden": grads[0], f"{name} weight": grads[1]}
    return found


def _rank(rank: int, folder: str, answers: Any, modules: tuple[ModuleType, ModuleType], sizes: list[tuple[int, int]]):
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE)
        found = [
            {name: value.numpy() for name, value in losses(*modules, *size, dist.group.WORLD).items()} for size in sizes
        ]
        dist.barrier()
        dist.destroy_process_group()
        answers.put((rank, found))
    except BaseException:
        answers.put((rank, traceback.format_exc()))


def compare(lce: ModuleType, kl: ModuleType, sizes: list[tuple[int, int]], folder: Path) -> float:
    """Gives the largest difference of two ranks from one, over values and gradients.

    Args:
        lce: Implementation of linear_cross_entropy.
        kl: Implementation of linear_kl.
        sizes: (true vocabulary, padded rows) of each case.
        folder: For the rendezvous.
    """
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, str(folder), answers, (lce, kl), sizes)) for r in range(SIZE)]
    for process in ranks:
        process.start()
    found: dict[int, list[dict]] = {}
    try:
        for _ in ranks:
            rank, answer = answers.get(timeout=200)
            assert isinstance(answer, list), answer
            found[rank] = answer
    except queue.Empty:
        raise AssertionError("the ranks did not answer") from None
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    worst = 0.0
    for case, (vocab, padded) in enumerate(sizes):
        for name, want in losses(lce, kl, vocab, padded, None).items():
            parts = [torch.from_numpy(found[rank][case][name]) for rank in range(SIZE)]
            for got in [torch.cat(parts)] if name.endswith("weight") else parts:
                worst = max(worst, float((got - want).abs().max()))
    return worst
