"""What a run is and began from; the start does not change while its checkpoints are there."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_inherit.base.atomic import write_json, write_text
from megatron_inherit.base.environment import collect_environment
from megatron_inherit.base.errors import ConfigError
from megatron_inherit.base.log import get_logger
from megatron_inherit.config.load import config_hash, to_yaml
from megatron_inherit.plan.execute import RECORD
from megatron_inherit.train.preflight import RunPlan

if TYPE_CHECKING:
    from megatron_inherit.train.session import Session

logger = get_logger(__name__)

RECIPE, MANIFEST = "run.yaml", "manifest.json"
DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout")
"""Keys of a Hugging Face config that ask for dropout."""


def refuse_other_start(plan: RunPlan) -> None:
    """Makes sure that a run that is continued began from ``model.path``; a folder that moved is taken on trust.

    Raises:
        ConfigError: It began from another folder that is still there.
    """
    began = _began_from(plan.output)
    path = plan.config.model.path
    if not began or not path or not os.path.exists(began) or not os.path.exists(path):
        return
    if not os.path.samefile(began, path):
        raise ConfigError(
            f"model.path: the run in {plan.output} began from another folder, and would go on from its own weights.",
            got=path,
            expected=began,
            fix="Set run.output to another folder to train this start.",
        )


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
            "started_from": None if source is None else {"path": source.path, "identity": dict(source.identity)},
            "identity": session.identity.to_json(),
            "evaluation": None if session.windows is None else session.windows.fingerprint,
        },
    )


def _keep_record(plan: RunPlan) -> None:
    """Copies the record of the inheritance into the run's folder, where a report finds it when the start is gone."""
    kept = plan.output / RECORD
    if plan.config.model.path is None:
        kept.unlink(missing_ok=True)
        return
    record = Path(plan.config.model.path) / RECORD
    if record.is_file():
        shutil.copyfile(record, kept)


def _began_from(folder: Path) -> str:
    try:
        return (json.loads((folder / MANIFEST).read_text()).get("started_from") or {}).get("path", "")
    except (OSError, ValueError, AttributeError):
        return ""
