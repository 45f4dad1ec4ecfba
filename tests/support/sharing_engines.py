"""Cases of both engines with shared stages and teachers, run one after another in one spawned world."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.engine_world import MODELS, learning_rate, replica_batches

STEPS = 3


@dataclass(frozen=True)
class Case:
    """A few optimizer steps of one engine.

    Attributes:
        plan: Stage plan, or empty.
        distill: Fields of Mix, or None; the teacher is in ``teacher``.
        save: Folder to write the final training state to.
        restore: Folder to start from instead of fresh weights.
    """

    engine: str = "megatron"
    plan: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    sharing: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] | None = None
    teacher: str = ""
    cache: str = ""
    save: str = ""
    restore: str = ""
    source: str = ""
    seed: int = 11


def run_cases(cases: dict[str, Case]) -> dict[str, Any]:
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    return {name: run_case(case) for name, case in cases.items()}


def run_case(case: Case) -> Any:
    import torch.distributed as dist

    from megatron_inherit.base.errors import MinheritError
    from megatron_inherit.checkpoint.detect import open_source
    from megatron_inherit.engines.base import EngineOptions
    from megatron_inherit.engines.create import create_engine
    from megatron_inherit.sharing.options import Sharing
    from megatron_inherit.sharing.stage_plan import parse_plan

    sharing = Sharing(plan=parse_plan(case.plan), guard_every_steps=1, **case.sharing) if case.plan else None
    options = EngineOptions(**({"micro_batch": 1, "dtype": "fp32", "clip": 1.0} | case.options), sharing=sharing)
    try:
        engine = create_engine(
            case.engine,  # type: ignore[arg-type]
            options,
            MODELS["llama"],
            source=open_source(case.source) if case.source else None,
            seed=case.seed,
            distill=_distill(case),
        )
        if case.restore:
            _restore(engine, Path(case.restore))
    except MinheritError as error:
        return str(error)
    rows = []
    place = engine.topology
    for step in range(engine.step_count(), engine.step_count() + STEPS):
        mine = replica_batches(step, data_rank=place.data_rank, data_size=place.data_size, micro_batch=1)
        result = engine.train_step(mine, lr=learning_rate(step))
        rows.append((result.loss, result.grad_norm))
    if case.save:
        _save(engine, Path(case.save), sharing)
    names = sorted({part.name for part in engine.parts()})
    dist.barrier()
    return rows, names


def _distill(case: Case) -> Any:
    if case.distill is None:
        return None
    from megatron_inherit.checkpoint.detect import open_source
    from megatron_inherit.distill.cache import CachedTargets, Manifest
    from megatron_inherit.distill.losses import Mix
    from megatron_inherit.distill.options import Distill

    cache = CachedTargets(Path(case.cache), Manifest.load(Path(case.cache)).key) if case.cache else None
    return Distill(mix=Mix(**case.distill), teacher=open_source(case.teacher) if case.teacher else None, cache=cache)


def _save(engine: Any, folder: Path, sharing: Any) -> None:
    from megatron_inherit.base.atomic import write_json
    from megatron_inherit.checkpoint.formats import native
    from megatron_inherit.checkpoint.formats.hf_config import write_config
    from megatron_inherit.train.snapshot import Snapshots

    folder.mkdir(exist_ok=True)
    raw = write_config(engine.config, "F32") | {"sws": sharing.plan.to_json()}
    rank = engine.topology.rank
    if rank == 0:
        write_json(folder / native.STATE, {"model": engine.config.to_json(), "hf_config": raw})
    native.write_rank(folder, rank, Snapshots(copy=False).take(engine.parts()), step=0)
    engine.barrier()
    if rank == 0:
        native.write_manifest(folder, world_size=engine.topology.world_size, facts={"updates": engine.step_count()})
    engine.barrier()


def _restore(engine: Any, folder: Path) -> None:
    from megatron_inherit.checkpoint.formats import native
    from megatron_inherit.model.load import to_torch

    with native.open_source(folder) as source:
        engine.restore(
            lambda name, kind, box: to_torch(source.read(name if kind == "weight" else f"{kind}:{name}", box)),
            step_count=source.details["updates"],
        )
