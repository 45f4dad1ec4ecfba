"""``minherit train``: pretrains from a recipe, alone or as one process of torchrun, deepspeed or srun."""

from __future__ import annotations

import json
import logging
import os
import warnings
from typing import Annotated

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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, show what would run, and stop.")] = False,
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
    from megatron_inherit.train.inputs import open_data
    from megatron_inherit.train.preflight import plan_run

    config = load_recipe(recipe, overrides or [])
    if dry_run:
        plan = plan_run(config)
        open_data(plan, rank=0)
        typer.echo(to_yaml(config) + "# " + json.dumps(plan.summary()))
        return
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from megatron_inherit.train.loop import pretrain

    pretrain(config, resume="never" if resume == "never" else "auto", profile=profile)
