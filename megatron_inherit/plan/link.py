"""The executor of plans that move nothing: a torch_dist output that shares its data files with its origin."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_inherit.base.atomic import new_folder, write_json
from megatron_inherit.base.errors import CheckpointError, UsageError
from megatron_inherit.checkpoint import manifest
from megatron_inherit.checkpoint.formats.pickle_reader import fields
from megatron_inherit.checkpoint.formats.torch_dist import opened
from megatron_inherit.checkpoint.formats.torch_dist_link import Links, link_checkpoint, plan_links
from megatron_inherit.checkpoint.manifest import TensorHash
from megatron_inherit.checkpoint.stream import Source
from megatron_inherit.plan.execute import RECORD, Transfer
from megatron_inherit.plan.ops import Copy
from megatron_inherit.plan.plan import Layout, TransferPlan


def links_of(plan: TransferPlan, source: Source) -> Links:
    """Finds out what a plan links to; nothing is written.

    Args:
        plan: Copies only, from torch_dist to torch_dist in the same type.
        source: The opened origin.

    Raises:
        UsageError: The plan asks for more than links can give.
        CheckpointError: A fused tensor would need parts of several layers.
    """
    return plan_links(source, plan.config, _sources(plan.check(), source), iteration=plan.layout.iteration)


def execute_linked(
    plan: TransferPlan,
    folder: Path | str,
    *,
    source: Source,
    overwrite: bool = False,
    texts: Mapping[str, str] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Transfer:
    """Writes new metadata over hard links to the origin's files.

    No tensor is read, so hashes come from the origin's manifest; without one they are recorded as unverified.

    Args:
        plan: Copies only, from torch_dist to torch_dist in the same type.
        folder: Output folder.
        source: The opened origin.
        overwrite: Replaces an existing folder.
        texts: Further text files of the output, by name.
        record: Added to ``inherit.json``.

    Raises:
        UsageError: The plan asks for more than links can give.
        CheckpointError: A fused tensor would need parts of several layers.
    """
    began = time.perf_counter()
    links, sources = links_of(plan, source), _sources(plan, source)
    hashes = _known_hashes(source, sources)
    with new_folder(Path(folder), overwrite=overwrite) as temporary:
        linked = link_checkpoint(links, temporary)
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text)
        if hashes:
            write_json(temporary / manifest.NAME, manifest.to_json(hashes))
        if record is not None:
            state = "from the source's manifest" if hashes else "unverified"
            value = {"plan": plan.to_json(), "seed": plan.seed, "hashes": state, "linked": linked.files, **record}
            write_json(temporary / RECORD, value)
        sizes = {name: (temporary / name).stat().st_size for name in linked.files}
    seconds = time.perf_counter() - began
    return Transfer(Path(folder), hashes, source.pool.bytes_read, linked.bytes_written, seconds, sizes)


def _sources(plan: TransferPlan, source: Source) -> dict[str, str]:
    if source.format != "torch_dist" or plan.layout.format != "torch_dist":
        raise UsageError(
            "--zero-copy links torch_dist files to a torch_dist checkpoint.",
            got=f"{source.format} to {plan.layout.format}",
            fix="Leave --zero-copy out.",
        )
    found = {}
    for op in plan.ops:
        if not isinstance(op, Copy) or op.box is not None or op.dtype != op.source_dtype:
            raise UsageError(f"--zero-copy cannot give {op.target}: {op.describe()}.", fix="Leave --zero-copy out.")
        found[op.target] = op.source
    _refuse_other_cut(plan.layout, source)
    return found


def _refuse_other_cut(layout: Layout, source: Source) -> None:
    """Refuses what linked files cannot follow: their tensors are cut, named and padded as those of the origin."""
    origin = opened(source)
    args, dialect = fields(origin.common["args"]), "homogeneous" if source.details["homogeneous"] else "global"
    sizes = {
        "tp": ("tensor_model_parallel_size", layout.tp),
        "pp": ("pipeline_model_parallel_size", layout.pp),
        "vpp": ("virtual_pipeline_model_parallel_size", layout.vpp),
    }
    asked: dict[str, tuple[Any, Any]] = {
        option: (size, args.get(name) or 1) for option, (name, size) in sizes.items() if size > 1
    }
    if layout.dialect:
        asked["dialect"] = layout.dialect, dialect
    if layout.vocab_multiple != Layout.vocab_multiple:
        asked["vocab-multiple"] = layout.vocab_multiple, args.get("make_vocab_size_divisible_by")
    for option, (wanted, is_) in asked.items():
        if wanted != is_:
            raise UsageError(
                f"--zero-copy links files as they are, and cannot follow --{option} {wanted}.",
                got=f"{is_} in {source.path}",
                fix=f"Leave --{option} out: torch_dist is loaded at any sizes. Or leave --zero-copy out.",
            )


def _known_hashes(source: Source, sources: Mapping[str, str]) -> dict[str, TensorHash]:
    """Gives the hashes of the manifest beside the source's iteration; none where it may speak of another one."""
    folder = opened(source).folder
    if [other for other in folder.parent.glob("*/.metadata") if other.parent != folder]:
        return {}  # a run went on beside what was converted
    try:
        known = manifest.load_file(folder.parent / manifest.NAME)
    except CheckpointError:
        return {}
    for name in set(sources.values()):
        entry, stored = known.get(name), source.find(name)
        if entry is None or (entry.dtype, entry.shape) != (stored.dtype, stored.shape):
            return {}
    return {target: known[name] for target, name in sources.items()}
