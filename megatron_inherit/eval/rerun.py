"""The commands that make again what a report shows."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

import yaml

from megatron_inherit.eval.growth_table import RECORD
from megatron_inherit.eval.runs import Run


def commands_of_run(run: Run) -> tuple[str, str, str]:
    """Says when and how a run was started, how as many processes make it again in a new folder, and how under SLURM."""
    program, _, words = str(run.environment.get("command") or "").partition(" ")
    made = f"{run.environment.get('date') or ''}  {Path(program).name} {words}" if program else ""
    path, world = run.path, int(run.environment.get("world_size") or 1)
    recipe, there = shlex.quote(str(path / "run.yaml")), f"run.output={shlex.quote(_new(path))}"
    nodes, gpus = _nodes(world)
    if nodes > 1:
        shape = f"--nodes {nodes} --gpus-per-node {gpus} --rendezvous HOST:29500"
        again = f"minherit launch torchrun {recipe} {there} {shape}"
    elif world > 1:
        again = f"torchrun --standalone --nproc-per-node={world} -m megatron_inherit train {recipe} {there}"
    else:
        again = f"minherit train {recipe} {there}"
    output = shlex.quote(_new(path, "slurm"))
    cluster = f"minherit launch slurm {recipe} --nodes {nodes} --gpus-per-node {gpus} --output {output}"
    return made.strip(), again, cluster


def commands_of_folders(folders: Iterable[Path]) -> list[tuple[str, str]]:
    """Gives the name of each growth and study in some folders, and the command that makes it again in a new one."""
    found = []
    for folder in map(Path, folders):
        there = shlex.quote(_new(folder))
        if (folder / RECORD).is_file():
            recipe = shlex.quote(str(folder / "grow.yaml"))
            found.append((f"growth {folder.resolve().name}", f"minherit grow {recipe} run.output={there}"))
        for path in studies_in(folder):
            found.append((f"study {path.stem}", f"minherit study run {shlex.quote(str(path))} --out {there}"))
    return found


def studies_in(folder: Path) -> list[Path]:
    """Lists the YAML files of studies in a folder."""
    return [path for path in sorted(folder.glob("*.yaml")) if path.is_file() and _is_study(path)]


def recipe_text(run: Run) -> str:
    """Gives a run's recipe as it was resolved."""
    path = run.path / "run.yaml"
    return path.read_text() if path.is_file() else ""


def _new(folder: Path, mark: str = "again") -> str:
    """Names a folder beside another; ``.`` and ``..`` have no name to add to."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return f"{named}-{mark}"


def _nodes(world: int) -> tuple[int, int]:
    """Spreads processes over nodes of eight GPUs, or of fewer where that leaves none over."""
    gpus = max(count for count in range(1, 9) if world % count == 0)
    return world // gpus, gpus


def _is_study(path: Path) -> bool:
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(values, dict) and {"arms", "question", "recipe"} <= values.keys()
