"""The table of checks in docs/formats.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_test_named_in_the_docs_exists():
    named = re.findall(r"`(\w+\.py)::(\w+)`", (ROOT / "docs" / "formats.md").read_text())
    assert len(named) > 30
    for file, name in named:
        texts = [path.read_text() for path in (ROOT / "tests").rglob(file)]
        assert any(re.search(rf"^ *(?:def|class) {name}\b", text, re.MULTILINE) for text in texts), f"{file}::{name}"
