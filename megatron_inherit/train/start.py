"""What a run is and began from; the start does not change while its checkpoints are there."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from megatron_inherit.base.atomic import write_json, write_text
from megatron_inherit.base.environment import collect_environment
from megatron_inherit.base.errors import ConfigError
from megatron_inherit.base.log import get_logger
from megatron_inherit.checkpoint.files import is_remote
from megatron_inherit.checkpoint.stream import Source
from megatron_inherit.config.load import config_hash, to_yaml
from megatron_inherit.distill.cache import hash_values
from megatron_inherit.plan.execute import RECORD
from megatron_inherit.train.preflight import RunPlan
from megatron_inherit.train.state import RunState

if TYPE_CHECKING:
    from megatron_inherit.train.session import Session

logger = get_logger(__name__)

RECIPE, MANIFEST = "run.yaml", "manifest.json"
DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout")
"""Keys of a Hugging Face config that ask for dropout."""


def refuse_other_start(plan: RunPlan) -> None:
    """Makes sure that a run that is continued began from what the recipe says; a folder that moved may have any name.

    Raises:
        ConfigError: It began from another folder that is still there, from other weights, or from fresh ones.
    """
    began = _began_from(plan.output)
    if began is None:
        return
    path, init = plan.config.model.path or "", plan.config.model.init
    before, init_before = began.get("named", began.get("path", "")), began.get("init", init)
    fresh, fresh_before = not path or init == "random", not before or init_before == "random"
    if fresh != fresh_before:
        _refuse("model.init", "from fresh weights" if fresh_before else "from a checkpoint", plan.output, init, before)
    if path and before and os.path.exists(before) and os.path.exists(path) and not os.path.samefile(before, path):
        _refuse("model.path", "from another folder", plan.output, path, before)
    values = _sampled_values(plan)
    if values and began.get("values", values) != values and not _went_on(plan, began):
        _refuse("model.path", "from other weights than this folder holds now", plan.output, path, before)


def refuse_other_length(plan: RunPlan, state: RunState, skipped: Sequence[tuple[int, int]]) -> None:
    """Makes sure that the steps that are left bring a run to the length of its recipe.

    Args:
        plan: The resolved recipe.
        state: Where the run stands.
        skipped: Samples that were given up; where there are some, the batches before cannot be told from the position.

    Raises:
        ConfigError: The run is beyond its end, or its token budget would be met by steps of another batch.
    """
    train = plan.config.train
    key = "train.steps" if train.budget is None else "train.budget"
    if state.step > plan.total_steps:
        raise ConfigError(
            f"{key}: the run in {plan.output} is longer already.",
            got=f"{plan.total_steps} steps",
            expected=f"at least {state.step}",
            fix=f"Raise {key} (or set train.global_batch back), or set run.output to another folder.",
        )
    expected = plan.batches.samples_after(state.step)
    if train.budget is not None and not skipped and state.samples != expected:
        raise ConfigError(
            f"train.global_batch: the run in {plan.output} was trained with another one (or another train.batch_ramp), "
            f"and {plan.total_steps} steps of this one do not meet train.budget.",
            got=f"{state.samples} samples in {state.step} steps",
            expected=f"{expected} samples",
            fix="Set it back; or set train.budget=null and train.steps to the last step of the changed run.",
        )


def _refuse(key: str, what: str, folder: Path, got: str, expected: str) -> None:
    raise ConfigError(
        f"{key}: the run in {folder} began {what}, and would go on from its own weights.",
        got=got,
        expected=expected or "random",
        fix="Set run.output to another folder to train this start.",
    )


def _went_on(plan: RunPlan, began: Mapping[str, Any]) -> bool:
    """Tells whether ``model.path`` is a run whose newest checkpoint is another one by now."""
    return plan.source is not None and plan.source.format == "native" and plan.source.path != began.get("path")


def _sampled_values(plan: RunPlan) -> str:
    """Hashes some values of each tensor of the start; empty for fresh weights, and for those at a URL."""
    if plan.source is None or plan.config.model.init == "random" or is_remote(plan.source.path):
        return ""
    state = xxhash.xxh3_128()
    hash_values(plan.source, state)
    return state.hexdigest()


def device_name() -> str:
    """Names the device of this process."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def tell_dropout(hf_config: Mapping[str, Any] | None) -> None:
    """Says that training has no dropout where the model's own config asks for some."""
    asked = {key: value for key in DROPOUT if (value := (hf_config or {}).get(key))}
    if asked:
        keys = ", ".join(f"{key}={value}" for key, value in asked.items())
        logger.info("Training has no dropout: %s of the model's config.json is not applied.", keys)


def describe(session: Session) -> None:
    """Writes what the run is, once it is sure that the checkpoints in its folder are its own; rank 0 does it."""
    plan = session.plan
    _tell_other_windows(session)
    _keep_record(plan)
    write_text(plan.output / RECIPE, to_yaml(plan.config))
    tell_dropout(None if plan.source is None else plan.source.hf_config)
    write_json(
        plan.output / "environment.json",
        collect_environment(
            host=socket.gethostname(),
            device=device_name(),
            world_size=plan.world_size,
            num_layers=plan.model.num_layers,
            parameters=plan.parameters,
            mfu_formula=session.meter.formula,
        ),
    )
    source = plan.source
    write_json(
        plan.output / MANIFEST,
        {
            "kind": "run",
            "config_hash": config_hash(plan.config),
            "started_from": None if source is None else _start_of(plan, source),
            "identity": session.identity.to_json(),
            "evaluation": None if session.windows is None else session.windows.fingerprint,
        },
    )


def _tell_other_windows(session: Session) -> None:
    """Warns that a run that goes on is measured on other windows from here on."""
    before = _read_manifest(session.plan.output).get("evaluation")
    now = None if session.windows is None else session.windows.fingerprint
    if session.saved and before and now and before != now:
        logger.warning(
            "eval.windows holds other windows than in the session before: validation losses up to step %d and after it "
            "cannot be compared, and sharing.untie.patience compares them. Set eval.windows back.",
            session.saved,
        )


def _start_of(plan: RunPlan, source: Source) -> dict[str, Any]:
    section = plan.config.model
    about = {"named": section.path, "init": section.init, "values": _sampled_values(plan)}
    return {"path": source.path, "identity": dict(source.identity), **about}


def _keep_record(plan: RunPlan) -> None:
    """Copies the record of the inheritance into the run's folder, where a report finds it when the start is gone."""
    kept = plan.output / RECORD
    if plan.config.model.path is None:
        kept.unlink(missing_ok=True)
        return
    record = Path(plan.config.model.path) / RECORD
    if record.is_file():
        shutil.copyfile(record, kept)


def _began_from(folder: Path) -> dict[str, Any] | None:
    """Gives what a run's manifest says of its start, nothing for a preset; None if it cannot be read."""
    manifest = _read_manifest(folder)
    return (manifest["started_from"] or {}) if "started_from" in manifest else None


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Reads a run's manifest; nothing if it cannot be read."""
    try:
        value = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
