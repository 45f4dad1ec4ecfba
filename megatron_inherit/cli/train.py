"""``minherit train``: pretrains from a recipe, alone or as one process of torchrun, deepspeed or srun."""

from __future__ import annotations

import json
import logging
import os
import warnings
from typing import Annotated, Literal

import typer

from megatron_inherit.base import log
from megatron_inherit.base.errors import UsageError
from megatron_inherit.base.ranks import adopt_launcher

app = typer.Typer(help="Pretrain from a recipe.", rich_markup_mode=None, no_args_is_help=True)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe name or path of a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY.PATH=VALUE", help="Overrides of the recipe, such as optimizer.lr=1e-4."),
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on from the newest whole checkpoint; never: refuse one.")
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check all that can be checked without a GPU, show what would run, and stop."),
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Of --dry-run: how many processes the run will have.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Write a torch trace of a few steps.")] = False,
) -> None:
    """Pretrain from a recipe; run again to go on after an interruption."""
    if resume not in ("auto", "never"):
        raise UsageError(f"--resume {resume} is unknown.", expected="auto or never")
    before = os.environ.get("RANK")
    adopt_launcher(os.environ)
    if os.environ.get("RANK") != before:
        log.set_up(verbose=log.get_logger(__name__).isEnabledFor(logging.DEBUG))
    from megatron_inherit.config.load import load_recipe, to_yaml

    config = load_recipe(recipe, overrides or [])
    mode: Literal["auto", "never"] = "never" if resume == "never" else "auto"
    if dry_run:
        from megatron_inherit.train.preflight import plan_run
        from megatron_inherit.train.rehearsal import rehearse

        plan = plan_run(config, world_size=processes)
        rehearse(plan, resume=mode)
        typer.echo(to_yaml(config) + "# " + json.dumps(plan.summary()))
        return
    if processes is not None:
        raise UsageError("--processes belongs to --dry-run.", fix="The launcher starts the processes of a run.")
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from megatron_inherit.train.loop import pretrain

    pretrain(config, resume=mode, profile=profile)
