"""Saves a run so that a crash at any instant leaves the old checkpoints or the old ones and a whole new one.

Every rank copies its parts and writes its files into ``step_N.tmp-TOKEN``; only the copy blocks where saving is
asynchronous. Once all ranks have written, which they tell each other between two steps, rank 0 writes the manifest,
renames the folder and points ``latest`` at it. Old checkpoints go after the new one has been read back and verified,
but for the newest that was not saved between bad steps: a rollback needs it.
"""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_inherit.base.atomic import disk_error, fsync_path, require_space, write_json, write_text
from megatron_inherit.base.errors import CheckpointError, DiskError, MinheritError
from megatron_inherit.base.faults import fault
from megatron_inherit.base.log import get_logger
from megatron_inherit.base.temporary import TEMPORARY_MARK
from megatron_inherit.checkpoint.formats import native
from megatron_inherit.checkpoint.stream import SideFile, write_side_files
from megatron_inherit.train.snapshot import Snapshots

if TYPE_CHECKING:
    from megatron_inherit.engines.base import Engine

logger = get_logger(__name__)
LATEST = "latest"
MOST_SHARES = 64
"""In which a checkpoint is read back; between them the reader can be stopped."""
_REPLACED = "replaced-"


def step_folder(folder: Path, step: int) -> Path:
    """Names the folder of a step's checkpoint."""
    return folder / f"step_{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Lists the steps that have a checkpoint folder, ascending; unfinished ones have other names."""
    numbers = (path.name.removeprefix("step_") for path in Path(folder).glob("step_*") if path.is_dir())
    return sorted(int(number) for number in numbers if number.isdigit())


@dataclass(frozen=True)
class KeepPolicy:
    """Which checkpoints stay: the ``last`` newest and the first one from each multiple of ``every_steps`` on."""

    last: int
    every_steps: int | None = None

    def outdated(self, steps: Sequence[int]) -> list[int]:
        """Chooses the steps to delete."""
        old = sorted(steps)[: -self.last]
        if not self.every_steps:
            return old
        first = {step // self.every_steps: step for step in sorted(steps, reverse=True)}
        return [step for step in old if step < self.every_steps or step != first[step // self.every_steps]]


@dataclass(frozen=True)
class SaveReport:
    """What a finished save took.

    Attributes:
        step: Of the checkpoint.
        stall_seconds: How long training stood still for it on this rank.
        total_seconds: From the copy to the rename.
    """

    step: int
    stall_seconds: float
    total_seconds: float


@dataclass
class _Pending:
    step: int
    temporary: Path
    facts: Mapping[str, Any]
    started: float
    leaving: bool = False
    stall_seconds: float = 0.0
    error: Exception | None = None
    thread: threading.Thread | None = None


class Saver:
    """Writes the checkpoints of one run; all ranks call the same methods in the same order.

    Args:
        folder: ``checkpoints`` of the run.
        engine: Whose parts are saved.
        token: The same on all ranks, new in every session; keeps an old session's leftovers apart.
        keep: What is not deleted.
        asynchronous: Whether a thread writes.
        side_files: Written by rank 0 into every checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        *,
        token: str,
        keep: KeepPolicy,
        asynchronous: bool,
        side_files: Sequence[SideFile] = (),
    ) -> None:
        self.folder, self.engine, self.token, self.keep = Path(folder), engine, token, keep
        self.asynchronous, self.side_files = asynchronous, side_files
        self.topology = engine.topology
        self._snapshots = Snapshots(copy=asynchronous)
        self._pending: _Pending | None = None
        self._pruner: threading.Thread | None = None
        self._hurry = threading.Event()

    @property
    def pending(self) -> bool:
        """Tells whether a save has begun and is not yet committed; the same on all ranks."""
        return self._pending is not None

    def save(
        self, step: int, state: Mapping[str, Any], facts: Mapping[str, Any], *, leaving: bool = False
    ) -> SaveReport | None:
        """Begins a checkpoint, after finishing the one before; a synchronous one is finished on return.

        Args:
            step: Its number.
            state: Contents of state.json.
            facts: Entries of the manifest.
            leaving: The session ends with it, perhaps in a hurry: what is outdated is left to the next one.

        Raises:
            DiskError: This save, or the one before, could not be written on some rank.
        """
        self.finish()
        started = time.perf_counter()
        target = step_folder(self.folder, step)
        temporary = target.with_name(f"{target.name}{TEMPORARY_MARK}{self.token}")
        pending = _Pending(step, temporary, facts, started, leaving)
        parts = self._snapshots.take(self.engine.parts())
        write = self._guarded(pending, lambda: self._write(pending, parts, state))
        self._pending = pending
        if self.asynchronous:
            pending.thread = threading.Thread(target=write, name=f"save-{step}")
            pending.thread.start()
            pending.stall_seconds = time.perf_counter() - started
            return None
        write()
        return self.finish()

    def poll(self) -> SaveReport | None:
        """Commits the pending save if every rank has written; call between two steps on all ranks.

        Raises:
            DiskError: A rank could not write.
        """
        pending = self._pending
        if pending is None:
            return None
        if self.engine.any_rank(pending.thread is not None and pending.thread.is_alive()):
            return None
        return self._commit(pending)

    def finish(self) -> SaveReport | None:
        """Waits for the pending save and commits it.

        Raises:
            DiskError: A rank could not write.
        """
        pending = self._pending
        if pending is None:
            return None
        waited = time.perf_counter()
        if pending.thread is not None:
            pending.thread.join()
        pending.stall_seconds += time.perf_counter() - waited
        return self._commit(pending)

    def prune(self, newest: int, *, verified: bool = False) -> None:
        """Begins to delete what is outdated, in a thread of rank 0.

        Args:
            newest: Step of the checkpoint that the run stands on.
            verified: Its files were read back already.
        """
        if self.topology.rank == 0:
            self._hurry.clear()
            self._pruner = threading.Thread(target=self._prune, args=(newest, verified), name="prune")
            self._pruner.start()

    def close(self, *, wait: bool = True) -> None:
        """Ends the threads; a pending save is left unfinished.

        Args:
            wait: Until old checkpoints are deleted; else the next session deletes them.
        """
        self._end_pruning(wait=wait)
        if self._pending is not None and self._pending.thread is not None:
            self._pending.thread.join()

    def _write(self, pending: _Pending, parts: Sequence[native.StoredPart], state: Mapping[str, Any]) -> None:
        pending.temporary.mkdir(parents=True, exist_ok=True)
        if self.topology.rank == 0:
            write_json(pending.temporary / native.STATE, state)
            write_side_files(pending.temporary / native.SIDE, self.side_files)
        native.write_rank(pending.temporary, self.topology.rank, parts, step=pending.step)

    def _commit(self, pending: _Pending) -> SaveReport:
        self._pending = None
        started = time.perf_counter()
        self._agree(pending)
        if self.topology.rank == 0:
            self._guarded(pending, lambda: self._put_in_place(pending))()
        self._agree(pending)
        done = time.perf_counter()
        stall = pending.stall_seconds + done - started if self.asynchronous else done - pending.started
        return SaveReport(pending.step, stall, done - pending.started)

    def _agree(self, pending: _Pending) -> None:
        """Raises on all ranks if any of them failed; none of the unfinished folder stays."""
        if not self.engine.any_rank(pending.error is not None):
            return
        self.engine.barrier()
        if self.topology.rank == 0:
            shutil.rmtree(pending.temporary, ignore_errors=True)
        error = pending.error or DiskError(f"Another rank could not write the checkpoint of step {pending.step}.")
        raise error if isinstance(error, MinheritError) else disk_error_of(error, pending.temporary)

    def _put_in_place(self, pending: _Pending) -> None:
        target = step_folder(self.folder, pending.step)
        fault("before_manifest", pending.step)
        native.write_manifest(pending.temporary, world_size=self.topology.world_size, facts=pending.facts)
        fault("before_rename", pending.step)
        if target.exists():
            target.rename(target.with_name(f"{target.name}{TEMPORARY_MARK}{_REPLACED}{self.token}"))
        pending.temporary.rename(target)
        fsync_path(self.folder)
        fault("before_latest", pending.step)
        write_text(self.folder / LATEST, target.name + "\n")
        self._end_pruning(wait=not pending.leaving)
        if not pending.leaving:
            self.prune(pending.step)

    def _end_pruning(self, *, wait: bool) -> None:
        if not wait:
            self._hurry.set()
        if self._pruner is not None:
            self._pruner.join()

    def _prune(self, newest: int, verified: bool) -> None:
        """Deletes what is outdated, once the newest checkpoint reads back as it was written.

        Checkpoints of later steps do not count: the run would have gone on from them if they were whole.
        """
        try:
            paths = self._outdated(newest)
            reading = () if verified or not paths else _verifying(step_folder(self.folder, newest))
            for _ in itertools.chain(reading, map(retire, paths)):
                if self._hurry.is_set():
                    return
        except (MinheritError, OSError) as error:
            logger.warning("Old checkpoints are kept: %s", error)

    def _outdated(self, newest: int) -> list[Path]:
        steps = [step for step in list_steps(self.folder) if step <= newest]
        sound = next((s for s in reversed(steps) if not within_bad_steps(step_folder(self.folder, s))), None)
        outdated = [step_folder(self.folder, step) for step in self.keep.outdated(steps) if step != sound]
        return [*outdated, *self.folder.glob(f"step_*{TEMPORARY_MARK}{_REPLACED}*")]

    def _guarded(self, pending: _Pending, work: Callable[[], None]) -> Callable[[], None]:
        """Keeps an exception until all ranks can hear of it."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                logger.debug("Saving failed.", exc_info=True)
                pending.error = error

        return run


def within_bad_steps(path: Path) -> bool:
    """Tells whether a checkpoint was saved after a bad step; a damaged one is judged by its hashes."""
    try:
        return native.read_json(path / native.STATE)["run"]["bad_steps"] > 0
    except (CheckpointError, KeyError, TypeError):
        return False


def _verifying(path: Path) -> Iterator[None]:
    """Compares a checkpoint's files with their hashes, a few at a time."""
    shares = min(MOST_SHARES, len(native.read_manifest(path)["files"]))
    for share in range(shares):
        native.verify(path, share=share, shares=shares)
        yield


def retire(path: Path) -> None:
    """Deletes a checkpoint so that a crash on the way leaves nothing that looks like one."""
    doomed = path if TEMPORARY_MARK in path.name else path.with_name(f"{path.name}{TEMPORARY_MARK}deleted")
    if doomed != path:
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Deletes what crashed sessions left unfinished; rank 0 calls it while it alone holds the run's lock.

    A checkpoint that was moved aside for a new one of the same step, which then never came, is put back.
    """
    for path in Path(folder).glob(f"*{TEMPORARY_MARK}{_REPLACED}*"):
        original = path.with_name(path.name.partition(TEMPORARY_MARK)[0])
        if not original.exists():
            path.rename(original)
    for path in Path(folder).glob(f"*{TEMPORARY_MARK}*"):
        logger.info("Removing %s, which a crash left behind.", path.name)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def disk_error_of(error: Exception, path: Path) -> Exception:
    """Translates what stopped a writer; the message of a full disk says how much is free."""
    if not isinstance(error, OSError):
        return error
    translated = disk_error(error, path)
    if isinstance(translated, DiskError):
        free = shutil.disk_usage(path.parent if path.parent.exists() else path.parent.parent).free
        return DiskError(translated.what, got=f"{free} bytes free", fix=translated.fix)
    return translated


def require_checkpoint_space(folder: Path, checkpoint_bytes: int, *, outdated: int = 0) -> None:
    """Raises DiskError unless two more checkpoints fit: one may be written while the one before must stay.

    Args:
        folder: Of the run.
        checkpoint_bytes: Of one checkpoint.
        outdated: Checkpoints that are there and go before the next one is written.
    """
    require_space(folder, max(0, 2 - outdated) * checkpoint_bytes)
