"""``minherit verify``: are two checkpoints the same model, or teacher and student, byte for byte in any formats."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command(help="Compare two checkpoints tensor by tensor; exit code 1 if they differ.")
def verify(
    first: Annotated[str, typer.Argument(metavar="A", help="Checkpoint of any format.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Checkpoint of any format, or a manifest.json.")],
    layers: Annotated[
        str, typer.Option(help="B is a student: the block of A behind each of its blocks; default by its inherit.json.")
    ] = "",
    logits: Annotated[bool, typer.Option("--logits", help="Also compare logits through transformers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare bytes, then logits if asked."""
    import dataclasses

    from megatron_inherit.checkpoint.compare import Difference, compare, compare_configs, compare_manifest
    from megatron_inherit.checkpoint.detect import open_source
    from megatron_inherit.checkpoint.manifest import load_file
    from megatron_inherit.inherit.lineage import Lineage, chosen_lineage, recorded_lineage
    from megatron_inherit.inherit.select import parse_layers
    from megatron_inherit.plan.plan import describe_layers

    configs: list[Difference] = []
    lineage: Lineage | None = None
    with open_source(first) as left:
        if second.endswith(".json"):
            differences, total = compare_manifest(left, load_file(second)), len(left.tensors)
        else:
            with open_source(second) as right:
                if layers:
                    lineage = chosen_lineage(right.config, parse_layers(layers, left.config.num_layers))
                else:
                    lineage = recorded_lineage(left, second)
                differences = compare(left, right, sources=lineage.sources if lineage else None)
                total = len(lineage.sources) if lineage else len({*left.tensors, *right.tensors})
                configs = compare_configs(left.config, right.config)
    result: dict[str, object] = {
        "tensors": total,
        "layers": lineage and list(lineage.layers),
        "not_compared": dict(lineage.others) if lineage else {},
        "differences": [dataclasses.asdict(one) for one in (*configs, *differences)],
    }
    if logits:
        from megatron_inherit.eval.logits import compare_logits

        result["logits"] = compare_logits(first, second)
    if as_json:
        typer.echo(json.dumps(result, indent=2, default=str))
    else:
        if lineage is not None:
            told = "--layers" if layers else "its inherit.json"
            typer.echo(f"{second} is a student by {told}: its blocks are {describe_layers(lineage.layers)} of {first}")
            if lineage.others:
                typer.echo(f"not compared, as they are not copies: {', '.join(lineage.others)}")
        for one in (*configs, *differences[:20]):
            typer.echo(one.describe())
        if len(differences) > 20:
            typer.echo(f"and {len(differences) - 20} tensors more")
        typer.echo(f"{total - len(differences)} of {total} tensors are equal, byte for byte")
        if logits:
            typer.echo(f"logits: {result['logits']}")
    raise typer.Exit(1 if differences or configs else 0)
