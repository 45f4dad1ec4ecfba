"""``minherit analyze``: attention rank, and how much each block matters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True, help="Measure attention rank and the importance of layers.", rich_markup_mode=None
)

Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint of any format, or a run folder.")]
Text = Annotated[Path | None, typer.Option(help="Text to measure on; default Python's language reference.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the JSON file and the figures.")]
Device = Annotated[str, typer.Option(help="cpu or cuda; default: a GPU if there is one.")]


@app.command()
def attention(
    checkpoint: Checkpoint,
    text: Text = None,
    sequences: Annotated[int, typer.Option(min=1, help="Number of sequences.")] = 100,
    tokens: Annotated[int, typer.Option(min=2, help="Length of each.")] = 100,
    tau: Annotated[float, typer.Option(help="Share of energy that defines the rank.")] = 0.9,
    eta: Annotated[float, typer.Option(help="Share of energy that defines the mass.")] = 0.9,
    out: Out = None,
    device: Device = "",
) -> None:
    """Rank, mass and sink of every head."""
    from megatron_inherit.eval.attention_rank import measure_attention
    from megatron_inherit.eval.hf_folder import chosen_device

    report = measure_attention(
        checkpoint,
        text=text,
        sequences=sequences,
        tokens=tokens,
        tau=tau,
        eta=eta,
        device=chosen_device(device),
    )
    value = report.to_json()
    typer.echo("block  MaxRank  AvgMass  sink")
    for block, (rank, mass, sink) in enumerate(zip(report.max_rank, report.avg_mass, report.sink, strict=True)):
        typer.echo(f"{block:5d}  {rank:7.2f}  {mass:7.2f}  {sum(sink) / len(sink):4.2f}")
    lazy = ", ".join(map(str, value["lazy"])) or "none"
    typer.echo(f"lazy blocks: {lazy}; heads with rank below 1.5: {100 * value['near_rank_one']:.0f}%")
    _save(value, out)


@app.command()
def importance(
    checkpoint: Checkpoint,
    text: Text = None,
    sequences: Annotated[int, typer.Option(min=1, help="Number of sequences.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Length of each.")] = 256,
    removal: Annotated[bool, typer.Option("--removal", help="Also the loss without each block; slow.")] = False,
    out: Out = None,
    device: Device = "",
) -> None:
    """Block influence, angular distance of spans and, if asked, the loss without each block."""
    from megatron_inherit.eval.hf_folder import chosen_device
    from megatron_inherit.eval.importance import measure_importance

    found = measure_importance(
        checkpoint, text=text, sequences=sequences, tokens=tokens, removal=removal, device=chosen_device(device)
    )
    typer.echo("block  influence  angle" + ("  loss without" if found.removal_loss else ""))
    for block, influence in enumerate(found.block_influence):
        more = f"  {found.removal_loss[block]:12.4f}" if found.removal_loss else ""
        typer.echo(f"{block:5d}  {influence:9.5f}  {found.angular[0][block]:5.3f}{more}")
    if found.loss is not None:
        typer.echo(f"loss of the whole model: {found.loss:.4f}")
    _save(found.to_json(), out)


def _save(value: dict[str, Any], out: Path | None) -> None:
    if out is None:
        return
    from megatron_inherit.base.atomic import write_bytes, write_json
    from megatron_inherit.eval import plots
    from megatron_inherit.eval.analysis_charts import drawings_of

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{value['kind']}.json", value)
    for drawing in drawings_of(value):
        write_bytes(out / f"{drawing.name}.png", plots.to_png(drawing.draw()))
    typer.echo(str(out))
