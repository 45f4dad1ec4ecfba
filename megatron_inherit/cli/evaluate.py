"""``minherit evaluate``: scores of a checkpoint on tasks, beside published ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
import xxhash

app = typer.Typer(no_args_is_help=True, help="Score a checkpoint on tasks.", rich_markup_mode=None)
LONGEST_NAME = 100
"""Characters of tasks' names in a file's; file systems have 255."""


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of any format, or a run folder.")],
    tasks: Annotated[str, typer.Option(help="Names, separated by commas.")] = "",
    suite: Annotated[str, typer.Option(help="inheritune or inheritune-gpt2.")] = "",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of local task files; without it lm-eval's data.")
    ] = None,
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Leave out tasks without a file.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="First items of each task only.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt of lm-eval's own tasks; default the suite's.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="auto, or a number.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16; default: bf16 on a GPU.")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
) -> None:
    """Run lm-eval and print each result with its standard error.

    With --data-dir the tasks are read from files there and nothing is fetched; the table of names, files and prompts
    is eval/harness/tasks.yaml. A run folder keeps its results in evaluations/, where 'minherit report' finds them.
    """
    from megatron_inherit.base.atomic import write_json
    from megatron_inherit.base.errors import UsageError
    from megatron_inherit.eval import hf_folder
    from megatron_inherit.eval.harness import run

    if batch_size != "auto" and not (batch_size.isdigit() and int(batch_size)):
        raise UsageError("--batch-size is auto or a positive number.", got=batch_size)
    if shots is not None and data_dir is not None:
        raise UsageError(
            "--shots is for lm-eval's own tasks: a local file's prompts have theirs (5 for mmlu, else none).",
            fix="Leave --shots or --data-dir out.",
        )
    names, chosen = run.plan_tasks(
        [name.strip() for name in tasks.split(",") if name.strip()], suite or None, data_dir, skip_missing=skip_missing
    )
    device = hf_folder.chosen_device(device)
    dtype = dtype or ("bf16" if device.startswith("cuda") else "fp32")
    size = batch_size if batch_size == "auto" else int(batch_size)
    with hf_folder.as_hf_folder(checkpoint) as folder:
        weights = str(checkpoint) if folder == checkpoint else _weights_of(checkpoint)
        model = run.hf_model(folder, device=device, dtype=dtype, batch_size=size)
        rows = run.evaluate(model, names, chosen=chosen, data_dir=data_dir, limit=limit, shots=shots)
    for line in aligned(run.table(rows, chosen)):
        typer.echo(line)
    target = out or _place(checkpoint, suite or ",".join(names), limit)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        found = run.to_json(
            rows, checkpoint=str(checkpoint), weights=weights, chosen=chosen, limit=limit, device=device
        )
        write_json(target, found)
        typer.echo(str(target))


def aligned(lines: list[list[str]]) -> list[str]:
    """Pads cells to columns, the first left, the others right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]


def _place(checkpoint: Path, name: str, limit: int | None) -> Path | None:
    """Gives a run's file for these tasks, so that other tasks, or a look at a few items, do not replace its results."""
    if not (checkpoint / "metrics.jsonl").is_file():
        return None
    words = re.sub(r"[^\w.,+-]", "_", name)
    if len(words) > LONGEST_NAME:
        words = f"{words[:LONGEST_NAME]}-{xxhash.xxh3_64_hexdigest(name.encode())[:8]}"
    return checkpoint / "evaluations" / (words + (f"-first{limit}" if limit else "") + ".json")


def _weights_of(checkpoint: Path) -> str:
    from megatron_inherit.checkpoint.detect import open_source

    with open_source(checkpoint) as source:
        return source.path
