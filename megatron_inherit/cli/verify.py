"""``minherit verify``: are two checkpoints the same model, or teacher and student, byte for byte in any formats."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_inherit.checkpoint.compare import Difference
    from megatron_inherit.inherit.lineage import Lineage

_SHOWN = 20
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command(help="Compare two checkpoints tensor by tensor; exit code 1 if they differ.")
def verify(
    first: Annotated[str, typer.Argument(metavar="A", help="Checkpoint of any format.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Checkpoint of any format, or a manifest.json.")],
    layers: Annotated[
        str, typer.Option(help="B is a student: the block of A behind each of its blocks; default by its inherit.json.")
    ] = "",
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="Also compare the optimizer's fp32 weights, moments and step.")
    ] = False,
    logits: Annotated[bool, typer.Option("--logits", help="Also compare logits through transformers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare bytes, then logits if asked."""
    found = _compared(first, second, layers, optimizer=optimizer)
    result: dict[str, object] = {
        "tensors": found.total,
        "layers": found.lineage and list(found.lineage.layers),
        "not_compared": dict(found.lineage.others) if found.lineage else {},
        "differences": [dataclasses.asdict(one) for one in (*found.configs, *found.differences)],
    }
    if logits:
        from megatron_inherit.eval.logits import compare_logits

        result["logits"] = compare_logits(first, second)
    if as_json:
        typer.echo(json.dumps(result, indent=2, default=str))
    else:
        if found.lineage is not None:
            _tell_student(first, second, found.lineage, "--layers" if layers else "its inherit.json")
        _tell(found)
        if logits:
            typer.echo(f"logits: {result['logits']}")
    raise typer.Exit(1 if found.differences or found.configs else 0)


@dataclass(frozen=True)
class _Compared:
    """Where two checkpoints differ, of how many tensors; ``lineage`` where the second is a student of the first."""

    total: int
    differences: Sequence[Difference]
    configs: Sequence[Difference] = ()
    lineage: Lineage | None = None


def _compared(first: str, second: str, layers: str, *, optimizer: bool) -> _Compared:
    from megatron_inherit.checkpoint import compare
    from megatron_inherit.checkpoint.detect import open_source
    from megatron_inherit.checkpoint.manifest import load_file
    from megatron_inherit.inherit.lineage import chosen_lineage, recorded_lineage
    from megatron_inherit.inherit.select import parse_layers

    with open_source(first) as left:
        if second.endswith(".json"):
            total = len(left.tensors) + (len(left.optimizer) if optimizer else 0)
            return _Compared(total, compare.compare_manifest(left, load_file(second), optimizer=optimizer))
        with open_source(second) as right:
            lineage: Lineage | None
            if layers:
                lineage = chosen_lineage(right.config, parse_layers(layers, left.config.num_layers))
            else:
                lineage = recorded_lineage(left, second)
            sources = lineage.sources if lineage else None
            total = len(compare.pairs_of(left, right, sources=sources, optimizer=optimizer))
            differences = compare.compare(left, right, sources=sources, optimizer=optimizer)
            settings = compare.compare_configs(left.config, right.config)
            settings += compare.compare_optimizers(left, right) if optimizer else []
            return _Compared(total, differences, settings, lineage)


def _tell_student(first: str, second: str, lineage: Lineage, told: str) -> None:
    from megatron_inherit.plan.plan import describe_layers

    typer.echo(f"{second} is a student by {told}: its blocks are {describe_layers(lineage.layers)} of {first}")
    if lineage.others:
        typer.echo(f"not compared, as they are not copies: {', '.join(lineage.others)}")


def _tell(found: _Compared) -> None:
    for one in (*found.configs, *found.differences[:_SHOWN]):
        typer.echo(one.describe())
    if len(found.differences) > _SHOWN:
        typer.echo(f"and {len(found.differences) - _SHOWN} tensors more")
    typer.echo(f"{found.total - len(found.differences)} of {found.total} tensors are equal, byte for byte")
