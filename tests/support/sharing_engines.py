"""Cases of both engines with shared stages and teachers, run one after another in one spawned world."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

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
        spoil: Changes a weight on the last pipeline rank after the steps; one more step follows.
        reentrant: Recomputes with torch's reentrant checkpoints where the engine does not.
        untie: Finer plan that the stages are split into after the steps, by way of ``save``; as many steps follow.
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
    untie: str = ""
    spoil: bool = False
    reentrant: bool = False
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
    try:
        with _reentrant() if case.reentrant else contextlib.nullcontext():
            rows = _train(engine)
        if case.spoil:
            _spoil(engine)
            _train(engine)
    except MinheritError as error:
        return str(error)
    if case.save:
        _save(engine, Path(case.save), sharing)
    moments = {}
    if case.untie:
        before = _moments(engine, "sws.stages.")
        _untie(engine, case, options)
        moments = {"before": before, "after": _moments(engine, "sws.stages.")}
        rows += _train(engine)
    names = sorted({part.name for part in engine.parts()})
    moments |= _moments(engine, "sws.layers.")
    if options.keep_zeros:
        moments["zeros"] = _zeros(engine)
    dist.barrier()
    return rows, names, moments


def _spoil(engine: Any) -> None:
    import torch

    if engine.groups.pp.rank() == engine.groups.pp.size() - 1:
        parameter = engine.chunks[-1].decoder.layers[0].mlp.linear_fc2.weight
        with torch.no_grad():
            parameter.data[0, 0] += 1e-3
            for group in engine.stepper.optimizer.param_groups:
                for master in group["params"]:
                    if master.shape == parameter.shape and master.data_ptr() != parameter.data_ptr():
                        master.data[0, 0] += 1e-3


def _moments(engine: Any, prefix: str) -> dict[str, float]:
    """Gives the squared norm of the first moment of tensors of a kind, by name, over all ranks."""
    import torch.distributed as dist

    mine: dict[str, float] = {}
    for part in engine.parts():
        if part.name.startswith(prefix) and part.kind == "exp_avg":
            mine[part.name] = mine.get(part.name, 0.0) + float(part.tensor.double().square().sum())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: sum(one.get(name, 0.0) for one in everyone) for name in sorted(set().union(*everyone))}


def _zeros(engine: Any) -> float:
    """Counts the weights of blocks' matrices that are zero, over all ranks."""
    mine = [
        float((part.tensor == 0).sum())
        for part in engine.parts()
        if part.kind == "weight" and part.name.startswith("layers.") and len(part.global_shape) == 2
    ]
    return engine.reduce_sum([sum(mine)])[0]


def rows(outcomes: dict[str, Any], name: str) -> list[tuple[float, float]]:
    """Gives the losses and norms of a case that was not refused."""
    assert isinstance(outcomes[name], tuple), outcomes[name]
    return outcomes[name][0]


def assert_alike(found: list[tuple[float, float]], wanted: list[tuple[float, float]]) -> None:
    """Compares losses and norms of two layouts of one model, step by step."""
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, abs=5e-6)
        assert norm == pytest.approx(wanted_norm, rel=2e-5)


def _train(engine: Any) -> list[tuple[float, float]]:
    rows = []
    place = engine.topology
    for step in range(engine.step_count(), engine.step_count() + STEPS):
        mine = replica_batches(step, data_rank=place.data_rank, data_size=place.data_size, micro_batch=1)
        result = engine.train_step(mine, lr=learning_rate(step))
        rows.append((result.loss, result.grad_norm))
    return rows


@contextlib.contextmanager
def _reentrant() -> Iterator[None]:
    from torch.utils.checkpoint import checkpoint

    from megatron_inherit.model import modules

    def again(function: Any, *arguments: Any, **options: Any) -> Any:
        return checkpoint(function, *arguments, use_reentrant=True)

    modules.checkpoint = again  # type: ignore[assignment]
    try:
        yield
    finally:
        modules.checkpoint = checkpoint


def _untie(engine: Any, case: Case, options: Any) -> None:
    """Does with an engine what ``train.untie`` does with a run."""
    from megatron_inherit.model.load import random_reader
    from megatron_inherit.sharing.stage_plan import parse_plan

    finer = dataclasses.replace(options.sharing, plan=parse_plan(case.untie))
    engine.rebuild(dataclasses.replace(options, sharing=finer), random_reader(engine.config, 0), _distill(case))
    _restore(engine, Path(case.save))


def _distill(case: Case) -> Any:
    if case.distill is None:
        return None
    from megatron_inherit.checkpoint.detect import open_source
    from megatron_inherit.distill.cache import MANIFEST, CachedTargets, Manifest
    from megatron_inherit.distill.losses import Mix
    from megatron_inherit.distill.options import Distill

    cache = CachedTargets(Path(case.cache), Manifest.load(Path(case.cache, MANIFEST)).key) if case.cache else None
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
