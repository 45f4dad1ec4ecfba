"""Writes the sbatch script of a run: site values as variables at the top, saved and requeued by the 75 protocol."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_inherit.base.errors import UsageError
from megatron_inherit.launch.commands import train_words

Container = Literal["none", "pyxis", "apptainer"]
_PLAIN = re.compile(r"[\w./:@%+=,#~-]*")
TEMPLATE = Path(__file__).with_name("slurm.sbatch.j2")


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What a site and a run need.

    Attributes:
        recipe: Recipe name or path.
        output: The run's folder; also holds the log files.
        overrides: ``key.path=value`` words.
        name: Job name.
        nodes, gpus_per_node, cpus_per_gpu: Size of the job; one task a GPU.
        time: Wall-clock limit in SLURM's form.
        partition, account, qos, constraint: Site values; empty ones are left out.
        warning_seconds: How long before the limit the run is asked to save.
        container: How the command is wrapped.
        image: Container image (pyxis: registry or .sqsh; apptainer: .sif).
        mounts: ``host:container`` pairs beside the folder of submission and the run's.
        setup: Shell line run before the step, for instance ``module load cuda``.
        python: Interpreter that has the package.
    """

    recipe: str
    output: str
    overrides: tuple[str, ...] = ()
    name: str = "minherit"
    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_gpu: int = 8
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    warning_seconds: int = 300
    container: Container = "none"
    image: str = ""
    mounts: tuple[str, ...] = ()
    setup: str = ""
    python: str = "python"

    def __post_init__(self) -> None:
        if self.container != "none" and not self.image:
            raise UsageError(f"--container {self.container} needs an image.", fix="Pass --image.")
        if min(self.nodes, self.gpus_per_node, self.cpus_per_gpu) < 1:
            raise UsageError("Nodes, GPUs and CPUs must be at least 1.")
        if any(word.startswith("run.output=") for word in self.overrides):
            raise UsageError("run.output: the script sets it to the job's own folder.", fix="Pass --output instead.")
        site = (self.name, self.partition, self.account, self.qos, self.constraint, self.time, self.output, self.python)
        for value in (*site, self.image, *self.mounts):
            if not _PLAIN.fullmatch(value):
                raise UsageError(
                    f"{value!r} cannot stand in an sbatch script.", expected="letters, digits and ._/:@%+=,#~- only"
                )


def render_sbatch(job: SlurmJob) -> str:
    """Gives the text of the sbatch script."""
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    values = asdict(job)
    values["train"] = [shlex.quote(word) for word in train_words(job.recipe, job.overrides)]
    values["mounts"] = ",".join(job.mounts)
    return environment.from_string(TEMPLATE.read_text()).render(values)


def submit(script: Path, extra: Sequence[str] = ()) -> str:
    """Hands a script to sbatch and gives its answer.

    Raises:
        UsageError: There is no sbatch on this machine, or it refused.
    """
    if shutil.which("sbatch") is None:
        raise UsageError("There is no sbatch on this machine.", fix="Run it on a login node, or leave --submit out.")
    done = subprocess.run(["sbatch", *extra, str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip()
