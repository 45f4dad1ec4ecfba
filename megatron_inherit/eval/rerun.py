"""The commands that make again what a report shows."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

import yaml

from megatron_inherit.eval.growth_table import RECORD
from megatron_inherit.eval.runs import Run


def commands_of_run(run: Run) -> tuple[str, str, str]:
    """Says when and how a run was started, how it is made again in a new folder, and how that is done under SLURM."""
    program, _, words = str(run.environment.get("command") or "").partition(" ")
    made = f"{run.environment.get('date') or ''}  {Path(program).name} {words}" if program else ""
    recipe = shlex.quote(str(run.path / "run.yaml"))
    again = f"minherit train {recipe} run.output={shlex.quote(str(run.path))}-again"
    cluster = f"minherit launch slurm {recipe} --nodes 4 --gpus-per-node 8 --output {shlex.quote(str(run.path))}-slurm"
    return made.strip(), again, cluster


def commands_of_folders(folders: Iterable[Path]) -> list[tuple[str, str]]:
    """Gives the name of each growth and study in some folders, and the command that makes it again in a new one."""
    found = []
    for folder in map(Path, folders):
        there = shlex.quote(f"{folder}-again")
        if (folder / RECORD).is_file():
            recipe = shlex.quote(str(folder / "grow.yaml"))
            found.append((f"growth {folder.resolve().name}", f"minherit grow {recipe} run.output={there}"))
        for path in studies_in(folder):
            found.append((f"study {path.stem}", f"minherit study run {shlex.quote(str(path))} --out {there}"))
    return found


def studies_in(folder: Path) -> list[Path]:
    """Lists the YAML files of studies in a folder."""
    return [path for path in sorted(folder.glob("*.yaml")) if _is_study(path)]


def recipe_text(run: Run) -> str:
    """Gives a run's recipe as it was resolved."""
    path = run.path / "run.yaml"
    return path.read_text() if path.is_file() else ""


def _is_study(path: Path) -> bool:
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(values, dict) and {"arms", "question", "recipe"} <= values.keys()
