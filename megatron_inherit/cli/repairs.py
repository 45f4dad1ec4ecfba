"""``minherit inherit --repair``: the fit before the plan, and what it changes in it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_inherit.base.errors import DataError, UsageError

if TYPE_CHECKING:
    from megatron_inherit.eval.repair import Repair
    from megatron_inherit.plan.plan import TransferPlan


def check(
    layers: Sequence[int], methods: str, *, text: Path | None, fresh: bool, optimizer: bool, zero_copy: bool
) -> None:
    """Looks at what a repair is asked for, before anything is measured.

    Args:
        layers: As many as the student will have.
        methods: See ``eval.repair.parse_repair``.
        text: Where it will be fitted.
        fresh: Something is drawn anew.
        optimizer: The optimizer state is taken along.
        zero_copy: The output links the teacher's files.

    Raises:
        UsageError: A method is unknown, asks for more blocks than there are, or excludes another option.
        DataError: The text is missing.
    """
    from megatron_inherit.eval.repair import keep_last, parse_repair

    kept, fits = parse_repair(methods)
    keep_last(layers, kept, len(layers))
    for excluded, option in ((fresh, "--reset and --as-published"), (optimizer, "--optimizer keep")):
        if excluded:
            raise UsageError("--repair fits inherited weights.", fix=f"Leave {option} out.")
    if fits and zero_copy:
        raise UsageError("--repair makes new values, and --zero-copy writes none.", fix="Leave --zero-copy out.")
    if text is not None and not text.exists():
        raise DataError(f"{text} does not exist.", fix="Give --repair-text a file or folder of text.")


def fit(teacher: str, layers: Sequence[int], methods: str, *, text: Path | None) -> Repair:
    """Measures and fits a cut of the teacher, as ``check`` found it possible."""
    from megatron_inherit.eval.hf_folder import default_device
    from megatron_inherit.eval.repair import fit_repair

    return fit_repair(teacher, layers, methods, text=text, device=default_device())


@contextlib.contextmanager
def repaired(
    plan: TransferPlan, repair: Repair | None, methods: str, record: dict[str, object]
) -> Iterator[TransferPlan]:
    """Gives the plan with the repair in it, or as it is; the fitted tensors lie in a temporary file meanwhile."""
    if repair is None:
        yield plan
        return
    from megatron_inherit.eval.repaired_plan import apply_repair, describe

    record["repair"] = describe(repair, methods)
    with tempfile.TemporaryDirectory(prefix="minherit-") as folder:
        yield apply_repair(plan, repair, Path(folder, "repair.safetensors"))
