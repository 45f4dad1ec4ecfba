"""Runs independent tasks over processes, with progress, and leaves no process behind whoever is killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import TypeVar

from megatron_inherit.base.errors import MinheritError

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """What was done since the last report."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0


Report = Callable[[Progress], None]

_report: Report = lambda progress: None  # noqa: E731  replaced in each worker


def report(progress: Progress) -> None:
    """Tells the parent process what a task has done; called by tasks."""
    _report(progress)


def start_server(*modules: str) -> None:
    """Begins to start the process that workers are forked from, so that its imports pass while this one goes on.

    Args:
        modules: What it imports beside the main module; one that is not installed is passed over.
    """
    context = multiprocessing.get_context("forkserver")  # imports once for all workers, and forks no threads
    context.set_forkserver_preload(["__main__", *modules])
    with _deaf_to_interrupts():
        forkserver.ensure_running()


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Lets processes that are started here ignore Ctrl-C, which reaches the whole group: their parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int, on_progress: Report | None = None
) -> Iterator[Result]:
    """Yields the results as they come; with one worker, in this process and in order.

    Args:
        function: A function of a module; it and the tasks must pickle.
        tasks: Independent of each other; the longest first keeps all workers busy to the end.
        workers: Processes.
        on_progress: Gets what the tasks report.

    Raises:
        MinheritError: A worker died, or the task's own error.
    """
    if workers <= 1 or len(tasks) <= 1:
        yield from _run_here(function, tasks, on_progress)
    else:
        yield from _run_apart(function, tasks, min(workers, len(tasks)), on_progress)


def _run_here(
    function: Callable[[Task], Result], tasks: Sequence[Task], on_progress: Report | None
) -> Iterator[Result]:
    global _report  # noqa: PLW0603
    before, _report = _report, on_progress or _report
    try:
        for task in tasks:
            yield function(task)
    finally:
        _report = before


def _run_apart(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, on_progress: Report | None
) -> Iterator[Result]:
    start_server(function.__module__)
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    reader = threading.Thread(target=_drain, args=(receiver, on_progress), daemon=True)
    reader.start()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(sender,))
    try:
        waiting: set[Future[Result]] = {pool.submit(function, task) for task in tasks}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise MinheritError(
            "A worker process died before its task was done.",
            fix="It was killed, often for want of memory. What is finished is kept: run the command again, perhaps "
            "with fewer --workers.",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        sender.send(None)
        reader.join()
        sender.close()
        receiver.close()


def _drain(receiver: Connection, on_progress: Report | None) -> None:
    while (progress := receiver.recv()) is not None:
        if on_progress:
            on_progress(progress)


def _start_worker(sender: Connection) -> None:
    """Lets reports of all workers go through one pipe.

    A report is shorter than what a pipe takes in one piece, so that no lock is needed: a worker that is killed with one
    in its hands would hold up all others and the parent for ever.
    """
    global _report  # noqa: PLW0603
    _report = sender.send
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Ends this worker when its parent is gone, so that a killed job leaves no writer behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
