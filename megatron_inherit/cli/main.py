"""The command line: a table of commands, each imported when it is called, and the exit codes of every failure."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from megatron_inherit import __version__
from megatron_inherit.base import log
from megatron_inherit.base.atomic import disk_error
from megatron_inherit.base.errors import MinheritError, UsageError

INTERRUPTED = 130
_CommandLineError: Any = typer.BadParameter.__mro__[2]  # typer 0.29 brings its own click, older ones use the package

COMMANDS = {
    "inherit": "Make a student out of a teacher's blocks.",
    "convert": "Rewrite a checkpoint in another format or layout.",
    "inspect": "Show what a checkpoint holds.",
    "verify": "Compare two checkpoints tensor by tensor.",
    "data": "Ingest, tokenize, subset and inspect training text.",
    "train": "Pretrain from a recipe.",
    "grow": "Grow a student until it matches its teacher.",
    "study": "Run the arms of a study and compare them.",
    "share": "Stages of shared weights: plan, distil, extract, expand.",
    "generate": "Continue a prompt.",
    "evaluate": "Score a checkpoint on tasks.",
    "analyze": "Measure attention rank and the importance of layers.",
    "export": "Write a training checkpoint as a Hugging Face folder.",
    "report": "Draw runs and studies on one page.",
    "launch": "Print or submit the command for a cluster.",
}
"""Command -> its line in ``--help``; the command lives in ``cli/<command>.py`` as ``app``."""


class LazyGroup(TyperGroup):
    """Knows the commands by name and imports only the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Gives the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Imports a command.

        Raises:
            UsageError: There is none of that name.
        """
        if cmd_name not in COMMANDS:
            near = difflib.get_close_matches(cmd_name, COMMANDS, n=1)
            fix = f"Did you mean '{near[0]}'?" if near else "'minherit --help' lists the commands."
            raise UsageError(f"There is no command '{cmd_name}'.", fix=fix)
        module = importlib.import_module(f"megatron_inherit.cli.{cmd_name}")
        module.app._add_completion = False
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the listing of ``--help`` from the table, without importing a command."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"minherit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
    debug: bool = typer.Option(False, "--debug", help="Show debug messages and tracebacks; may stand anywhere."),
) -> None:
    """Turn a large language model into a small one and pretrain it."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; default those of the process.

    Returns:
        The exit code: 0 done, 1 internal error or a difference found, 2 usage, 3 config, 4 data, 5 checkpoint,
        6 diverged, 7 disk, 75 preempted and saved, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or os.environ.get("MINHERIT_DEBUG") == "1"
    log.set_up(verbose=debug)
    try:
        result = app(args=[word for word in argv if word != "--debug"], prog_name="minherit", standalone_mode=False)
        sys.stdout.flush()
        if result == INTERRUPTED:
            typer.echo("Interrupted.", err=True)
        return result if isinstance(result, int) else 0
    except typer.Exit as error:
        return error.exit_code
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            return _reader_left()
        raise
    except _CommandLineError as error:
        error.show()
        return UsageError.exit_code
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("Interrupted.", err=True)
        return INTERRUPTED
    except MinheritError as error:
        return _fail(error, str(error), error.exit_code, debug)
    except BrokenPipeError:
        return _reader_left()
    except Exception as error:
        known = _foreseen(error) if isinstance(error, OSError) else error
        if isinstance(known, MinheritError):
            return _fail(known, str(known), known.exit_code, debug)
        hint = "This is a bug of minherit; run again with --debug for the traceback."
        return _fail(error, f"{type(error).__name__}: {error}. {hint}", 1, debug)


def _foreseen(error: OSError) -> Exception:
    """Knows full and closed disks, and what stands where a folder or a file is to be made."""
    in_the_way = isinstance(error, FileExistsError | IsADirectoryError) and error.filename
    return disk_error(error, Path(os.fsdecode(error.filename) if in_the_way else "the output"))


def _reader_left() -> int:
    """Ends quietly where the reader of a pipe has seen enough, as in ``| head``."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fail(error: Exception, message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    typer.echo(f"minherit: {message}", err=True)
    return code


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main())
