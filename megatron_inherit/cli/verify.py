"""``minherit verify``: are two checkpoints the same model, byte for byte, whatever their formats."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command(help="Compare two checkpoints tensor by tensor; exit code 1 if they differ.")
def verify(
    first: Annotated[str, typer.Argument(metavar="A", help="Checkpoint of any format.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Checkpoint of any format, or a manifest.json.")],
    logits: Annotated[bool, typer.Option("--logits", help="Also compare logits through transformers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare bytes, then logits if asked."""
    import dataclasses

    from megatron_inherit.checkpoint.compare import Difference, compare, compare_configs, compare_manifest
    from megatron_inherit.checkpoint.detect import open_source
    from megatron_inherit.checkpoint.manifest import load_file

    configs: list[Difference] = []
    with open_source(first) as left:
        if second.endswith(".json"):
            differences, total = compare_manifest(left, load_file(second)), len(left.tensors)
        else:
            with open_source(second) as right:
                differences, total = compare(left, right), len({*left.tensors, *right.tensors})
                configs = compare_configs(left.config, right.config)
    result: dict[str, object] = {
        "tensors": total,
        "differences": [dataclasses.asdict(one) for one in (*configs, *differences)],
    }
    if logits:
        from megatron_inherit.eval.logits import compare_logits

        result["logits"] = compare_logits(first, second)
    if as_json:
        typer.echo(json.dumps(result, indent=2, default=str))
    else:
        for one in (*configs, *differences[:20]):
            typer.echo(one.describe())
        if len(differences) > 20:
            typer.echo(f"and {len(differences) - 20} tensors more")
        typer.echo(f"{total - len(differences)} of {total} tensors are equal, byte for byte")
        if logits:
            typer.echo(f"logits: {result['logits']}")
    raise typer.Exit(1 if differences or configs else 0)
