"""``minherit report``: one page and one picture of runs and studies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_inherit.eval.page_table import PageTable

app = typer.Typer(no_args_is_help=True, help="Draw runs and studies on one page.", rich_markup_mode=None)


@app.command()
def report(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN_OR_STUDY...", help="Run folders and study folders.")],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file; default FIRST/report.html.")] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "",
    price: Annotated[float | None, typer.Option(help="Money for one device-hour, for the cost lines.")] = None,
    analysis: Annotated[list[Path] | None, typer.Option(help="JSON of 'minherit analyze' to show; repeatable.")] = None,
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="JSON of 'minherit evaluate --out' to show; repeatable.")
    ] = None,
) -> None:
    """Write one self-contained HTML file and, beside it, a PNG of the curves and the table."""
    from megatron_inherit.eval.report import write_report
    from megatron_inherit.eval.rerun import studies_in

    studies = [path.stem for folder in paths for path in studies_in(folder)]
    page, picture = write_report(
        paths,
        out=out or paths[0] / "report.html",
        title=title or (f"Study {studies[0]}" if len(studies) == 1 else ""),
        price=price,
        analyses=analysis or (),
        evaluations=evaluation or (),
        tables=_study_tables(paths),
    )
    _print_arms(paths)
    typer.echo(f"{page}\n{picture}")


def _study_tables(paths: list[Path]) -> list[PageTable]:
    """Gives the tables of the studies that were run in these folders, and of which an arm has finished."""
    from megatron_inherit.base.errors import ConfigError, DataError
    from megatron_inherit.base.log import get_logger
    from megatron_inherit.eval.rerun import studies_in
    from megatron_inherit.study.compare import read_findings
    from megatron_inherit.study.pages import page_tables

    tables: list[PageTable] = []
    for path in (path for folder in paths for path in studies_in(folder)):
        try:
            found = read_findings(path)
        except (ConfigError, DataError) as error:
            get_logger(__name__).warning("The tables of the study %s are left out: %s", path, error)
            continue
        tables += page_tables(found) if found.groups else []
    return tables


def _print_arms(paths: list[Path]) -> None:
    """Prints the table of the page: every figure comes from the runs' own files."""
    from rich.console import Console
    from rich.table import Table

    from megatron_inherit.base.quantities import format_count, format_seconds
    from megatron_inherit.eval.groups import group_runs
    from megatron_inherit.eval.run_facts import arms_of_groups
    from megatron_inherit.eval.runs import find_runs

    table = Table("run", "blocks", "tokens", "loss at start", "final loss", "against random", "tokens/s", "time")
    for arm in arms_of_groups(group_runs(find_runs(paths))):
        table.add_row(
            arm.label,
            str(arm.layers or ""),
            format_count(arm.tokens),
            "" if arm.start_loss is None else f"{arm.start_loss:.3f}",
            "" if arm.loss is None else f"{arm.loss:.3f}" + ("" if arm.stderr is None else f" ± {arm.stderr:.3f}"),
            "baseline" if arm.is_baseline else "" if arm.gap is None else f"{arm.gap:+.3f}",
            "" if arm.tokens_per_second is None else format_count(arm.tokens_per_second),
            "" if arm.seconds is None else format_seconds(arm.seconds),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
