"""The executor: streams a plan into a folder that appears when it is complete and durable."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_inherit.arch.tensors import tensor_table
from megatron_inherit.base.atomic import new_folder, refuse_existing, require_space, write_json
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.base.faults import fault
from megatron_inherit.checkpoint import manifest
from megatron_inherit.checkpoint.detect import format_module, open_source
from megatron_inherit.checkpoint.files import FilePool, file_pool
from megatron_inherit.checkpoint.manifest import TensorHash
from megatron_inherit.checkpoint.stream import SideFile, Sink, SinkOptions, Source
from megatron_inherit.plan.journal import Journal, clear, resumable_folder
from megatron_inherit.plan.movement import Mover
from megatron_inherit.plan.ops import File, Op
from megatron_inherit.plan.plan import TransferPlan

SLACK = 1 << 20
RECORD = "inherit.json"


@dataclass(frozen=True)
class Transfer:
    """What an execution did.

    Attributes:
        folder: Where the output is.
        hashes: Of the tensors written, by canonical name.
        bytes_read: From the source, headers included.
        bytes_written: Into the containers.
        seconds: From the call to the finished rename.
        files: Size of each container file.
    """

    folder: Path
    hashes: Mapping[str, TensorHash]
    bytes_read: int
    bytes_written: int
    seconds: float
    files: Mapping[str, int]


def plan_sink(plan: TransferPlan, side_files: tuple[SideFile, ...] = ()) -> Sink:
    """Lays the output of a plan out; no file is made.

    Raises:
        CheckpointError: The format cannot hold the model in that layout.
    """
    layout = plan.layout
    if not plan.config.residual:
        raise CheckpointError(
            f"The format {layout.format} cannot hold a model without residual connections.",
            fix="It was trained for an ablation; its run can be resumed and read, not exported.",
        )
    module = format_module(layout.format)
    if not hasattr(module, "make_sink"):
        raise CheckpointError(f"The format {layout.format} can be read but not written.", fix="Choose --format hf.")
    options = SinkOptions(
        tp=layout.tp,
        pp=layout.pp,
        vpp=layout.vpp,
        vocab_multiple=layout.vocab_multiple,
        max_shard_bytes=layout.max_shard_bytes,
        dialect=layout.dialect,
        iteration=layout.iteration,
        adam=layout.adam,
        optimizer=any(":" in op.target for op in plan.ops),
        hf_config=plan.hf_config,
        side_files=side_files,
    )
    return module.make_sink(plan.config, plan.dtypes, options)


def execute(
    plan: TransferPlan,
    folder: Path | str,
    *,
    source: Source | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    texts: Mapping[str, str] | None = None,
    record: Mapping[str, Any] | None = None,
    side_files: Iterable[SideFile] = (),
    progress: Callable[[int], None] | None = None,
    resume: bool = False,
) -> Transfer:
    """Writes the output of a plan.

    The bytes written do not depend on the number of threads. Peak memory is a few tiles a thread.

    Args:
        plan: What to do; it is checked first.
        folder: Output folder; it appears whole or not at all.
        source: The opened origin; default: opened from the plan's path and compared with its identity.
        overwrite: Replaces an existing folder.
        threads: Tensors moved at once; default: the cores, at most 8.
        texts: Further text files of the output (model card), by name.
        record: Added to ``inherit.json``.
        side_files: Copied too, beside those of the source.
        progress: Called with the number of bytes just written, from any thread.
        resume: Continues where an interrupted execution of the plan stopped, if what it reads was not replaced since.

    Raises:
        PlanError: The plan is not total.
        UsageError: The folder exists.
        DiskError: There is no space for it.
        CheckpointError: The source changed, is damaged, or the format cannot hold the model.
    """
    began = time.perf_counter()
    plan.check()
    folder = Path(folder).absolute()
    refuse_existing(folder, overwrite=overwrite)
    opened = source or (open_source(plan.origin.path, format=plan.origin.format) if plan.origin else None)
    if opened is not None and plan.origin is not None and dict(opened.identity) != dict(plan.origin.identity):
        raise CheckpointError(f"{opened.path} changed since the plan was made.", fix="Make the plan again.")
    sides = (*(opened.side_files if opened else ()), *side_files)
    sink = plan_sink(plan, tuple({side.name: side for side in sides}.values()))
    with resumable_folder(folder) if resume else new_folder(folder, overwrite=overwrite) as temporary:
        journal = Journal(temporary, f"{plan.fingerprint()} {_state_of_inputs(plan, opened)}") if resume else None
        done = _start(sink, temporary, journal)
        hashes, written = _move(plan, sink, temporary, opened, threads or default_threads(), progress, journal, done)
        sink.finish(temporary)
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text)
        write_json(temporary / manifest.NAME, manifest.to_json(hashes))
        if record is not None:
            write_json(temporary / RECORD, {"plan": plan.to_json(), "seed": plan.seed, **record})
        if journal is not None:
            journal.remove()
    read = opened.pool.bytes_read if opened else 0
    if opened is not None and source is None:
        opened.close()
    return Transfer(folder, hashes, read, written, time.perf_counter() - began, sink.sizes)


def default_threads() -> int:
    """Gives the number of tensors moved at once."""
    return min(8, max(2, len(os.sched_getaffinity(0))))


def _state_of_inputs(plan: TransferPlan, source: Source | None) -> str:
    """Hashes size and age of every file that a plan reads: identities are of headers, which do not show new weights."""
    files = {op.file for op in plan.ops if isinstance(op, File)}
    if source is not None:
        files |= {file for op in plan.ops for name in op.inputs for file in source.find(name).files}
    with file_pool() as pool:
        return xxhash.xxh3_128_hexdigest(repr([(file, pool.state(file)) for file in sorted(files)]).encode())


def _start(sink: Sink, folder: Path, journal: Journal | None) -> dict[str, TensorHash]:
    """Creates the containers, or finds out what an interrupted transfer of the same plan left in them."""
    if journal is not None and not journal.is_new:
        partial = Source(sink.format, str(folder), sink.config, sink.rooted(folder))
        # of replicas a reader sees one, so that tensors which have them are written again
        single = {key for key, one in sink.tensors.items() if sum(p.extent.numel for p in one.pieces) == one.numel}
        claimed = {target: entry for target, entry in (journal.found or {}).items() if target in single}
        found = {target: manifest.hash_tensor(partial, target) for target in claimed}
        partial.close()
        return {target: entry for target, entry in claimed.items() if found[target] == entry}
    require_space(folder, sink.total_bytes + SLACK)
    if journal is not None:
        clear(folder)
        sink.prepare(folder)
        journal.begin()
    else:
        sink.prepare(folder)
    return {}


def _move(
    plan: TransferPlan,
    sink: Sink,
    folder: Path,
    source: Source | None,
    threads: int,
    progress: Callable[[int], None] | None,
    journal: Journal | None,
    done: Mapping[str, TensorHash],
) -> tuple[dict[str, TensorHash], int]:
    pool = FilePool()
    stopped = threading.Event()
    mover = Mover(
        source=source,
        targets=sink.rooted(folder),
        specs=tensor_table(plan.config),
        ops={op.target: op for op in plan.ops},
        pool=pool,
        progress=progress or (lambda _: None),
        threads=threads,
    )

    def run(number: int, op: Op) -> TensorHash | None:
        if stopped.is_set():
            return None
        fault("transfer", number)
        entry = done.get(op.target) or mover.run(op)
        if journal is not None and op.target not in done:
            journal.add(op.target, entry)
        return entry

    executor = ThreadPoolExecutor(threads, thread_name_prefix="transfer")
    try:
        hashes = {}
        for op, entry in zip(plan.ops, executor.map(run, range(len(plan.ops)), plan.ops), strict=True):
            if entry is not None:
                hashes[op.target] = entry
        return hashes, pool.bytes_written
    finally:
        stopped.set()
        executor.shutdown(cancel_futures=True)
        pool.close()
