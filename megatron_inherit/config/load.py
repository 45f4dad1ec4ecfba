"""Reads a recipe: YAML by name or path, dotted overrides, one clear line for every mistake; needs no torch."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.config.schema import RunConfig

LARGEST_RECIPE_BYTES = 1 << 20
RECIPES = "megatron_inherit.recipes"

Checked = TypeVar("Checked", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML without duplicate keys and without anchors, which could make a small file very large."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses anchors."""
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ConfigError(f"Line {event.start_mark.line + 1}: anchors and aliases are not allowed in a recipe.")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuses a key that stands twice."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConfigError(f"Line {key.start_mark.line + 1}: the key {key.value!r} stands twice.")
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads, changes and checks a recipe.

    Args:
        recipe: Name of a recipe of the package, or path of a YAML file.
        overrides: ``key.path=value`` words; values are YAML.

    Raises:
        ConfigError: Whatever is wrong, with the key's path.
    """
    path = find_recipe(recipe)
    values = read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    return build_config(values, where=str(recipe))


def recipe_names(package: str = RECIPES) -> list[str]:
    """Lists the recipes, or the studies, of the package."""
    folder = resources.files(package)
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def find_recipe(recipe: str | Path, *, package: str = RECIPES, kind: str = "recipe") -> Path:
    """Finds a recipe by path, or by name in the package.

    Args:
        recipe: Name or path.
        package: Where the named ones are.
        kind: What messages call it.

    Raises:
        ConfigError: There is none.
    """
    path, names = Path(recipe), recipe_names(package)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError(f"There is no {kind} file {path}.", fix=f"Those of the package: {', '.join(names)}.")
    if str(recipe) not in names:
        raise ConfigError(
            f"There is no {kind} {str(recipe)!r}.{_nearest(str(recipe), names)}",
            expected=f"a .yaml file or one of {', '.join(names)}",
        )
    return Path(str(resources.files(package) / f"{recipe}.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file whose top level is a mapping with words as keys."""
    try:
        data = path.read_bytes()
        if len(data) > LARGEST_RECIPE_BYTES:
            raise ConfigError(f"{path} is too large for a recipe.", got=f"{len(data)} bytes")
        return _mapping(_parse(data.decode("utf-8")), str(path))
    except ConfigError as error:
        raise error if str(path) in error.what else _at(error, str(path)) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text.", got=f"byte {error.object[error.start]:#x} at {error.start}"
        ) from error


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one ``key.path=value`` in nested mappings; the value is YAML."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{override!r} is not an override.", expected="key.path=value")
    section = values
    for depth, key in enumerate(keys[:-1], start=1):
        below = section.setdefault(key, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{'.'.join(keys[:depth])}: has no keys below it.", got=f"the override {override!r}")
        section = below
    try:
        section[keys[-1]] = _parse(text)
    except ConfigError as error:
        raise _at(error, f"override {path.strip()}") from error


def build_config(values: dict[str, Any], *, where: str = "recipe") -> RunConfig:
    """Checks nested mappings against the schema.

    Args:
        values: Sections and keys.
        where: What messages call their origin.
    """
    return validate(RunConfig, values, where=where)


def validate(schema: type[Checked], values: dict[str, Any], *, where: str) -> Checked:
    """Checks nested mappings against any schema.

    Raises:
        ConfigError: The first three mistakes, each with its key and, for an unknown one, the nearest.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = list(_sentences(error, schema))
        more = f" (and {len(lines) - 3} more mistakes)" if len(lines) > 3 else ""
        raise ConfigError(f"{where}: {' '.join(lines[:3])}{more}") from error
    except ConfigError as error:
        raise _at(error, where) from error


def to_yaml(config: RunConfig) -> str:
    """Writes a resolved recipe; loading it gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_hash(config: RunConfig) -> str:
    """Hashes all values that a recipe resolves to."""
    return hashlib.blake2b(
        json.dumps(config.model_dump(mode="json"), sort_keys=True).encode(), digest_size=8
    ).hexdigest()


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Gives nested mappings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"Line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{line}not YAML: {getattr(error, 'problem', None) or 'unreadable character'}.") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"A value cannot be read: {str(error).splitlines()[0]}.") from error
    except RecursionError as error:
        raise ConfigError("Too deeply nested.") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        raise ConfigError(f"{where}: the recipe is empty.")
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: a recipe is a mapping of sections.", got=type(value).__name__)
    return value


def _at(error: ConfigError, where: str) -> ConfigError:
    return ConfigError(f"{where}: {error.what}", got=error.got, expected=error.expected, fix=error.fix)


def _sentences(error: ValidationError, schema: type[BaseModel]) -> Iterator[str]:
    for problem in error.errors(include_url=False, include_context=False):
        key = _short(".".join(str(part) for part in problem["loc"])) or "top level"
        kind = problem["type"]
        if kind == "extra_forbidden":
            yield f"{key}: unknown key.{_suggest(problem['loc'], schema)}"
        elif kind == "missing":
            yield f"{key}: missing."
        else:
            reason = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
            yield f"{key}: {reason} (got {_short(_repr(problem['input']))})."


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return type(value).__name__


def _short(text: str) -> str:
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= 60 else text[:57] + "..."


def _suggest(location: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """Looks for the nearest key in the same section, then for the same word in any section."""
    words = [str(part) for part in location]
    section = _section(words[:-1], schema)
    here = [".".join((*words[:-1], name)) for name in section.model_fields] if section else []
    close = difflib.get_close_matches(".".join(words), here, n=1, cutoff=0.75)
    elsewhere = [key for key in all_keys(schema) if key.rpartition(".")[2] == words[-1]]
    found = (
        close or elsewhere or difflib.get_close_matches(".".join(words), [*here, *all_keys(schema)], n=1, cutoff=0.3)
    )
    return f" Nearest: {found[0]}." if found else ""


def _nearest(word: str, words: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.4)
    return f" Nearest: {found[0]}." if found else ""


def _section(words: Sequence[str], schema: type[BaseModel]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = schema
    for word in words:
        if section is None or word.isdigit():
            continue
        field = section.model_fields.get(word)
        section = next(iter(_sections_in(field.annotation)), None) if field else None
    return section


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def all_keys(schema: type[BaseModel] = RunConfig) -> list[str]:
    """Lists every dotted key that a recipe, or another schema, may hold."""
    keys = []
    for name, field in schema.model_fields.items():
        section = next(iter(_sections_in(field.annotation)), None)
        keys += [f"{name}.{key}" for key in section.model_fields] if section else [name]
    return keys
