"""The training loop. It knows no engine: ``train`` is the order of a step, the rest is what its lines do."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_inherit.base.errors import PreemptedError
from megatron_inherit.base.faults import fault
from megatron_inherit.base.log import get_logger
from megatron_inherit.config.schema import RunConfig
from megatron_inherit.train import upkeep
from megatron_inherit.train.preflight import plan_run
from megatron_inherit.train.progress import Progress
from megatron_inherit.train.session import Resume, Session, open_session
from megatron_inherit.train.start import describe
from megatron_inherit.train.state import RunState, next_start
from megatron_inherit.train.tasks import are_tasks_due, score_tasks
from megatron_inherit.train.untie import untie_if_due

if TYPE_CHECKING:
    from megatron_inherit.data.loader import Batch
    from megatron_inherit.engines.base import StepResult

logger = get_logger(__name__)


def pretrain(config: RunConfig, *, resume: Resume = "auto", profile: bool = False) -> RunState:
    """Runs a recipe in this process, from its files to its last checkpoint; what ``minherit train`` does.

    Args:
        config: The recipe.
        resume: ``auto`` goes on from the newest whole checkpoint, ``never`` refuses one.
        profile: Traces a few steps.

    Raises:
        MinheritError: As ``train``, and for everything that forbids the first step.
    """
    with open_session(plan_run(config), resume=resume, profile=profile) as run:
        return train(run)


def train(run: Session) -> RunState:
    """Trains from the newest checkpoint, or the beginning, to the last step.

    Raises:
        PreemptedError: A signal asked for an end; the state is saved.
        DivergedError: The loss did not recover after the allowed rollbacks.
        DiskError: A checkpoint could not be written.
    """
    state = upkeep.begin(run)
    if run.is_first:
        describe(run)
    measure(run, state, again=False)
    untie_if_due(run, state)
    first, clock = state.step, Clock(state.seconds)
    left = run.plan.total_steps - state.step
    with run.profile(left) as profiler, _progress(run, state) as progress:
        while state.step < run.plan.total_steps:
            clock.start()
            samples = next_samples(run, state)
            lr = run.plan.schedule.learning_rate(state.step + 1)
            clock.ready()
            with run.pace.watching(state.step + 1):
                result = run.engine.train_step(samples.micro_batches, lr=lr)
                clock.done()
            clock.alone()
            state, verdict = account(run, state, samples, result, clock)
            log_step(run, state, samples, result, lr, clock, progress)
            clock.logged()
            if verdict == "rollback":
                state = upkeep.roll_back(run, state)
                untie_if_due(run, state)
                continue
            profiler.step()
            run.pace.add(own=clock.own, forward=result.forward_seconds, whole=clock.whole + clock.after)
            upkeep.compare_ranks(run, state)
            stopping = upkeep.is_stopping(run, state, state.step - first)
            if not stopping:  # there may be little time left: the next session begins with what is due
                measure(run, state)
                untie_if_due(run, state)
            upkeep.save_if_due(run, dataclasses.replace(state, seconds=clock.total()), stopping)
            if stopping:
                raise PreemptedError(f"Stopped after step {state.step}; its state is saved.", fix="Run again to go on.")
    upkeep.finish(run, state)
    return state


def measure(run: Session, state: RunState, *, again: bool = True) -> None:
    """Evaluates and scores tasks where a step asks for it.

    Args:
        run: The session.
        state: After a step, or where a session begins.
        again: What has its row for this step is measured all the same.
    """
    if upkeep.is_evaluation_due(run, state) and (again or not upkeep.has_row(run, "eval", state.step)):
        upkeep.evaluate_now(run, state)
    if are_tasks_due(run, state) and (again or not upkeep.has_row(run, "tasks", state.step)):
        score_tasks(run, state)


@dataclass(frozen=True)
class Samples:
    """What one step reads: samples ``[start, stop)``, and this replica's part of them in micro-batches."""

    start: int
    stop: int
    micro_batches: list[Batch]


class Clock:
    """Times the steps; ``before`` are the seconds of earlier sessions."""

    def __init__(self, before: float) -> None:
        self._zero = time.perf_counter() - before
        self._began = self._ready = self._done = self._alone = self._logged = 0.0

    def start(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def ready(self) -> None:
        """Its data is there."""
        self._ready = time.perf_counter()

    def done(self) -> None:
        """The optimizer has stepped."""
        self._done = time.perf_counter()

    def alone(self) -> None:
        """What was recorded of the step is read; this rank goes on by itself."""
        self._alone = time.perf_counter()

    def logged(self) -> None:
        """Its row is written."""
        self._logged = time.perf_counter()

    @property
    def own(self) -> float:
        """Seconds before and after the step's common work."""
        return self._ready - self._began + self.after

    @property
    def whole(self) -> float:
        """Seconds of the step, until the optimizer has stepped."""
        return self._done - self._began

    @property
    def after(self) -> float:
        """Seconds that this rank spent on the step's row."""
        return self._logged - self._alone

    def total(self) -> float:
        """Seconds since the run began, all sessions together."""
        return time.perf_counter() - self._zero


def next_samples(run: Session, state: RunState) -> Samples:
    """Reads this replica's share of the next global batch, a pure function of the position in the data."""
    step, place = state.step + 1, run.engine.topology
    run.watchdog.progress(step, "data")
    fault("step_start", step)
    count = run.plan.batches.size(state.samples)
    start = next_start(state.samples, count, run.skipped)
    share, size = count // place.data_size, run.plan.options.micro_batch
    mine = run.loader.batch(start + place.data_rank * share, share)
    run.watchdog.progress(step, "train_step")
    return Samples(start, start + count, [mine.select(i, i + size) for i in range(0, share, size)])


def account(run: Session, state: RunState, samples: Samples, result: StepResult, clock: Clock) -> tuple[RunState, str]:
    """Takes a step into the run's state and judges its loss."""
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        samples=samples.stop,
        tokens=state.tokens + result.tokens,
        seconds=clock.total(),
    )
    run.watchdog.progress(state.step, "after_step")
    fault("after_step", state.step)
    return run.spikes.judge(state, result.loss, skipped=result.skipped, start=samples.start)


def log_step(
    run: Session,
    state: RunState,
    samples: Samples,
    result: StepResult,
    lr: float,
    clock: Clock,
    progress: Progress,
) -> None:
    """Writes a step's row, and the sample ids of a step that was skipped."""
    speed = result.tokens / clock.whole
    row = {
        "kind": "train",
        "step": state.step,
        "tokens": state.tokens,
        "samples": state.samples,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens_per_s": speed,
        "mfu": run.meter.utilisation(speed),
        "seconds": state.seconds,
    }
    run.metrics.write(row)
    progress.step(row, clock.whole)
    if state.step % run.plan.config.logging.every_steps == 0:
        run.metrics.send(row)
    if state.bad_steps:
        _log_bad_step(run, state, samples, result)


def _log_bad_step(run: Session, state: RunState, samples: Samples, result: StepResult) -> None:
    what = "gradient not finite, nothing updated" if result.skipped else f"loss {result.loss:.4g} is a spike"
    ids = [samples.start, samples.stop - 1]
    run.metrics.write(
        {
            "kind": "skip" if result.skipped else "spike",
            "step": state.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "sample_ids": ids,
            "skipped_steps": state.skipped_steps,
        }
    )
    if run.is_first:
        logger.warning("Step %d: %s (samples %d to %d).", state.step, what, *ids)


def _progress(run: Session, state: RunState) -> Progress:
    return Progress(
        run.plan.total_steps,
        state.step,
        every_steps=run.plan.config.logging.every_steps,
        formula=run.meter.formula,
        visible=run.is_first,
    )
