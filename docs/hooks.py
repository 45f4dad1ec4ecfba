"""Pages of the site that are made from the code, so that they cannot go stale."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path

from mkdocs.structure.files import File
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from megatron_inherit.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[1]
BESIDE_THE_CODE = {
    "kernels.md": "megatron_inherit/kernels/README.md",
    "data_package.md": "megatron_inherit/data/README.md",
    "train.md": "megatron_inherit/train/README.md",
    "sharing.md": "megatron_inherit/sharing/README.md",
    "images.md": "docker/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Page of the site -> the file it is, kept beside what it describes."""


def on_files(files, config):
    """Adds the generated pages."""
    files.append(File.generated(config, "configuration.md", content=configuration_page()))
    for page, source in BESIDE_THE_CODE.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def configuration_page() -> str:
    """Writes every key of a recipe with its type, default and meaning."""
    out = [
        "# Configuration",
        "",
        "A recipe is one YAML file with these sections. Any key can be overridden on the command line as "
        "`section.key=value`. An unknown key, a duplicate key, NaN and infinity are errors that name the key "
        "(exit code 3).",
        "",
    ]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            out += _section(name, section)
        else:
            out += [f"## {name}", "", f"{_type(section)}, default `{field.default}`", ""]
    return "\n".join(out)


def _section(name: str, section: type[BaseModel]) -> list[str]:
    """Writes the keys of a section, and those of the sections in it below a heading of their own."""
    summary, meanings = _docstring(section)
    head = f"{'###' if '.' in name else '##'} {name}"
    rows = [head, "", summary, "", "| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        default = (
            "*required*"
            if field.default is PydanticUndefined and field.default_factory is None
            else f"`{_default(field)}`"
        )
        rows.append(f"| `{key}` | {_type(field.annotation)} | {default} | {meanings.get(key, '')} |")
    for key, field in section.model_fields.items():
        for inner in _sections_in(field.annotation):
            rows += ["", *_section(f"{name}.{key}", inner)]
    return [*rows, ""]


def _sections_in(annotation) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [inner for argument in typing.get_args(annotation) for inner in _sections_in(argument)]


def _default(field) -> object:
    value = field.default_factory() if field.default_factory is not None else field.default
    return "{}" if isinstance(value, BaseModel) else value


def _docstring(section: type[BaseModel]) -> tuple[str, dict[str, str]]:
    text = inspect.getdoc(section) or ""
    summary, _, attributes = text.partition("Attributes:")
    meanings: dict[str, str] = {}
    for entry in re.split(r"\n    (?=\S)", attributes):
        names, _, meaning = entry.strip().partition(": ")
        for key in names.split(","):
            meanings[key.strip()] = " ".join(meaning.split())
    return " ".join(summary.split()), meanings


def _type(annotation) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (tuple, list, dict):
        return (
            f"{'dict' if origin is dict else 'list'} of {', '.join(_type(a) for a in arguments if a is not Ellipsis)}"
        )
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section, below,"
    if arguments:
        return " or ".join("none" if a is type(None) else _type(a) for a in arguments)
    return {"int": "integer", "float": "number", "str": "text", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )
