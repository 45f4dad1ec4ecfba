"""The pages of the site that are made from the code."""

import importlib.util
from pathlib import Path

import pytest
from pydantic import BaseModel

from megatron_inherit.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks.configuration_page()


def test_every_key_of_a_recipe_stands_on_the_page_with_a_meaning(page):
    tables = {part.partition("\n")[0]: part for part in page.replace("\n### ", "\n## ").split("\n## ")[1:]}
    schema = RunConfig.model_json_schema()
    reached = set()

    def look(name, properties):
        for key, value in properties.items():
            row = next((line for line in tables[name].splitlines() if line.startswith(f"| `{key}` |")), "")
            assert row.rsplit("|", 2)[1].strip() if row else False, f"{name}.{key} has no meaning on the page"
            for inner in sections_in(value):
                assert f"{name}.{key}" in tables, f"{name}.{key} has no heading"
                look(f"{name}.{key}", schema["$defs"][inner]["properties"])
        reached.add(name)

    def sections_in(value):
        if isinstance(value, dict):
            found = [value["$ref"].rpartition("/")[2]] if "$ref" in value else []
            return found + [inner for one in value.values() for inner in sections_in(one)]
        return [inner for one in value for inner in sections_in(one)] if isinstance(value, list) else []

    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            look(name, schema["$defs"][field.annotation.__name__]["properties"])
    assert {"train.batch_ramp", "eval.tasks", "sharing.untie", "deepspeed.aio"} <= reached


def test_types_and_defaults_are_whole_code(page):
    for line in page.splitlines():
        assert "```" not in line
        assert line.replace("``", "").count("`") % 2 == 0, line
    assert "`deepspeed` or `megatron`, default `megatron`" in page
