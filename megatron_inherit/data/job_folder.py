"""The folder of a job that can be killed: one plan, one writer at a time, and no leftovers of the one before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_inherit.base.atomic import TEMPORARY_MARK
from megatron_inherit.base.errors import DataError, UsageError
from megatron_inherit.data.leftovers import LOCK, lock, refuse_second_writer
from megatron_inherit.data.manifests import ManifestModel

_PLAN = "plan.json"


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
    with (out / LOCK).open("a") as file:
        if not lock(file):
            raise refuse_second_writer(out)
        for path in out.rglob(f"*{TEMPORARY_MARK}*"):
            path.unlink()
        _agree(out / _PLAN, plan)
        yield


def _is_foreign(path: Path) -> bool:
    return path.name != LOCK and TEMPORARY_MARK not in path.name


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
            fix="Give the same ones to go on, or another output folder.",
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
