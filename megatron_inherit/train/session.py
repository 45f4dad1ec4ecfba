"""Opens everything a run needs, in the order in which it can fail cheapest, and closes it again."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from megatron_inherit.base.atomic import write_json
from megatron_inherit.base.errors import DiskError, DivergedError, MinheritError, PreemptedError
from megatron_inherit.base.log import get_logger
from megatron_inherit.config.load import flatten, to_yaml
from megatron_inherit.train.agreement import refuse_unlike_ranks
from megatron_inherit.train.checkpointing import (
    KeepPolicy,
    Saver,
    list_steps,
    remove_leftovers,
    require_checkpoint_space,
)
from megatron_inherit.train.inputs import identity_of, open_data, read_side_files
from megatron_inherit.train.loggers import open_loggers
from megatron_inherit.train.metrics import MetricsLog, Speedometer, speedometer
from megatron_inherit.train.pace import Pace
from megatron_inherit.train.preflight import RunPlan, passes_wait
from megatron_inherit.train.profiling import Profiler
from megatron_inherit.train.resume import Identity, refuse_checkpoints
from megatron_inherit.train.run_folder import (
    clear_exit_status,
    locked,
    make_writable,
    write_exit_status,
)
from megatron_inherit.train.signals import StopRequest
from megatron_inherit.train.spikes import SpikePolicy
from megatron_inherit.train.start import RECIPE, device_name, refuse_other_start
from megatron_inherit.train.tasks import TaskScorer, open_tasks
from megatron_inherit.train.watchdog import Watchdog

if TYPE_CHECKING:
    from megatron_inherit.data.loader import Loader
    from megatron_inherit.data.windows import EvalWindows
    from megatron_inherit.engines.base import Engine

logger = get_logger(__name__)

Resume = Literal["auto", "never"]
SKIPPED = "skipped_samples.json"


@dataclass
class Session:
    """What the loop works with; only ``skipped`` and ``saved`` change, and at a split of stages what it shares.

    Attributes:
        plan: The resolved recipe.
        engine: The model with its optimizer.
        loader: Samples by index.
        windows: Evaluation windows, or None.
        identity: What a checkpoint must share with this run.
        saver, metrics, meter, watchdog, stop, pace, spikes: The loop's helpers.
        profile: Makes the profiler of a session of so many steps.
        tasks: What is scored on the way, or None.
        resume: Whether checkpoints that are there are continued.
        skipped: Ranges of samples that rollbacks gave up, kept in a file of the run's folder.
        saved: Step of the newest checkpoint that was begun or restored.
    """

    plan: RunPlan
    engine: Engine
    loader: Loader
    windows: EvalWindows | None
    identity: Identity
    saver: Saver
    metrics: MetricsLog
    meter: Speedometer
    watchdog: Watchdog
    stop: StopRequest
    pace: Pace
    spikes: SpikePolicy
    profile: Callable[[int], Profiler]
    tasks: TaskScorer | None = None
    resume: Resume = "auto"
    skipped: list[tuple[int, int]] = field(default_factory=list)
    saved: int = 0

    @property
    def is_first(self) -> bool:
        """Tells whether this is the rank that writes and speaks."""
        return self.engine.topology.rank == 0

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.plan.output / "checkpoints"


@contextlib.contextmanager
def open_session(plan: RunPlan, *, resume: Resume = "auto", profile: bool = False) -> Iterator[Session]:
    """Opens a run: folder, lock and disk first, then data, then the engine.

    Args:
        plan: The resolved recipe.
        resume: ``never`` refuses a folder that has checkpoints.
        profile: Traces some steps.

    Raises:
        MinheritError: Whatever forbids the first step.
    """
    rank = int(os.environ.get("RANK", "0"))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        if rank == 0:
            _hold_folder(stack, plan)
        _ = stack.enter_context(_exit_status(plan.output))
        if rank == 0:
            _prepare_folder(plan, resume)
        guard = plan.config.guard
        watchdog = Watchdog(
            plan.output / "heartbeats",
            rank=rank,
            world_size=plan.world_size,
            timeout=guard.watchdog_seconds,
            on_silence=lambda sentence: _end(plan.output, sentence),
        )
        loader, windows = open_data(plan, rank)
        tasks = None if plan.config.eval.tasks is None else open_tasks(plan, read_side_files(plan, loader))
        engine = stack.enter_context(_engine(plan, loader))
        stack.enter_context(watchdog)
        identity = identity_of(plan, loader)
        session = Session(
            plan=plan,
            engine=engine,
            loader=loader,
            windows=windows,
            identity=identity,
            saver=_saver(plan, engine, loader),
            metrics=_metrics(plan, rank),
            meter=_meter(plan),
            watchdog=watchdog,
            stop=stop,
            pace=_pace(plan, profile),
            spikes=SpikePolicy(guard.spike_window, guard.spike_sigma, guard.spike_patience),
            profile=_profile(plan, rank, profile),
            tasks=tasks,
            resume=resume,
            skipped=read_skipped(plan.output),
        )
        stack.callback(session.saver.close, wait=False)
        stack.callback(session.metrics.close)
        with _lost_ranks_named(session):
            refuse_unlike_ranks(session)
            yield session


def write_skipped(folder: Path, ranges: list[tuple[int, int]]) -> None:
    """Keeps the ranges of samples that were given up."""
    write_json(folder / SKIPPED, ranges)


def forget_skipped(run: Session) -> None:
    """Gives no samples up: those of a run whose checkpoints are gone do not bind the next one."""
    run.skipped.clear()
    if run.is_first:
        (run.plan.output / SKIPPED).unlink(missing_ok=True)


def _hold_folder(stack: contextlib.ExitStack, plan: RunPlan) -> None:
    """Takes the folder for this job, before anything in it is touched."""
    make_writable(plan.output)
    stack.enter_context(locked(plan.output))
    clear_exit_status(plan.output)


def _prepare_folder(plan: RunPlan, resume: Resume) -> None:
    checkpoints = plan.output / "checkpoints"
    if resume == "never":
        refuse_checkpoints(checkpoints)
    require_room(plan)
    checkpoints.mkdir(exist_ok=True)
    remove_leftovers(checkpoints)
    if list_steps(checkpoints):
        refuse_other_start(plan)
    _tell_changes(plan.output / RECIPE, to_yaml(plan.config))


def require_room(plan: RunPlan) -> None:
    """Raises DiskError unless a run's next checkpoints fit on its disk."""
    outdated = _keep_policy(plan).outdated(list_steps(plan.output / "checkpoints"))
    require_checkpoint_space(plan.output, plan.checkpoint_bytes, outdated=len(outdated))


def _tell_changes(path: Path, text: str) -> None:
    """Says which keys differ from the session before."""
    if not path.exists():
        return
    before, now = (flatten(yaml.safe_load(words) or {}) for words in (path.read_text(), text))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            logger.info("Changed since the last session: %s from %s to %s.", key, before.get(key), now.get(key))


@contextlib.contextmanager
def _exit_status(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        write_exit_status(folder, code=130, reason="interrupted")
        raise
    except MinheritError as error:
        write_exit_status(folder, code=error.exit_code, reason=str(error))
        raise
    except Exception as error:
        write_exit_status(folder, code=1, reason=f"{type(error).__name__}: {error}")
        raise
    if int(os.environ.get("RANK", "0")) == 0:
        write_exit_status(folder, code=0, reason="done")


@contextlib.contextmanager
def _engine(plan: RunPlan, loader: Loader) -> Iterator[Engine]:
    """Builds the engine; leaves its process groups only if all ranks come to that point."""
    import torch

    from megatron_inherit.engines.create import create_engine
    from megatron_inherit.train.objectives import distill_of

    torch.manual_seed(plan.config.run.seed)
    source = plan.source if plan.config.model.init == "weights" else None
    engine = create_engine(
        plan.config.engine,
        plan.options,
        plan.model,
        source=source,
        seed=plan.config.run.seed,
        distill=distill_of(plan.config, plan.model, loader, plan.total_samples),
    )
    together = False
    try:
        yield engine
        together = True
    except (PreemptedError, DivergedError, DiskError):
        together = True
        raise
    finally:
        if together or plan.world_size == 1:
            engine.close()


@contextlib.contextmanager
def _lost_ranks_named(session: Session) -> Iterator[None]:
    """Turns what a collective raises when a rank dies into a sentence that names the rank."""
    try:
        yield
    except MinheritError:
        raise
    except RuntimeError as error:
        lost = session.watchdog.lost() if session.plan.world_size > 1 else []
        if not lost:
            raise
        names = ", ".join(f"rank {h.rank} (process {h.pid} on {h.host}, step {h.step}, {h.phase})" for h in lost)
        raise MinheritError(
            f"Lost {names}.", fix="See that process's own messages; the run resumes from its last checkpoint."
        ) from error


def _end(folder: Path, sentence: str) -> None:
    logger.error(sentence)
    write_exit_status(folder, code=1, reason=sentence)
    os._exit(1)


def _saver(plan: RunPlan, engine: Engine, loader: Loader) -> Saver:
    section = plan.config.checkpoint
    token = engine.gather_text(os.urandom(4).hex())[0]
    return Saver(
        plan.output / "checkpoints",
        engine,
        token=token,
        keep=_keep_policy(plan),
        asynchronous=section.asynchronous,
        side_files=read_side_files(plan, loader) if engine.topology.rank == 0 else (),
    )


def _keep_policy(plan: RunPlan) -> KeepPolicy:
    return KeepPolicy(plan.config.checkpoint.keep_last, plan.config.checkpoint.keep_every_steps)


def _metrics(plan: RunPlan, rank: int) -> MetricsLog:
    if rank:
        return MetricsLog(None)
    section, recipe = plan.config.logging, plan.config.model_dump(mode="json")
    loggers = open_loggers(
        section.loggers,
        plan.output,
        project=section.project,
        run=plan.config.run.name,
        config=recipe,
        resumed=bool(list_steps(plan.output / "checkpoints")),
    )
    return MetricsLog(plan.output, loggers)


def _meter(plan: RunPlan) -> Speedometer:
    section = plan.config.logging
    return speedometer(
        plan.model,
        sequence_length=plan.config.train.sequence_length,
        formula=section.flops_formula,
        world_size=plan.world_size,
        device_name=device_name(),
        peak_tflops=section.peak_tflops,
    )


def _pace(plan: RunPlan, profile: bool) -> Pace:
    guard, waiting = plan.config.guard, plan.world_size > 1 and passes_wait(plan) and device_name() == "cpu"
    return Pace(
        guard.straggler_score,
        every_steps=guard.straggler_every_steps,
        tensor_ranks=plan.options.tp,
        waiting=waiting,
        recorded=waiting and not profile,
    )


def _profile(plan: RunPlan, rank: int, wanted: bool) -> Callable[[int], Profiler]:
    folder = plan.output / "profile" if wanted else None
    return functools.partial(Profiler, folder, rank, plan.config.logging.profile_steps)


def read_skipped(folder: Path) -> list[tuple[int, int]]:
    """Reads the ranges of samples that a run gave up."""
    path = folder / SKIPPED
    return [tuple(pair) for pair in json.loads(path.read_text())] if path.exists() else []
