"""Text of any source to shards of JSON lines, one folder a domain: what every later step reads.

The work is cut into tasks (groups of source files); each task writes its shards and, last, its record. A job that was
killed goes on with the tasks that have no record, and ends with the same bytes.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_inherit.base import atomic
from megatron_inherit.base.errors import DataError
from megatron_inherit.base.log import get_logger
from megatron_inherit.data.job_folder import job_folder
from megatron_inherit.data.jobs import Progress, Report, report, run_tasks
from megatron_inherit.data.layouts import get_layout
from megatron_inherit.data.manifests import MANIFEST, ManifestModel
from megatron_inherit.data.opening import are_untouched
from megatron_inherit.data.records import ReadOptions, Reject, read_documents
from megatron_inherit.data.sources import SourceFile, find_sources
from megatron_inherit.data.text_shards import Compression, TextShard, TextShardWriter

REJECTS = "rejects.jsonl"
_SAMPLES = 100
_FIRST_CHECK = 1000
_REPORT_EVERY = 1 << 22
_SHARDS, _SMALLEST, _LARGEST = 256, 1 << 20, 1 << 26
_log = get_logger(__name__)


class IngestOptions(ManifestModel):
    """How to ingest.

    Attributes:
        layout: See :data:`megatron_inherit.data.layouts.LAYOUTS`.
        text_field: Field of the text in records.
        max_bytes: Longest document, UTF-8.
        lines: Each line of a plain text is a document, not each file.
        max_reject_share: Bad records beyond this share of all stop the job.
        shard_bytes: Text of a shard, about; 0: a 256th of the sources, but from 1 to 64 MiB, for shards are
            what processes share out.
        compression: Of the shards.
    """

    layout: str = "files"
    text_field: str = "text"
    max_bytes: int = 64 * 2**20
    lines: bool = False
    max_reject_share: float = 0.01
    shard_bytes: int = 0
    compression: Compression = "none"


class IngestPlan(ManifestModel):
    """All tasks of a job; written before the first one starts."""

    options: IngestOptions
    tasks: tuple[tuple[SourceFile, ...], ...]


class TaskRecord(ManifestModel):
    """What one task gave."""

    shards: tuple[TextShard, ...]
    rejects: dict[str, int]
    samples: tuple[dict[str, str], ...]


class DocumentsManifest(ManifestModel):
    """A folder of text: what ``minherit data ingest`` wrote."""

    kind: Literal["documents"] = "documents"
    options: IngestOptions
    sources: int
    rejects: dict[str, int]
    shards: tuple[TextShard, ...]


@dataclass(frozen=True)
class _Task:
    number: int
    files: tuple[SourceFile, ...]
    options: IngestOptions
    folder: Path


def ingest(
    sources: list[str],
    out: str | Path,
    options: IngestOptions | None = None,
    *,
    pattern: str = "*",
    as_text: bool = False,
    workers: int = 1,
    on_progress: Report | None = None,
) -> DocumentsManifest:
    """Reads sources into a folder of text shards; a finished folder of the same sources is left as it is.

    Shards that are missing or damaged are made again.

    Args:
        sources: See :func:`megatron_inherit.data.sources.find_sources`.
        out: The folder; an unfinished one is taken up again.
        options: How.
        pattern: Shell pattern for file names inside folders.
        as_text: Every file is plain text.
        workers: Processes.
        on_progress: Gets what is done.

    Raises:
        DataError: A source is missing or unreadable, was changed since the job began, or has too many bad records.
        UsageError: ``out`` holds something else, or another job is writing there.
    """
    options, out = options or IngestOptions(), Path(out)
    files = find_sources(sources, get_layout(options.layout), pattern=pattern, as_text=as_text)
    options = options.model_copy(update={"shard_bytes": options.shard_bytes or _shard_bytes(files)})
    plan = IngestPlan(options=options, tasks=tuple(_group(files, options.shard_bytes)))
    with job_folder(out, plan):
        tasks = [_Task(number, group, options, out) for number, group in enumerate(plan.tasks)]
        found = {task: record for task in tasks if (record := _record_of(task))}
        if len(found) == len(tasks) and (out / MANIFEST).is_file():
            _log.info("%s is finished already", out)
            return DocumentsManifest.load(out / MANIFEST)
        (out / MANIFEST).unlink(missing_ok=True)
        finished = list(found.values())
        _check_rejects(finished, options, out)
        missing = [task for task in tasks if task not in found]
        missing.sort(key=lambda task: -sum(file.size for file in task.files))
        for record in run_tasks(_run, missing, workers=workers, on_progress=on_progress):
            finished.append(record)
            _check_rejects(finished, options, out)
        return _finish(out, plan, [TaskRecord.load(_record_path(task)) for task in tasks])


def _shard_bytes(files: list[SourceFile]) -> int:
    if any(file.size == 0 and file.mtime_ns is None for file in files):  # a stream or a server that tells no size
        return _LARGEST
    return min(_LARGEST, max(_SMALLEST, sum(file.size for file in files) // _SHARDS))


def _group(files: list[SourceFile], target: int) -> Iterator[tuple[SourceFile, ...]]:
    """Puts small files of a domain together until their bytes reach ``target``."""
    group: list[SourceFile] = []
    size = 0
    for file in files:
        whole = file.size == 0 or size + file.size > target or (group and group[-1].domain != file.domain)
        if group and whole:
            yield tuple(group)
            group, size = [], 0
        group.append(file)
        size += file.size
    if group:
        yield tuple(group)


def _record_path(task: _Task) -> Path:
    return task.folder / "tasks" / f"{task.number:06d}.json"


def _record_of(task: _Task) -> TaskRecord | None:
    """Reads the record of a task; None if it was not finished, or its shards are not what the record says."""
    path = _record_path(task)
    if not path.is_file():
        return None
    record = TaskRecord.load(path)
    files = {task.folder / shard.name: shard.file for shard in record.shards}
    return record if are_untouched(task.folder, files) else None


def _run(task: _Task) -> TaskRecord:
    options = task.options
    reading = ReadOptions(get_layout(options.layout), options.text_field, options.max_bytes, options.lines)
    writers: dict[str, TextShardWriter] = {}
    rejects: Counter[str] = Counter()
    samples: list[dict[str, str]] = []
    seen, documents, size, shown = 0, 0, 0, time.monotonic()
    for file in task.files:
        for item in read_documents(file, reading):
            seen += 1
            if isinstance(item, Reject):
                rejects[item.reason] += 1
                if rejects[item.reason] <= _SAMPLES:
                    place = {"file": file.path, "place": item.place}
                    samples.append({"reason": item.reason, **place, "sample": item.sample})
                if seen >= _FIRST_CHECK and rejects.total() > options.max_reject_share * seen:
                    _refuse(rejects, seen, options, task.folder, samples)
                continue
            if item.domain not in writers:
                stem = f"{item.domain}/{task.number:06d}"
                writers[item.domain] = TextShardWriter(
                    task.folder, stem, item.domain, options.shard_bytes, options.compression
                )
            writers[item.domain].add(item.text, item.size)
            documents, size = documents + 1, size + item.size
            if size >= _REPORT_EVERY or time.monotonic() > shown + 1:
                report(Progress(documents, size))
                documents, size, shown = 0, 0, time.monotonic()
        _check_unchanged(file)
    report(Progress(documents, size))
    for writer in writers.values():
        writer.close()
    shards = tuple(shard for name in sorted(writers) for shard in writers[name].done)
    record = TaskRecord(shards=shards, rejects=dict(rejects), samples=tuple(samples))
    path = _record_path(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    record.save(path)
    return record


def _check_unchanged(file: SourceFile) -> None:
    if file.mtime_ns is None:
        return
    try:
        status = Path(file.path).stat()
    except OSError as error:
        raise DataError(f"{file.path} vanished while it was read.") from error
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise DataError(
            f"{file.path} was changed since the job began.",
            got=f"{status.st_size} bytes",
            expected=f"{file.size} bytes",
            fix="Ingest again into another folder.",
        )


def _check_rejects(records: list[TaskRecord], options: IngestOptions, out: Path) -> None:
    rejects: Counter[str] = Counter()
    for record in records:
        rejects.update(record.rejects)
    seen = rejects.total() + sum(shard.documents for record in records for shard in record.shards)
    if seen >= _FIRST_CHECK and rejects.total() > options.max_reject_share * seen:
        _refuse(rejects, seen, options, out, [sample for record in records for sample in record.samples])


def _refuse(rejects: Counter[str], seen: int, options: IngestOptions, out: Path, samples: list[dict[str, str]]) -> None:
    _write_rejects(out, samples)
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejects.most_common())
    field = f"Name the field of the text with --text-field (now {options.text_field!r}). "
    first = f" The first: {samples[0]['file']}, {samples[0]['place']}." if samples else ""
    raise DataError(
        f"Too many bad records: {rejects.total()} of {seen} ({reasons}).{first}",
        expected=f"a share of at most {options.max_reject_share:g}",
        fix=f"Look at {out / REJECTS}. {field if 'no text field' in rejects else ''}Repair the source, or allow more "
        "with --max-reject-share.",
    )


def _write_rejects(out: Path, samples: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    atomic.write_text(out / REJECTS, text)


def _finish(out: Path, plan: IngestPlan, records: list[TaskRecord]) -> DocumentsManifest:
    rejects: Counter[str] = Counter()
    for record in records:
        rejects.update(record.rejects)
    shards = sorted((shard for record in records for shard in record.shards), key=lambda shard: shard.name)
    seen = rejects.total() + sum(shard.documents for shard in shards)
    samples = [sample for record in records for sample in record.samples]
    if rejects.total() > plan.options.max_reject_share * seen:
        _refuse(rejects, seen, plan.options, out, samples)
    if not shards:
        raise DataError(f"The sources of {out} hold no text.", fix="Check the paths and --text-field.")
    if samples:
        _write_rejects(out, samples)
        _log.warning(
            "%d of %d records were rejected (%s); samples in %s", rejects.total(), seen, dict(rejects), REJECTS
        )
    manifest = DocumentsManifest(
        options=plan.options, sources=sum(map(len, plan.tasks)), rejects=dict(rejects), shards=tuple(shards)
    )
    manifest.save(out / MANIFEST)
    return manifest


def open_documents(folder: str | Path) -> DocumentsManifest:
    """Opens a finished folder of text.

    Raises:
        DataError: It is unfinished or none.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} is not a finished folder of text.", fix="Run `minherit data ingest` first.")
    return DocumentsManifest.load(path)
