"""What DeepSpeed's checkpoints do not say: which model it is and whose names its parameters have.

DeepSpeed saves any module. The shape comes from a Hugging Face ``config.json`` in or above the checkpoint's folder, or
from the ``args`` that Megatron-DeepSpeed puts into the model states; the names are Hugging Face's or Megatron's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.checkpoint.formats.hf import ROWS
from megatron_inherit.checkpoint.formats.hf_config import read_config
from megatron_inherit.checkpoint.formats.megatron_args import config_from_args
from megatron_inherit.checkpoint.formats.megatron_names import DIALECTS, megatron_rows
from megatron_inherit.checkpoint.formats.pickle_reader import fields
from megatron_inherit.checkpoint.layout import LayoutRow, physical_tensors

_PLAIN = "language_model."
_PREFIXES = ("", "module.", "model.", "module.model.")


def find_config(folder: Path, states: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Any] | None]:
    """Finds the model's shape.

    Args:
        folder: The folder with the files of one step.
        states: Content of a model states file.

    Returns:
        The shape, and the ``config.json`` if it came from one.

    Raises:
        CheckpointError: Neither a ``config.json`` nor Megatron's args are there.
    """
    for place in (folder, folder.parent):
        path = place / "config.json"
        if path.is_file():
            try:
                raw = json.loads(path.read_bytes())
            except ValueError as error:
                raise CheckpointError(f"{path} is not valid JSON.", got=str(error)[:200]) from error
            return read_config(raw, where=str(path)), raw
    args = fields(states.get("args"))
    if args:
        return config_from_args(args, where=str(folder)), None
    raise CheckpointError(
        f"{folder} does not say which model it holds.",
        fix="Put the model's Hugging Face config.json into the folder: DeepSpeed does not save the shape.",
    )


def find_rows(names: Iterable[str], config: ModelConfig, *, where: str) -> tuple[str, str, tuple[LayoutRow, ...]]:
    """Tells whose names the parameters have.

    Args:
        names: Names of the parameters.
        config: The model.
        where: Path for the message.

    Returns:
        The dialect (``hf`` or a Megatron one), the prefix before every name, and the table.

    Raises:
        CheckpointError: No table knows any of the names.
    """
    found = set(names)
    tables = {"hf": ROWS[config.family]}
    tables |= {dialect: megatron_rows(config, dialect, gate_up="concat") for dialect in DIALECTS}
    best = (0, "", "", tables["hf"])
    for dialect, rows in tables.items():
        wanted = [tensor.name for tensor in physical_tensors(rows, config)]
        for prefix in _PREFIXES:
            known = sum(prefix + name in found for name in wanted)
            if known > best[0]:
                best = (known, dialect, prefix, rows)
    if not best[0]:
        raise CheckpointError(
            f"{where}: the names of its parameters belong to no known model.", got=", ".join(sorted(found)[:3])
        )
    return best[1:]


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Renames the parameters of a pipelined Megatron-DeepSpeed model (``GPTModelPipe``) as those of its plain one.

    Pipelines name a parameter by the index of its layer in the pipeline, which counts reshapes and the embedding too,
    so blocks are numbered by the order of the indices that have attention.

    Args:
        names: Names of the parameters.

    Returns:
        The plain name of each; names of other models stay as they are.
    """
    found = list(names)
    numbered = {name: match for name in found if (match := re.fullmatch(r"(\d+)\.(.*)", name))}
    blocks = sorted({int(match[1]) for match in numbered.values() if "attention." in match[2]})
    renamed = {name: name.replace("tied_modules.embed.", f"{_PLAIN}embedding.") for name in found}
    for name, match in numbered.items():
        index, rest = int(match[1]), match[2]
        if index in blocks:
            renamed[name] = f"{_PLAIN}encoder.layers.{blocks.index(index)}.{rest}"
        elif rest.endswith("_embeddings.weight"):
            renamed[name] = f"{_PLAIN}embedding.{rest}"
        elif rest == "lm_head.weight":
            renamed[name] = f"{_PLAIN}output_layer.weight"
        elif rest in ("weight", "bias"):
            renamed[name] = f"{_PLAIN}encoder.final_layernorm.{rest}"
    return renamed


def tied_names(config: ModelConfig) -> tuple[str, ...]:
    """Gives regular expressions of a tied head's names, which stand for no tensor of their own."""
    if not config.tied:
        return ()
    heads = {row.physical for row in ROWS[config.family] if row.parts == ("head.weight",)}
    heads |= {names.head for names in DIALECTS.values()} | {names.tied_head for names in DIALECTS.values()}
    return tuple(f"(.*\\.)?{re.escape(head)}" for head in sorted(heads))
