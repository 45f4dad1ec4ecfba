"""``minherit inherit --repair``: the fit before the plan, and what it changes in it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_inherit.base.errors import UsageError

if TYPE_CHECKING:
    from megatron_inherit.eval.repair import Repair
    from megatron_inherit.plan.plan import TransferPlan


def fit(teacher: str, layers: Sequence[int], methods: str, *, text: Path | None, fresh: bool) -> Repair:
    """Measures and fits a cut of the teacher.

    Raises:
        UsageError: A method is unknown, or something is to be drawn anew, which no fit can foresee.
    """
    from megatron_inherit.eval.hf_folder import default_device
    from megatron_inherit.eval.repair import fit_repair, parse_repair

    parse_repair(methods)
    if fresh:
        raise UsageError("--repair fits inherited weights.", fix="Leave --reset and --as-published out.")
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
