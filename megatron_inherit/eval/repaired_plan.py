"""A fitted repair as operations of the transfer plan: factors are computed, new tensors come from a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_inherit.arch.tensors import enumerate_tensors
from megatron_inherit.checkpoint.files import FilePool
from megatron_inherit.checkpoint.formats.safetensors_file import read_header
from megatron_inherit.eval.repair import Repair
from megatron_inherit.plan.ops import Compute, Copy, File, Op
from megatron_inherit.plan.plan import TransferPlan


def apply_repair(plan: TransferPlan, repair: Repair, file: Path) -> TransferPlan:
    """Changes the plan of a cut into that of the repaired one.

    Args:
        plan: Of ``repair.layers``, everything inherited.
        repair: What was fitted.
        file: Where its tensors are written; the plan reads them from there.

    Raises:
        PlanError: The plan would not be total.
    """
    config = dataclasses.replace(plan.config, tied=False) if repair.untied else plan.config
    header = _write(repair, file)
    inherited = {op.target: op for op in plan.ops}
    dtype = plan.ops[0].dtype
    ops: list[Op] = []
    for spec in enumerate_tensors(config):
        old = inherited.get(spec.name)
        factor = repair.scales.get(spec.name.rpartition(".")[0])
        if spec.name in repair.tensors:
            kind = old.dtype if old else dtype
            ops.append(
                File(target=spec.name, shape=spec.shape, dtype=kind, file=str(file), name=spec.name, header=header)
            )
        elif factor is not None and isinstance(old, Copy):
            ops.append(_scaled(old, factor))
        elif old is not None:
            ops.append(old)
    used = {name for op in ops for name in op.inputs}
    names = plan.origin.tensors if plan.origin else {}
    dropped = {name: plan.dropped.get(name, "replaced by the repair") for name in names if name not in used}
    hf_config = plan.hf_config
    if hf_config is not None and repair.untied:
        hf_config = {**hf_config, "tie_word_embeddings": False}
    changed = dataclasses.replace(plan, config=config, ops=tuple(ops), dropped=dropped, hf_config=hf_config)
    return dataclasses.replace(changed, title=f"{plan.title}, repaired").check()


def describe(repair: Repair, methods: str) -> dict[str, Any]:
    """Gives what ``inherit.json`` records of a repair."""
    return {
        "methods": methods,
        "held_out_loss": {"plain": repair.loss_before, "repaired": repair.loss_after},
        "factors": repair.scales,
        "replaced": sorted(repair.tensors),
        "untied": repair.untied,
    }


def _scaled(op: Copy, factor: float) -> Compute:
    return Compute(
        target=op.target,
        shape=op.shape,
        dtype=op.dtype,
        function="scale",
        sources=(op.source,),
        arguments={"factor": factor},
    )


def _write(repair: Repair, file: Path) -> str:
    if not repair.tensors:
        return ""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in repair.tensors.items()}, file)
    pool = FilePool()
    try:
        return read_header(pool, str(file))[1]
    finally:
        pool.close()
