"""Rules of the house that a linter does not know."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_inherit"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def test_help_does_not_import_torch():
    code = (
        "import sys\n"
        "from megatron_inherit.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_of_the_table_has_its_file():
    from megatron_inherit.cli.main import COMMANDS

    missing = [name for name in COMMANDS if not (PACKAGE / "cli" / f"{name}.py").exists()]
    assert not missing


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES, "split the file"
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long


def test_package_files_are_empty():
    filled = [p for p in PACKAGE.rglob("__init__.py") if p.parent != PACKAGE and p.read_text().strip()]
    assert not filled


def test_where_to_look_names_things_that_exist():
    rows = re.findall(
        r"^\|[^|]*\| `([\w/.]+\.\w+)(?::(\w+)(?:\(\))?)?` \|", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 8, "the README's where-to-look table was not found"
    for file, name in rows:
        path = PACKAGE / file if (PACKAGE / file).exists() else ROOT / file
        assert path.exists(), file
        if name:
            assert re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b", path.read_text(), re.MULTILINE), f"{file}:{name}"


def test_nothing_names_the_place_of_work():
    words = re.compile("/" + r"work/(main|shared|\.library)|\.\./" + "shared")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    found = [f for f in files if f and (ROOT / f).is_file() and words.search((ROOT / f).read_text(errors="ignore"))]
    assert not found
