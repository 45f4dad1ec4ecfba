"""What happens between two steps: restoring, comparing ranks, evaluating, saving, rolling back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_inherit.base.atomic import write_json
from megatron_inherit.base.errors import DiskError, DivergedError
from megatron_inherit.base.log import get_logger
from megatron_inherit.config.load import config_hash
from megatron_inherit.data.drawn import report_drawn
from megatron_inherit.eval.runs import WINDOW_LOSSES, read_metrics
from megatron_inherit.eval.val_loss import summarize
from megatron_inherit.train import metrics, resume
from megatron_inherit.train.checkpointing import SaveReport, list_steps, retire, step_folder
from megatron_inherit.train.pace import unequal_ranks
from megatron_inherit.train.session import Session, forget_skipped, write_skipped
from megatron_inherit.train.stages import follow_checkpoint
from megatron_inherit.train.start import refuse_other_length
from megatron_inherit.train.state import RunState
from megatron_inherit.train.validation import window_losses

logger = get_logger(__name__)


def begin(run: Session) -> RunState:
    """Restores the newest whole checkpoint, or evaluates the untrained model."""
    run.watchdog.progress(0, "restore")
    found = resume.find_checkpoint(run.checkpoints, run.engine) if run.resume == "auto" else None
    state = RunState() if found is None else _restore(run, found)
    refuse_other_length(run.plan, state, run.skipped)
    run.saved = state.step
    if run.is_first:
        metrics.trim(run.plan.output, state.step if found else -1)
        facts = {"world_size": run.plan.world_size, "engine": run.plan.config.engine, "resumed": found is not None}
        run.metrics.write(metrics.session_row(state.step, run.meter, facts))
        logger.info("%s step %d of %d.", "Resuming after" if found else "Starting at", state.step, run.plan.total_steps)
    if found is None:
        forget_skipped(run)
        evaluate_now(run, state)
    else:
        run.saver.prune(state.step, verified=True)
    return state


def _restore(run: Session, folder: Path) -> RunState:
    follow_checkpoint(run, folder)
    return resume.restore(folder, run.engine, run.identity)


def compare_ranks(run: Session, state: RunState) -> None:
    """Looks for slow ranks and for replicas whose weights differ, and commits a save that all ranks have written."""
    guard, several = run.plan.config.guard, run.plan.world_size > 1
    if several and state.step % guard.straggler_every_steps == 0:
        for slow in run.pace.stragglers(run.engine):
            run.metrics.write({"kind": "straggler", "step": state.step, **dataclasses.asdict(slow)})
            if run.is_first:
                logger.warning("%s", slow)
    if several and state.step % guard.weight_hash_every_steps == 0:
        unequal = unequal_ranks(run.engine)
        if unequal:
            raise DivergedError(
                f"Ranks {', '.join(map(str, unequal))} hold other weights than their replicas after step {state.step}.",
                fix="Check those devices, then run again: it goes on from the last checkpoint.",
            )
    advance_save(run, state.step, run.saver.poll)


def evaluate_now(run: Session, state: RunState) -> None:
    """Scores the fixed windows and writes the row; at the end also each window's loss, to compare runs in pairs."""
    if run.windows is None:
        return
    size = run.plan.config.eval.micro_batch or 8 * run.plan.options.micro_batch
    losses, counts = window_losses(
        run.engine, run.windows, micro_batch=size, beat=lambda: run.watchdog.progress(state.step, "evaluate")
    )
    found = summarize(losses, counts, run.windows.num_bytes)
    row: dict[str, Any] = {
        "kind": "eval",
        "step": state.step,
        "tokens": state.tokens,
        **found.to_json(),
        "fingerprint": run.windows.fingerprint,
    }
    run.metrics.write(row)
    run.metrics.send(row)
    if run.is_first and state.step == run.plan.total_steps:
        last = {"step": state.step, "fingerprint": run.windows.fingerprint, "losses": losses, "counts": counts}
        if all(map(math.isfinite, losses)):
            write_json(run.plan.output / WINDOW_LOSSES, last)
        else:
            logger.warning("The losses of the windows are not all finite: %s is not written.", WINDOW_LOSSES)
    if run.is_first:
        logger.info("step %d: validation loss %.4f (standard error %.4f)", state.step, found.loss, found.stderr or 0.0)


def is_evaluation_due(run: Session, state: RunState) -> bool:
    """Tells whether a step is one that is evaluated; the last one is."""
    due = state.step % run.plan.config.eval.every_steps == 0 or state.step == run.plan.total_steps
    return run.windows is not None and due


def has_row(run: Session, kind: str, step: int) -> bool:
    """Tells whether metrics.jsonl has a row of a kind for a step; all ranks call this together."""
    path = run.plan.output / metrics.METRICS
    rows = read_metrics(path) if run.is_first and path.exists() else []
    return run.engine.any_rank(any(row["kind"] == kind and row["step"] == step for row in rows))


def is_stopping(run: Session, state: RunState, session_steps: int) -> bool:
    """Asks all ranks whether a signal came or the session's steps are used up; after the last step none stops."""
    limit = run.plan.config.train.stop_after
    asked = run.engine.any_rank(run.stop.received is not None) or (limit is not None and session_steps >= limit)
    return asked and state.step < run.plan.total_steps


def save_if_due(run: Session, state: RunState, stopping: bool) -> None:
    """Saves every so many steps, or as soon after as the loss is sound, and always before an end."""
    last, every = state.step == run.plan.total_steps, run.plan.config.checkpoint.every_steps
    due = state.step // every > run.saved // every
    if not (stopping or last or (due and not state.bad_steps)):
        return
    run.saved = state.step
    run.watchdog.progress(state.step, "save")
    advance_save(run, state.step, run.saver.finish)
    source = run.plan.source
    stored = resume.stored_state(
        state,
        run.engine,
        run.identity,
        hf_config=run.plan.hf_config,
        licence="" if source is None else source.licence,
    )
    facts = {
        "step": state.step,
        "tokens": state.tokens,
        "config_hash": config_hash(run.plan.config),
        "engine": run.plan.config.engine,
        "adam": [run.plan.config.optimizer.beta1, run.plan.config.optimizer.beta2, run.plan.config.optimizer.eps],
    }
    advance_save(
        run, state.step, lambda: run.saver.save(state.step, stored, facts, leaving=stopping), must=stopping or last
    )
    if stopping or last:
        advance_save(run, state.step, run.saver.finish, must=True)


def advance_save(run: Session, step: int, action: Callable[[], SaveReport | None], *, must: bool = False) -> None:
    """Does a part of saving, tells what it took, and treats a full disk as the recipe says."""
    try:
        report = action()
    except DiskError as error:
        if must or run.plan.config.checkpoint.on_disk_full == "stop":
            raise
        run.metrics.write({"kind": "save", "step": step, "error": str(error)})
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
    """Waits until everything is on disk, and says what was drawn of each domain."""
    run.watchdog.progress(state.step, "finish")
    if run.engine.topology.rank == 0:
        report_drawn(run.loader, state.samples, skipped=run.skipped)
    advance_save(run, state.step, run.saver.finish, must=True)
    run.saver.close()
    run.engine.barrier()


def roll_back(run: Session, state: RunState) -> RunState:
    """Returns to the last checkpoint without the samples of the bad steps; gives up when that was tried enough."""
    run.watchdog.progress(state.step, "roll_back")
    advance_save(run, state.step, run.saver.finish)
    given_up = (state.bad_since, state.samples)
    found = resume.find_checkpoint(run.checkpoints, run.engine, sound=True)
    if found is None or len(run.skipped) >= run.plan.config.guard.max_rollbacks:
        raise DivergedError(
            f"The loss did not recover: {state.bad_steps} bad steps up to step {state.step}, "
            f"{len(run.skipped)} rollbacks before.",
            got=f"samples {given_up[0]} to {given_up[1] - 1}",
            fix="Lower optimizer.lr, lengthen the warm-up, or look at those samples.",
        )
    run.skipped.append(given_up)
    restored = _restore(run, found)
    run.saved = restored.step
    if run.is_first:
        write_skipped(run.plan.output, run.skipped)
        for step in list_steps(run.checkpoints):
            if step > restored.step:
                retire(step_folder(run.checkpoints, step))
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
