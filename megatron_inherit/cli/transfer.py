"""What inherit, convert and export share: the printed plan, the progress bar, the record, the last line."""

from __future__ import annotations

import json
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from megatron_inherit.base.atomic import refuse_existing
from megatron_inherit.base.environment import collect_environment
from megatron_inherit.base.errors import UsageError
from megatron_inherit.base.quantities import format_bytes, format_seconds
from megatron_inherit.checkpoint.provenance import read_provenance
from megatron_inherit.checkpoint.stream import Source
from megatron_inherit.inherit.card import model_card
from megatron_inherit.plan.execute import Transfer, execute, plan_sink
from megatron_inherit.plan.link import execute_linked, links_of
from megatron_inherit.plan.ops import Copy, Init
from megatron_inherit.plan.plan import TransferPlan, count_kinds, describe_blocks, describe_layers


def run_transfer(
    plan: TransferPlan,
    source: Source | None,
    folder: Path,
    *,
    dry_run: bool = False,
    as_json: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    resume: bool = False,
    zero_copy: bool = False,
    quiet: bool = False,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Prints a plan or carries it out.

    Args:
        plan: The plan.
        source: Its opened origin, if it has one.
        folder: Folder to write.
        dry_run: Only prints.
        as_json: Prints JSON on standard output.
        overwrite: Replaces an existing folder.
        threads: Tensors moved at once.
        resume: Continues an interrupted transfer into the same folder.
        zero_copy: Links data files instead of writing them, where the format can.
        quiet: Says nothing, for a caller that makes many.
        record: Added to ``inherit.json``.
    """
    output = predict(plan, source, zero_copy=zero_copy)
    if dry_run:
        typer.echo(_json(_facts(plan, output, source)) if as_json else "\n".join(_lines(plan, output, source)))
        return
    refuse_existing(folder, overwrite=overwrite, source=source.path if source else None)
    if not (as_json or quiet):
        typer.echo("\n".join(_summary(plan, output, source)))
    note = read_provenance(source)[0] if source else ""
    texts = _texts(plan, note)
    details = {"command": command_line(), "note": note, **(record or {})}
    if zero_copy and source is not None:
        done = execute_linked(plan, folder, source=source, overwrite=overwrite, texts=texts, record=details)
    else:
        with progress_bar(plan.weight_bytes, quiet=as_json or quiet) as advance:
            done = execute(
                plan,
                folder,
                source=source,
                overwrite=overwrite,
                threads=threads,
                texts=texts,
                record=details,
                progress=advance,
                resume=resume,
            )
    if quiet:
        return
    size = done.bytes_written if output.linked else output.written
    last = f"{done.folder}: {format_bytes(size)} in {format_seconds(done.seconds)}"
    typer.echo(_json(_facts(plan, output, source) | _outcome(done)) if as_json else last)


def _texts(plan: TransferPlan, note: str) -> dict[str, str]:
    """Writes what stands beside the weights; only Hugging Face folders have a model card."""
    texts = {"environment.json": json.dumps(collect_environment(), indent=2) + "\n"}
    if plan.layout.format == "hf":
        texts["README.md"] = model_card(plan, command=command_line(), note=note)
    return texts


@dataclass(frozen=True)
class Output:
    """Size of every data file of the output, and of those among them that are only linked."""

    files: Mapping[str, int]
    linked: bool

    @property
    def written(self) -> int:
        """Bytes of data files that are not linked."""
        return 0 if self.linked else sum(self.files.values())


def predict(plan: TransferPlan, source: Source | None, *, zero_copy: bool) -> Output:
    """Lays the output of a plan out without making a file.

    Raises:
        CheckpointError: The format cannot hold the model in that layout.
        UsageError: ``zero_copy`` is asked for and links cannot give the output.
    """
    if not zero_copy:
        return Output(plan_sink(plan, source.side_files if source else ()).sizes, linked=False)
    if source is None:
        raise UsageError("--zero-copy needs a checkpoint to link to.")
    return Output(links_of(plan, source).sizes, linked=True)


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


def _summary(plan: TransferPlan, output: Output, source: Source | None) -> list[str]:
    lines = [plan.title[0].upper() + plan.title[1:]]
    if (blocks := describe_blocks(plan)) is not None:
        lines.append("  {}   {}".format(*blocks))
    lines.append("  ops      " + ", ".join(f"{count} {kind}" for kind, count in count_kinds(plan.ops).items()))
    if plan.dropped:
        lines.append(f"  dropped  {len(plan.dropped)} tensors of the source")
    if output.linked:
        size = sum(output.files.values())
        lines.append(f"  links    {_files(output)} of {size:,} bytes ({format_bytes(size)}); writes metadata alone")
        return lines
    read, written = _bytes_to_read(plan, source), output.written
    lines.append(f"  reads    {read:,} bytes ({format_bytes(read)}) of tensors")
    lines.append(f"  writes   {written:,} bytes ({format_bytes(written)}) in {_files(output)}")
    return lines


def _files(output: Output) -> str:
    return f"{len(output.files)} file{'' if len(output.files) == 1 else 's'}"


def _lines(plan: TransferPlan, output: Output, source: Source | None) -> list[str]:
    width = max(len(op.target) for op in plan.ops)
    lines = [f"{op.target:<{width}}  {op.dtype:<4} {list(op.shape)!s:<16} {op.describe()}" for op in plan.ops]
    lines += [f"{what:<{width}}  dropped: {reason}" for what, reason in _dropped(plan)]
    lines += [f"{file:<{width}}  {size:,} bytes" for file, size in output.files.items()]
    return [*lines, *_summary(plan, output, source)]


def _dropped(plan: TransferPlan) -> Iterator[tuple[str, str]]:
    """Yields what is left out and why; the tensors of blocks that go for the same reason are one entry."""
    blocks: dict[str, list[int]] = {}
    for name, reason in plan.dropped.items():
        parts = name.rpartition(":")[2].split(".")
        if parts[0] == "layers":
            blocks.setdefault(reason, []).append(int(parts[1]))
        else:
            yield name, reason
    for reason, found in blocks.items():
        yield f"{len(found)} tensors of blocks {describe_layers(sorted(set(found)))}", reason


def _bytes_to_read(plan: TransferPlan, source: Source | None) -> int:
    if source is None:
        return 0
    inputs = (source.find(name) for op in plan.ops for name in op.inputs)
    return sum(stored.nbytes if stored.decode is None else stored.stored_bytes for stored in inputs)


def _facts(plan: TransferPlan, output: Output, source: Source | None) -> dict[str, Any]:
    return {
        "plan": plan.to_json(),
        "files": dict(output.files),
        "bytes_to_read": 0 if output.linked else _bytes_to_read(plan, source),
        "bytes_to_write": output.written,
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
