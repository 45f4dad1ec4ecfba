"""``minherit convert``: the same model in another format, layout or type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command(help="Rewrite a checkpoint in another format or layout.")
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint of any format: folder, file or URL.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    format: Annotated[str, typer.Option(help="hf, meta, megatron, torch_dist or ds_universal.")] = "hf",
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel size.")] = 1,
    vpp: Annotated[int, typer.Option(min=1, help="Virtual chunks a pipeline rank.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; default each tensor's own.")] = "",
    dialect: Annotated[str, typer.Option(help="Variant of the format, where it has several.")] = "",
    vocab_multiple: Annotated[
        int, typer.Option(min=1, help="The vocabulary is padded to a multiple of this times tp.")
    ] = 128,
    iteration: Annotated[int, typer.Option(min=0, help="Number in the names of training formats.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of a Hugging Face folder.")] = "5GB",
    optimizer: Annotated[str, typer.Option(help="keep: take the optimizer state along; drop.")] = "drop",
    zero_copy: Annotated[bool, typer.Option("--zero-copy", help="torch_dist only: hard links, new metadata.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Can be continued by the same command.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Tensors moved at once.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and exact bytes, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan, then stream."""
    from megatron_inherit.base.atomic import refuse_existing
    from megatron_inherit.base.quantities import parse_bytes
    from megatron_inherit.checkpoint.detect import open_source
    from megatron_inherit.checkpoint.dtypes import parse_dtype
    from megatron_inherit.cli.outputs import refuse_ignored
    from megatron_inherit.cli.transfer import run_transfer
    from megatron_inherit.plan.convert import plan_conversion
    from megatron_inherit.plan.plan import Layout

    cut: dict[str, Any] = {"tp": tp, "pp": pp, "vpp": vpp, "dialect": dialect, "vocab_multiple": vocab_multiple}
    cut["iteration"] = iteration
    keep = refuse_ignored(format, max_shard_size=max_shard_size, optimizer=optimizer, **cut)
    if not dry_run:
        refuse_existing(destination, overwrite=overwrite, source=source)
    layout = Layout(format=format, max_shard_bytes=parse_bytes(max_shard_size), **cut)
    with open_source(source) as opened:
        plan = plan_conversion(opened, layout=layout, dtype=parse_dtype(dtype) if dtype else None, optimizer=keep)
        run_transfer(
            plan,
            opened,
            destination,
            dry_run=dry_run,
            as_json=as_json,
            overwrite=overwrite,
            threads=threads,
            resume=resume,
            zero_copy=zero_copy,
        )
