"""The committed sbatch scripts are what the command prints."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_inherit.cli.launch import app

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "slurm"
ROWS = re.findall(r"^\| `(\w+\.sbatch)` \| (.+) \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("name", "made_by"), ROWS)
def test_the_script_is_what_its_row_prints(name, made_by):
    same = made_by.startswith("the same with")
    words = shlex.split(re.search(r"`minherit launch (.+?)`", ROWS[0][1] if same else made_by)[1])
    if same:
        words += shlex.split(re.search(r"`(.+)`", made_by)[1])
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert (FOLDER / name).read_text() == done.output


def test_every_script_has_its_row():
    assert sorted(path.name for path in FOLDER.glob("*.sbatch")) == sorted(name for name, _ in ROWS)
