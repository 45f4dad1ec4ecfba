"""Folders of jobs that can be killed: one writer at a time, and no leftovers of the one before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_inherit.base.atomic import new_folder
from megatron_inherit.base.errors import DataError, UsageError
from megatron_inherit.base.temporary import TEMPORARY_MARK, lock, refuse_second_writer
from megatron_inherit.data.manifests import ManifestModel, kind_of

_PLAN, _LOCK = "plan.json", ".lock"


def whole_folder(out: Path, kind: str, *, overwrite: bool = False) -> contextlib.AbstractContextManager[Path]:
    """As :func:`megatron_inherit.base.atomic.new_folder`, for folders with a manifest of one kind.

    Args:
        out: The folder.
        kind: Of its manifest; only a folder of this kind is overwritten.
        overwrite: Replaces it.

    Raises:
        UsageError: Another job is writing to ``out``, it exists, or holds another thing.
        DiskError: The folder cannot be written.
    """
    if overwrite and out.exists() and (out.is_file() or any(out.iterdir())) and kind_of(out) != kind:
        raise UsageError(
            f"{out} holds something else than a {kind}.", fix="Choose another output, or remove it yourself."
        )
    return new_folder(out, overwrite=overwrite)


@contextlib.contextmanager
def job_folder(out: Path, plan: ManifestModel) -> Iterator[None]:
    """Holds a folder for a job: begins it with the plan, or takes it up where the same plan was left.

    Raises:
        DataError: The folder's plan is another: sources or options changed.
        UsageError: The folder holds other things, or another job is writing there.
    """
    if out.is_file() or (not (out / _PLAN).is_file() and any(_is_foreign(path) for path in out.glob("*"))):
        raise UsageError(f"{out} exists already and holds other things.", fix="Choose another output folder.")
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("a") as file:
        if not lock(file):
            raise refuse_second_writer(out)
        for path in out.rglob(f"*{TEMPORARY_MARK}*"):
            path.unlink()
        _agree(out / _PLAN, plan)
        yield


def _is_foreign(path: Path) -> bool:
    return path.name != _LOCK and TEMPORARY_MARK not in path.name


def _agree(path: Path, plan: ManifestModel) -> None:
    if not path.is_file():
        plan.save(path)
        return
    try:
        before = type(plan).load(path)
    except DataError as error:
        fix = "Choose another output folder."
        raise DataError(
            f"{path.parent} was begun by a job of another kind, or its plan is damaged.", fix=fix
        ) from error
    if before != plan:
        raise DataError(
            f"{path.parent} was begun with other sources or options: {_difference(before, plan)}.",
            fix=f"Give the same ones to go on, or another output folder, or remove {path.parent}.",
        )


def _difference(before: ManifestModel, after: ManifestModel) -> str:
    old, new = (list(_leaves(plan.model_dump(), "")) for plan in (before, after))
    for (place, was), (_, now) in zip(old, new, strict=False):
        if was != now:
            return f"{place} was {was!r} and is {now!r}"
    return f"{len(old)} entries became {len(new)}"


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        yield place, value
        return
    label = f"{place} ({value['path']})" if isinstance(value, dict) and "path" in value else place
    for key, one in items:
        yield from _leaves(one, f"{label}.{key}" if label else str(key))
