"""Any checkpoint as a Hugging Face folder, and such a folder as a transformers model, without the network."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_inherit.base.errors import CheckpointError, DataError, UsageError
from megatron_inherit.base.optional import require
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.plan.convert import plan_conversion
from megatron_inherit.plan.execute import execute

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@contextlib.contextmanager
def as_hf_folder(path: Path | str) -> Iterator[Path]:
    """Gives a Hugging Face folder that holds the checkpoint: itself, or a temporary export that is removed after use.

    Args:
        path: A checkpoint of any format, or a run folder, whose newest step is taken.
    """
    with open_source(path) as source:
        if source.format == "hf":
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="minherit-") as folder:
            execute(plan_conversion(source), Path(folder, "model"), source=source)
            yield Path(folder, "model")


def load_model(folder: Path, *, device: str = "cpu", dtype: str = "fp32", **options: Any) -> Any:
    """Loads ``AutoModelForCausalLM`` in evaluation mode; code beside the weights is never run.

    Args:
        folder: A Hugging Face folder.
        device: ``cpu`` or ``cuda``.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        options: Further arguments of ``from_pretrained``.

    Raises:
        CheckpointError: transformers cannot open the folder.
    """
    transformers = _transformers()
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype {dtype!r}.", expected=f"one of {', '.join(DTYPES)}")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, dtype=DTYPES[dtype], **options
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"transformers cannot open {folder}: {error}") from error
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """Loads the folder's tokenizer.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    try:
        return _transformers().AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder} has no tokenizer that can be read: {error}",
            fix="Put the tokenizer's files (tokenizer.json, tokenizer_config.json) into the folder.",
        ) from error


def chosen_device(name: str) -> str:
    """Gives the device of a name, or the default one for an empty name.

    Raises:
        UsageError: This machine, or its build of torch, has no such device.
    """
    import torch

    if not name:
        return default_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        fix = "Leave --device out, or pass cpu."
        raise UsageError(f"--device {name} cannot be used: {reason}.", fix=fix) from error
    return name


def default_device() -> str:
    """Gives ``cuda`` where a device answers, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = require("transformers", "opening Hugging Face folders")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
