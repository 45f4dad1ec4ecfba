"""The training loop. It knows no engine: ``train`` is the order of a step, the rest is what its lines do."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_inherit.base.errors import DiskError, DivergedError, PreemptedError
from megatron_inherit.base.faults import fault
from megatron_inherit.base.log import get_logger
from megatron_inherit.config.load import config_hash
from megatron_inherit.train import metrics, resume
from megatron_inherit.train.checkpointing import SaveReport
from megatron_inherit.train.pace import unequal_ranks
from megatron_inherit.train.progress import Progress
from megatron_inherit.train.session import Session, write_skipped
from megatron_inherit.train.state import RunState, next_start
from megatron_inherit.train.validation import evaluate

if TYPE_CHECKING:
    from megatron_inherit.data.loader import Batch
    from megatron_inherit.engines.base import StepResult

logger = get_logger(__name__)


def train(run: Session) -> RunState:
    """Trains from the newest checkpoint, or the beginning, to the last step.

    Raises:
        PreemptedError: A signal asked for an end; the state is saved.
        DivergedError: The loss did not recover after the allowed rollbacks.
        DiskError: A checkpoint could not be written.
    """
    state = begin(run)
    clock, progress = Clock(state.seconds), _progress(run, state)
    first = state.step
    with run.profiler:
        while state.step < run.plan.total_steps:
            clock.start()
            samples = next_samples(run, state)
            lr = run.plan.schedule.learning_rate(state.step + 1)
            clock.ready()
            result = run.engine.train_step(samples.micro_batches, lr=lr)
            clock.done()
            state, verdict = account(run, state, samples, result, clock)
            log_step(run, state, samples, result, lr, clock, progress)
            if verdict == "rollback":
                state = roll_back(run, state)
                continue
            run.profiler.step()
            compare_ranks(run, state, clock)
            if is_due(state.step, run.plan.config.eval.every_steps, run.plan.total_steps):
                evaluate_now(run, state)
            stopping = is_stopping(run, state.step - first)
            save_if_due(run, dataclasses.replace(state, seconds=clock.total()), stopping)
            if stopping and state.step < run.plan.total_steps:
                raise PreemptedError(f"Stopped after step {state.step}; its state is saved.", fix="Run again to go on.")
    progress.close()
    finish(run, state)
    return state


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
        self._began = self._ready = self._done = 0.0

    def start(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def ready(self) -> None:
        """Its data is there."""
        self._ready = time.perf_counter()

    def done(self) -> None:
        """The optimizer has stepped."""
        self._done = time.perf_counter()

    @property
    def own(self) -> float:
        """Seconds before the step's common work."""
        return self._ready - self._began

    @property
    def whole(self) -> float:
        """Seconds of the step."""
        return self._done - self._began

    def total(self) -> float:
        """Seconds since the run began, all sessions together."""
        return time.perf_counter() - self._zero


def begin(run: Session) -> RunState:
    """Restores the newest whole checkpoint, or evaluates the untrained model."""
    run.watchdog.progress(0, "restore")
    found = resume.find_checkpoint(run.checkpoints, run.engine) if run.resume == "auto" else None
    state = RunState() if found is None else resume.restore(found, run.engine, run.identity)
    if run.is_first:
        metrics.trim(run.plan.output, state.step if found else -1)
        facts = {"world_size": run.plan.world_size, "engine": run.plan.config.engine, "resumed": found is not None}
        run.metrics.write(metrics.session_row(state.step, run.meter, facts))
        logger.info("%s step %d of %d.", "Resuming after" if found else "Starting at", state.step, run.plan.total_steps)
    if found is None:
        evaluate_now(run, state)
    return state


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


def roll_back(run: Session, state: RunState) -> RunState:
    """Returns to the last checkpoint without the samples of the bad steps; gives up when that was tried enough."""
    run.watchdog.progress(state.step, "roll_back")
    keep(run, run.saver.finish)
    given_up = (state.bad_since, state.samples)
    found = resume.find_checkpoint(run.checkpoints, run.engine)
    if found is None or len(run.skipped) >= run.plan.config.guard.max_rollbacks:
        raise DivergedError(
            f"The loss did not recover: {state.bad_steps} bad steps up to step {state.step}, "
            f"{len(run.skipped)} rollbacks before.",
            got=f"samples {given_up[0]} to {given_up[1] - 1}",
            fix="Lower optimizer.lr, lengthen the warm-up, or look at those samples.",
        )
    run.skipped.append(given_up)
    restored = resume.restore(found, run.engine, run.identity)
    if run.is_first:
        write_skipped(run.plan.output, run.skipped)
        metrics.trim(run.plan.output, restored.step)
        logger.warning(
            "Rolled back from step %d to %d; samples %d to %d are given up.", state.step, restored.step, *given_up
        )
    run.metrics.write(
        {
            "kind": "rollback",
            "step": restored.step,
            "from_step": state.step,
            "sample_ids": [given_up[0], given_up[1] - 1],
        }
    )
    return dataclasses.replace(restored, seconds=state.seconds)


def compare_ranks(run: Session, state: RunState, clock: Clock) -> None:
    """Looks for slow ranks and for replicas whose weights differ, and commits a save that all ranks have written."""
    guard, several = run.plan.config.guard, run.plan.world_size > 1
    run.pace.add(own=clock.own, whole=clock.whole)
    if several and state.step % guard.straggler_every_steps == 0:
        for slow in run.pace.stragglers(run.engine):
            run.metrics.write({"kind": "straggler", "step": state.step, **dataclasses.asdict(slow)})
            if run.is_first:
                logger.warning(
                    "Rank %d on %s is slow: score %.2f, %.3f s a step of its own.",
                    slow.rank,
                    slow.host,
                    slow.score,
                    slow.own_seconds,
                )
    if several and state.step % guard.weight_hash_every_steps == 0:
        unequal = unequal_ranks(run.engine)
        if unequal:
            raise DivergedError(
                f"Ranks {', '.join(map(str, unequal))} hold other weights than their replicas after step {state.step}.",
                fix="Check those devices; the run resumes from its last checkpoint.",
            )
    keep(run, run.saver.poll)


def evaluate_now(run: Session, state: RunState) -> None:
    """Scores the fixed windows and writes the row."""
    if run.windows is None:
        return
    run.watchdog.progress(state.step, "evaluate")
    found = evaluate(run.engine, run.windows, micro_batch=run.plan.options.micro_batch)
    row: dict[str, Any] = {
        "kind": "eval",
        "step": state.step,
        "tokens": state.tokens,
        **found.to_json(),
        "fingerprint": run.windows.fingerprint,
    }
    run.metrics.write(row)
    run.metrics.send(row)
    if run.is_first:
        logger.info("step %d: validation loss %.4f (standard error %.4f)", state.step, found.loss, found.stderr or 0.0)


def is_due(step: int, every_steps: int, last: int) -> bool:
    """Tells whether something is due every so many steps and at the end."""
    return step % every_steps == 0 or step == last


def is_stopping(run: Session, session_steps: int) -> bool:
    """Asks all ranks whether a signal came or the session's steps are used up."""
    limit = run.plan.config.train.stop_after
    return run.engine.any_rank(run.stop.received is not None) or (limit is not None and session_steps >= limit)


def save_if_due(run: Session, state: RunState, stopping: bool) -> None:
    """Saves at every so many steps while the loss is sound, and always before an end."""
    last = state.step == run.plan.total_steps
    due = is_due(state.step, run.plan.config.checkpoint.every_steps, run.plan.total_steps)
    if not (stopping or last or (due and not state.bad_steps)):
        return
    run.watchdog.progress(state.step, "save")
    source = run.plan.source
    stored = resume.stored_state(
        state,
        run.engine,
        run.identity,
        hf_config=None if source is None else source.hf_config,
        licence="" if source is None else source.licence,
    )
    facts = {
        "step": state.step,
        "tokens": state.tokens,
        "config_hash": config_hash(run.plan.config),
        "engine": run.plan.config.engine,
    }
    keep(run, lambda: run.saver.save(state.step, stored, facts), must=stopping or last)
    if stopping or last:
        keep(run, run.saver.finish, must=True)


def keep(run: Session, action: Callable[[], SaveReport | None], *, must: bool = False) -> None:
    """Does a part of saving, tells what it took, and treats a full disk as the recipe says."""
    try:
        report = action()
    except DiskError as error:
        if must or run.plan.config.checkpoint.on_disk_full == "stop":
            raise
        run.metrics.write({"kind": "save", "step": -1, "error": str(error)})
        if run.is_first:
            logger.warning("Training goes on without this checkpoint: %s", error)
        return
    if report is not None:
        run.metrics.write({"kind": "save", **dataclasses.asdict(report)})
        if run.is_first:
            logger.info(
                "Saved step %d: training stood still for %.2f s of %.2f s.",
                report.step,
                report.stall_seconds,
                report.total_seconds,
            )


def finish(run: Session, state: RunState) -> None:
    """Waits until everything is on disk."""
    run.watchdog.progress(state.step, "finish")
    keep(run, run.saver.finish, must=True)
    run.saver.close()
    run.engine.barrier()


def _progress(run: Session, state: RunState) -> Progress:
    return Progress(
        run.plan.total_steps,
        state.step,
        every_steps=run.plan.config.logging.every_steps,
        formula=run.meter.formula,
        visible=run.is_first,
    )
