"""``minherit inherit``: a student out of a teacher's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command(help="Make a student out of a teacher's blocks.")
def inherit(
    teacher: Annotated[str, typer.Argument(help="Checkpoint of any format, or a preset with --reset all.")],
    student: Annotated[Path, typer.Argument(help="Folder to write.")],
    layers: Annotated[
        str, typer.Option(help="first:N, last:N, every:K, all, or a list such as 0-7 or 0,2,4,4; or auto:METRIC:N.")
    ] = "",
    reset: Annotated[
        list[str] | None, typer.Option(help="Roles drawn anew: embed,pos_embed,attn,mlp,norm,final_norm,head or all.")
    ] = None,
    as_published: Annotated[
        bool, typer.Option("--as-published", help="Copy what the released Inheritune scripts copy: blocks and head.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; default the teacher's.")] = "",
    seed: Annotated[int, typer.Option(help="Of fresh values.")] = 0,
    format: Annotated[
        str, typer.Option(help="Format of the student: hf, meta, megatron, torch_dist or ds_universal.")
    ] = "hf",
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size of the student.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel size of the student.")] = 1,
    vpp: Annotated[int, typer.Option(min=1, help="Virtual chunks a pipeline rank.")] = 1,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of a Hugging Face folder.")] = "5GB",
    optimizer: Annotated[str, typer.Option(help="keep: take the optimizer state along; drop.")] = "drop",
    zero_copy: Annotated[bool, typer.Option("--zero-copy", help="torch_dist only: hard links, new metadata.")] = False,
    hash_teacher: Annotated[bool, typer.Option("--hash-teacher", help="Hash the teacher's whole files too.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Tensors moved at once.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the exact bytes, write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan, then stream."""
    from megatron_inherit.base.atomic import refuse_existing
    from megatron_inherit.base.errors import UsageError
    from megatron_inherit.base.quantities import parse_bytes
    from megatron_inherit.checkpoint.dtypes import parse_dtype
    from megatron_inherit.checkpoint.manifest import hash_files
    from megatron_inherit.cli.teachers import choose_layers, open_teacher
    from megatron_inherit.cli.transfer import run_transfer
    from megatron_inherit.inherit.inheritune import plan_fresh, plan_inheritance
    from megatron_inherit.inherit.select import parse_roles
    from megatron_inherit.plan.plan import Layout

    if optimizer not in ("keep", "drop"):
        raise UsageError(f"--optimizer {optimizer} is not understood.", expected="keep or drop")
    refuse_existing(student, overwrite=overwrite or dry_run)
    roles = parse_roles(reset or ())
    type_ = parse_dtype(dtype) if dtype else None
    layout = Layout(format=format, tp=tp, pp=pp, vpp=vpp, max_shard_bytes=parse_bytes(max_shard_size))
    source, config = open_teacher(teacher, everything_fresh=len(roles) == 7)
    chosen = choose_layers(layers, teacher, config)
    if source is None:
        plan = plan_fresh(config.with_layers(len(chosen)), seed=seed, dtype=type_ or "F32", layout=layout)
    else:
        plan = plan_inheritance(
            source,
            layers=chosen,
            reset=roles,
            as_published=as_published,
            dtype=type_,
            seed=seed,
            layout=layout,
            optimizer=optimizer == "keep",
        )
    record: dict[str, object] = {"as_published": as_published}
    if hash_teacher and source is not None and not dry_run:
        record["teacher_files"] = hash_files(source)
    run_transfer(
        plan,
        source,
        student,
        dry_run=dry_run,
        as_json=as_json,
        overwrite=overwrite,
        threads=threads,
        zero_copy=zero_copy,
        record=record,
    )
