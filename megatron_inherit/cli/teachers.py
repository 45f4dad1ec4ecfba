"""How ``minherit inherit`` understands its teacher: a checkpoint, or a mere shape where everything is drawn anew."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.presets import PRESETS
from megatron_inherit.base.errors import CheckpointError, UsageError
from megatron_inherit.checkpoint.detect import open_source
from megatron_inherit.checkpoint.files import is_remote
from megatron_inherit.checkpoint.formats.hf_config import read_config
from megatron_inherit.checkpoint.stream import Source
from megatron_inherit.inherit.select import EXAMPLES, parse_auto, parse_layers


def open_teacher(teacher: str, *, everything_fresh: bool) -> tuple[Source | None, ModelConfig]:
    """Opens a checkpoint; with ``everything_fresh`` a preset's name or a ``config.json`` does too.

    Raises:
        CheckpointError: There is no such checkpoint.
        UsageError: A shape without weights is given though something is to be inherited.
    """
    shape = _shape(teacher)
    if shape is None:
        if not is_remote(teacher) and not Path(teacher).exists():
            raise CheckpointError(f"{teacher} does not exist.", fix=_meant(teacher))
        source = open_source(teacher)
        return source, source.config
    if not everything_fresh:
        raise UsageError(f"{teacher} is a shape without weights.", fix="Pass --reset all, or the path of a checkpoint.")
    return None, shape


def foresee_layers(text: str, config: ModelConfig) -> tuple[int, ...]:
    """Gives as many blocks as ``choose_layers`` will, without measuring anything.

    Raises:
        UsageError: The choice is missing or not understood.
    """
    if not text.startswith("auto:"):
        return choose_layers(text, "", config)
    return tuple(range(parse_auto(text, config.num_layers)[1]))


def choose_layers(text: str, teacher: str, config: ModelConfig) -> tuple[int, ...]:
    """Reads ``--layers``; ``auto:METRIC:N`` measures the teacher first.

    Raises:
        UsageError: The choice is missing or not understood.
    """
    if not text:
        raise UsageError("--layers is missing.", expected=f"all, {EXAMPLES} or auto:METRIC:N")
    if not text.startswith("auto:"):
        return parse_layers(text, config.num_layers)
    from megatron_inherit.eval.importance import resolve_layers

    return resolve_layers(text, teacher, config.num_layers)


def _shape(teacher: str) -> ModelConfig | None:
    if teacher in PRESETS and not Path(teacher).exists():
        return PRESETS[teacher]
    path = Path(teacher)
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        return read_config(json.loads(path.read_text()), where=teacher)
    except ValueError as error:
        raise CheckpointError(f"{teacher} is not valid JSON.", got=error) from error


def _meant(teacher: str) -> str:
    """Guesses what a path that is not there was to be."""
    if near := difflib.get_close_matches(teacher, PRESETS, n=1):
        return f"The nearest preset, for --reset all, is {near[0]}."
    if len(parts := teacher.split("/")) == 2 and all(parts):
        return f"Check the path; a model of the Hugging Face hub is written hf://{teacher}."
    return "Check the path of the checkpoint."
