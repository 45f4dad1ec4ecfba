"""``minherit study``: runs the arms of a study, and shows what they found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_inherit.study.compare import Findings

app = typer.Typer(no_args_is_help=True, help="Run and compare the arms of a study.", rich_markup_mode=None)


@app.command()
def run(
    study: Annotated[str, typer.Argument(help="Name of a shipped study, or path of a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value words for the study or its recipe.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder; default the study's own.")] = None,
    arm: Annotated[list[str] | None, typer.Option("--arm", help="Only this arm; repeatable.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes, and GPUs, of each run.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, list the runs and their state, and stop.")] = False,
) -> None:
    """Run every arm that is not finished; run again to go on after an interruption."""
    from megatron_inherit.base.quantities import format_count
    from megatron_inherit.study.arms import is_finished
    from megatron_inherit.study.runner import chosen_jobs, require_inputs, run_study
    from megatron_inherit.study.schema import load_study

    loaded = load_study(study, overrides or [], folder=out)
    if dry_run:
        jobs = chosen_jobs(loaded, arm or ())
        for job in (*([loaded.teacher] if loaded.teacher else []), *jobs):
            state = "finished" if is_finished(job.config) else "to run"
            steps, budget = job.config.train.steps, job.config.train.budget
            length = f"{steps} steps" if steps else f"{format_count(budget or 0)} tokens"
            typer.echo(f"{state:9} {job.name:32} {length:>12}  {job.folder}")
        require_inputs(loaded, jobs)
        return
    run_study(loaded, arms=arm or (), processes=processes)
    typer.echo(f"{loaded.folder}: show it with 'minherit study show {loaded.folder} --study {loaded.section.name}'")


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of a study.")],
    study: Annotated[str, typer.Option("--study", help="One of several in the folder.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="Where the files go; default the study's folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, write nothing.")] = False,
) -> None:
    """Print the table and the claims; write NAME.csv, NAME.png and NAME.md."""
    from megatron_inherit.base.errors import UsageError
    from megatron_inherit.study.compare import as_json as plain
    from megatron_inherit.study.compare import find_studies, read_findings

    paths = find_studies(folder)
    chosen = [path for path in paths if not study or path.stem == study]
    if not chosen:
        raise UsageError(
            f"{folder} holds no study {study!r}.", expected=f"one of {', '.join(path.stem for path in paths)}"
        )
    found = [read_findings(path) for path in chosen]
    if as_json:
        typer.echo(json.dumps([plain(one) for one in found], indent=2))
        return
    for one in found:
        _print(one)
        if one.groups:
            _write(one, out or folder)


def _print(found: Findings) -> None:
    from rich.console import Console
    from rich.table import Table

    from megatron_inherit.study.compare import table_of

    console = Console(width=None if sys.stdout.isatty() else 180)
    section = found.study.section
    console.print(f"[bold]{section.name}[/bold]: {section.question}")
    if found.teacher is not None and found.teacher.final is not None:
        console.print(f"teacher: {found.teacher.final['loss']:.3f} ± {found.teacher.final['stderr']:.3f} (windows)")
    header, lines = table_of(found)
    table = Table(*header)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    console.print(
        f"Losses in nats a token, mean over seeds {', '.join(map(str, section.seeds))}; gaps to {section.control!r}, "
        "paired by window / by seed; sooner: how many times fewer steps than the control to a loss that both reach."
    )
    for verdict in found.verdicts:
        gains = ", ".join(f"{gain:+.3f}" for gain in verdict.gains)
        state = "holds" if verdict.holds else "DOES NOT HOLD"
        console.print(f"{verdict.claim.id:5} {state:13} {verdict.claim.says}: {gains} ({verdict.bound})")
    for name in found.missing:
        console.print(f"not finished: {name}")


def _write(found: Findings, out: Path) -> None:
    from megatron_inherit.base.atomic import write_bytes, write_text
    from megatron_inherit.study.compare import rows_of, to_csv
    from megatron_inherit.study.pages import markdown, picture

    out.mkdir(parents=True, exist_ok=True)
    name = found.study.section.name
    write_text(out / f"{name}.csv", to_csv(rows_of(found)))
    write_text(out / f"{name}.md", markdown(found))
    write_bytes(out / f"{name}.png", picture(found))
    typer.echo(f"{out / name}.csv, .md, .png")
