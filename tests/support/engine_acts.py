"""Acts that a world of processes plays one after another: train an engine, save its parts, restore them elsewhere."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.engine_world import GLOBAL_BATCH, MODELS, learning_rate, replica_batches


@dataclass(frozen=True)
class Act:
    """One engine's life.

    Attributes:
        kind: ``megatron`` or ``deepspeed``.
        options: Fields of EngineOptions.
        model: Key of ``engine_world.MODELS``.
        first, steps: Which steps it trains.
        load, save: Folders of parts.
        poison: Step at which rank 0's gradient is made not finite.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    first: int = 0
    steps: int = 4
    load: str = ""
    save: str = ""
    poison: int = -1


@dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    skipped: list[bool]
    sums: list[float]
    updates: int
    hashes: list[str]
    model_rank: int


def play(acts: list[Act]) -> list[Outcome]:
    """Plays acts on this rank; all ranks play the same."""
    import logging

    import torch.distributed as dist

    logging.disable(logging.WARNING)
    outcomes = [_play(act) for act in acts]
    dist.barrier()
    dist.destroy_process_group()
    return outcomes


def _play(act: Act) -> Outcome:
    from megatron_inherit.engines.base import EngineOptions
    from megatron_inherit.engines.create import create_engine

    options = EngineOptions(**act.options)
    replicas = options.data_size(int(os.environ.get("WORLD_SIZE", "1")))
    micro = act.options.get("micro_batch", GLOBAL_BATCH // replicas // 2)
    options = dataclasses.replace(options, micro_batch=micro)
    engine = create_engine(act.kind, options, MODELS[act.model], seed=3)  # type: ignore[arg-type]
    if act.load:
        engine.restore(read_from(Path(act.load)), step_count=act.first)
    where = engine.topology
    place = {"data_rank": where.data_rank, "data_size": where.data_size, "micro_batch": micro}
    results = []
    for step in range(act.first, act.first + act.steps):
        if step == act.poison:
            _poison(engine)
        results.append(engine.train_step(replica_batches(step, **place), lr=learning_rate(step)))
    sums, _ = engine.sequence_losses(replica_batches(99, data_rank=0, data_size=1, micro_batch=3)[0])
    if act.save:
        save_to(Path(act.save), engine)
    return Outcome(
        losses=[result.loss for result in results],
        norms=[result.grad_norm for result in results],
        skipped=[result.skipped for result in results],
        sums=sums,
        updates=engine.step_count(),
        hashes=engine.gather_text(engine.weight_hash()),
        model_rank=where.model_rank,
    )


def _poison(engine: Any) -> None:
    """Makes one gradient of rank 0 infinite in the next backward pass, once."""
    import torch
    import torch.distributed as dist

    if dist.get_rank():
        return
    module = engine.model if hasattr(engine, "model") else engine.chunks[0]
    norm = next(m for m in module.modules() if type(m).__name__ == "Norm")

    def spoil(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        handle.remove()
        output.register_hook(lambda gradient: gradient * torch.inf)
        return output

    handle = norm.register_forward_hook(spoil)


def save_to(folder: Path, engine: Any) -> None:
    """Writes this rank's parts."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    rows, tensors = [], {}
    for index, part in enumerate(engine.parts()):
        tensors[str(index)] = part.tensor.detach().contiguous().clone()
        rows.append([part.name, part.kind, part.global_shape, part.start, part.shape, part.flat])
    rank = engine.topology.rank
    save_file(tensors, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(rows))
    engine.barrier()


def read_all(folder: Path) -> dict[tuple[str, str], Any]:
    """Assembles (name, kind) -> whole tensor; every element must be written exactly once."""
    import torch
    from safetensors.torch import load_file

    whole: dict[tuple[str, str], torch.Tensor] = {}
    seen: dict[tuple[str, str], torch.Tensor] = {}
    for path in sorted(folder.glob("*.json")):
        tensors = load_file(path.with_suffix(".safetensors"))
        for index, (name, kind, shape, start, size, flat) in enumerate(json.loads(path.read_text())):
            values = tensors[str(index)]
            key = name, kind
            target = whole.setdefault(key, torch.zeros(shape, dtype=values.dtype))
            counts = seen.setdefault(key, torch.zeros(shape, dtype=torch.int8))
            box = tuple(slice(low, low + length) for low, length in zip(start, size, strict=True))
            piece, count = target[box].reshape(-1), counts[box].reshape(-1)
            low, high = flat or (0, piece.numel())
            piece[low:high], count[low:high] = values.reshape(-1), count[low:high] + 1
            target[box], counts[box] = piece.view(size), count.view(size)
    for key, counts in seen.items():
        assert bool((counts == 1).all()), f"{key} is not written exactly once"
    return whole


def read_from(folder: Path) -> Any:
    """Gives a ReadPart of a folder."""
    from megatron_inherit.base.errors import AbsentError

    whole = read_all(folder)

    def read(name: str, kind: str, box: tuple[slice, ...]) -> Any:
        if (name, kind) not in whole:
            raise AbsentError(f"no {kind} of {name}")
        return whole[name, kind][box]

    return read
