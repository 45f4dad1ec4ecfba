"""``minherit report``: one page and one picture of runs and studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Draw runs and studies on one page.", rich_markup_mode=None)


@app.command()
def report(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN_OR_STUDY...", help="Run folders and study folders.")],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file; default FIRST/report.html.")] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "",
    price: Annotated[float | None, typer.Option(help="Money for one device-hour, for the cost lines.")] = None,
    analysis: Annotated[list[Path] | None, typer.Option(help="JSON of 'minherit analyze' to show; repeatable.")] = None,
) -> None:
    """Write one self-contained HTML file and, beside it, a PNG of the curves and the table."""
    from megatron_inherit.eval.report import write_report

    page, picture = write_report(
        paths, out=out or paths[0] / "report.html", title=title, price=price, analyses=analysis or ()
    )
    typer.echo(f"{page}\n{picture}")
