"""``minherit launch``: prints or submits what starts a run on a machine or a cluster."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from megatron_inherit.base import atomic
from megatron_inherit.config.load import load_recipe
from megatron_inherit.launch import commands
from megatron_inherit.launch.slurm import SlurmJob, render_sbatch, submit
from megatron_inherit.train.preflight import check_batches

app = typer.Typer(no_args_is_help=True, help="Print or submit the command for a cluster.", rich_markup_mode=None)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe name or path.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Overrides of the recipe.")]
Gpus = Annotated[int, typer.Option("--gpus-per-node", help="Processes a node.")]
Nodes = Annotated[int, typer.Option("--nodes", help="Number of nodes.")]


@app.command()
def torchrun(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus_per_node: Gpus = 8,
    nodes: Nodes = 1,
    rendezvous: Annotated[str | None, typer.Option(help="HOST:PORT of the first node.")] = None,
) -> None:
    """Print the torchrun command; with several nodes run it on each."""
    _check(recipe, overrides, nodes * gpus_per_node)
    words = commands.torchrun_words(
        recipe, overrides or (), gpus_per_node=gpus_per_node, nodes=nodes, rendezvous=rendezvous
    )
    typer.echo(shlex.join(words))


@app.command()
def deepspeed(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus_per_node: Gpus = 8,
    hostfile: Annotated[str | None, typer.Option(help="File of 'host slots=N' lines.")] = None,
) -> None:
    """Print the command of DeepSpeed's launcher."""
    _check(recipe, overrides, None if hostfile else gpus_per_node)
    typer.echo(
        shlex.join(commands.deepspeed_words(recipe, overrides or (), gpus_per_node=gpus_per_node, hostfile=hostfile))
    )


@app.command()
def slurm(
    recipe: Recipe,
    overrides: Overrides = None,
    output: Annotated[str, typer.Option(help="The run's folder on a file system that all nodes see.")] = "runs/slurm",
    name: Annotated[str, typer.Option(help="Job name.")] = "minherit",
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 8,
    cpus_per_gpu: Annotated[int, typer.Option(help="CPU cores a GPU.")] = 8,
    time: Annotated[str, typer.Option(help="Wall-clock limit, SLURM's form.")] = "24:00:00",
    partition: Annotated[str, typer.Option(help="As sbatch has it.")] = "",
    account: Annotated[str, typer.Option(help="As sbatch has it.")] = "",
    qos: Annotated[str, typer.Option(help="As sbatch has it.")] = "",
    constraint: Annotated[str, typer.Option(help="As sbatch has it.")] = "",
    warning_seconds: Annotated[int, typer.Option(help="Seconds before the limit at which the run saves.")] = 300,
    container: Annotated[str, typer.Option(help="none, pyxis or apptainer.")] = "none",
    image: Annotated[str, typer.Option(help="Container image.")] = "",
    mount: Annotated[
        list[str] | None,
        typer.Option(help="host:container; may be repeated. This folder and --output are seen as they are."),
    ] = None,
    setup: Annotated[str, typer.Option(help="Shell line before the step, such as 'module load cuda'.")] = "",
    python: Annotated[str, typer.Option(help="Interpreter that has the package.")] = "python",
    script: Annotated[Path | None, typer.Option(help="Write the script here instead of printing it.")] = None,
    send: Annotated[bool, typer.Option("--submit", help="Hand the script to sbatch.")] = False,
) -> None:
    """Print, write or submit an sbatch script."""
    if container not in ("none", "pyxis", "apptainer"):
        raise typer.BadParameter("--container is none, pyxis or apptainer.")
    _check(recipe, overrides, nodes * gpus_per_node)
    job = SlurmJob(
        recipe=recipe,
        output=output,
        overrides=tuple(overrides or ()),
        name=name,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_gpu=cpus_per_gpu,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        warning_seconds=warning_seconds,
        container=container,  # type: ignore[arg-type]
        image=image,
        mounts=tuple(mount or ()),
        setup=setup,
        python=python,
    )
    text = render_sbatch(job)
    if script is None and not send:
        typer.echo(text, nl=False)
        return
    Path(output).mkdir(parents=True, exist_ok=True)
    path = script or Path(output, f"{name}.sbatch")
    atomic.write_text(path, text)
    typer.echo(submit(path) if send else str(path))


def _check(recipe: str, overrides: list[str] | None, processes: int | None = None) -> None:
    """Finds, before hours in a queue, a slip in the recipe or a batch that the processes cannot share."""
    config = load_recipe(recipe, overrides or [])
    if processes is not None:
        check_batches(config, processes)
