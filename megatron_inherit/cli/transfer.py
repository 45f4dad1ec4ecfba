"""What inherit, convert and export share: the printed plan, the progress bar, the record, the last line."""

from __future__ import annotations

import json
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from megatron_inherit.base.environment import collect_environment
from megatron_inherit.base.errors import UsageError
from megatron_inherit.base.quantities import format_bytes, format_seconds
from megatron_inherit.checkpoint.provenance import read_provenance
from megatron_inherit.checkpoint.stream import Sink, Source
from megatron_inherit.inherit.card import model_card
from megatron_inherit.plan.execute import Transfer, execute, plan_sink
from megatron_inherit.plan.link import execute_linked
from megatron_inherit.plan.ops import Copy, Init
from megatron_inherit.plan.plan import TransferPlan, count_kinds, describe_layers


def run_transfer(
    plan: TransferPlan,
    source: Source | None,
    output: Path,
    *,
    dry_run: bool = False,
    as_json: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    resume: bool = False,
    zero_copy: bool = False,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Prints a plan or carries it out.

    Args:
        plan: The plan.
        source: Its opened origin, if it has one.
        output: Folder to write.
        dry_run: Only prints.
        as_json: Prints JSON on standard output.
        overwrite: Replaces an existing folder.
        threads: Tensors moved at once.
        resume: Continues an interrupted transfer into the same folder.
        zero_copy: Links data files instead of writing them, where the format can.
        record: Added to ``inherit.json``.
    """
    sink = plan_sink(plan, source.side_files if source else ())
    if dry_run:
        typer.echo(
            json.dumps(_facts(plan, sink, source), indent=2) if as_json else "\n".join(_lines(plan, sink, source))
        )
        return
    if not as_json:
        typer.echo("\n".join(_summary(plan, sink, source)))
    texts = {"environment.json": json.dumps(collect_environment(), indent=2) + "\n"}
    note = read_provenance(source)[0] if source else ""
    if plan.layout.format == "hf":
        texts["README.md"] = model_card(plan, command=command_line(), note=note)
    details = {"command": command_line(), "note": note, **(record or {})}
    if zero_copy:
        if source is None:
            raise UsageError("--zero-copy needs a checkpoint to link to.")
        linked = execute_linked(plan, output, source=source, overwrite=overwrite, texts=texts, record=details)
        typer.echo(_json(_facts(plan, sink, source) | _outcome(linked)) if as_json else _last_line(linked))
        return
    with progress_bar(plan.weight_bytes, quiet=as_json) as advance:
        done = execute(
            plan,
            output,
            source=source,
            overwrite=overwrite,
            threads=threads,
            texts=texts,
            record=details,
            progress=advance,
            resume=resume,
        )
    typer.echo(_json(_facts(plan, sink, source) | _outcome(done)) if as_json else _last_line(done))


def command_line() -> str:
    """Gives the command that runs, as one would type it."""
    return shlex.join(["minherit", *sys.argv[1:]])


@contextmanager
def progress_bar(total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Shows bytes moved: a bar on a terminal, a line every ten seconds elsewhere.

    Args:
        total: Bytes to come.
        quiet: Shows nothing.
    """
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=total)
            yield lambda count: progress.advance(task, count)
    else:
        yield _line_every(10.0, total)


def _line_every(seconds: float, total: int) -> Callable[[int], None]:
    lock, state = threading.Lock(), {"done": 0, "next": time.monotonic() + seconds}

    def advance(count: int) -> None:
        with lock:
            state["done"] += count
            if time.monotonic() < state["next"]:
                return
            state["next"] = time.monotonic() + seconds
            done = int(state["done"])
        typer.echo(f"{format_bytes(done)} of {format_bytes(total)} ({done / max(total, 1):.0%})", err=True)

    return advance


def _summary(plan: TransferPlan, sink: Sink, source: Source | None) -> list[str]:
    lines = [plan.title[0].upper() + plan.title[1:]]
    if plan.layer_map is not None and plan.origin is not None:
        lines.append(f"  blocks   0-{len(plan.layer_map) - 1} <- {describe_layers(plan.layer_map)}")
    lines.append("  ops      " + ", ".join(f"{count} {kind}" for kind, count in count_kinds(plan.ops).items()))
    if plan.dropped:
        lines.append(f"  dropped  {len(plan.dropped)} tensors of the source")
    read, written = _bytes_to_read(plan, source), sink.total_bytes
    lines.append(f"  reads    {read:,} bytes ({format_bytes(read)}) of tensors")
    lines.append(f"  writes   {written:,} bytes ({format_bytes(written)}) in {len(sink.sizes)} files")
    return lines


def _lines(plan: TransferPlan, sink: Sink, source: Source | None) -> list[str]:
    width = max(len(op.target) for op in plan.ops)
    lines = [f"{op.target:<{width}}  {op.dtype:<4} {list(op.shape)!s:<16} {op.describe()}" for op in plan.ops]
    lines += [f"{name:<{width}}  dropped: {reason}" for name, reason in plan.dropped.items()]
    lines += [f"{file:<{width}}  {size:,} bytes" for file, size in sink.sizes.items()]
    return [*lines, *_summary(plan, sink, source)]


def _bytes_to_read(plan: TransferPlan, source: Source | None) -> int:
    if source is None:
        return 0
    inputs = (source.find(name) for op in plan.ops for name in op.inputs)
    return sum(stored.nbytes if stored.decode is None else stored.stored_bytes for stored in inputs)


def _facts(plan: TransferPlan, sink: Sink, source: Source | None) -> dict[str, Any]:
    return {
        "plan": plan.to_json(),
        "files": dict(sink.sizes),
        "bytes_to_read": _bytes_to_read(plan, source),
        "bytes_to_write": sink.total_bytes,
        "ops": count_kinds(plan.ops),
        "fresh": [op.target for op in plan.ops if isinstance(op, Init)],
        "cast": [op.target for op in plan.ops if isinstance(op, Copy) and op.source_dtype != op.dtype],
    }


def _outcome(done: Transfer) -> dict[str, Any]:
    return {
        "folder": str(done.folder),
        "bytes_read": done.bytes_read,
        "bytes_written": done.bytes_written,
        "seconds": round(done.seconds, 4),
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2)


def _last_line(done: Transfer) -> str:
    return f"{done.folder}: {format_bytes(done.bytes_written)} in {format_seconds(done.seconds)}"
