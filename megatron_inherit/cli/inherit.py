"""``minherit inherit``: a student out of a teacher's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from megatron_inherit.arch.families import Role
    from megatron_inherit.arch.model_config import ModelConfig
    from megatron_inherit.checkpoint.stream import Source
    from megatron_inherit.plan.plan import Layout, TransferPlan

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


Teacher = Annotated[
    str, typer.Argument(metavar="TEACHER", help="Checkpoint of any format, or a preset with --reset all.")
]
Student = Annotated[Path, typer.Argument(metavar="STUDENT", help="Folder to write.")]
Layers = Annotated[
    str, typer.Option(help="first:N, last:N, every:K, all, or a list such as 0-7 or 0,2,4,4; or auto:METRIC:N.")
]
Reset = Annotated[
    list[str] | None, typer.Option(help="Roles drawn anew: embed,pos_embed,attn,mlp,norm,final_norm,head or all.")
]
AsPublished = Annotated[
    bool, typer.Option("--as-published", help="Copy what the released Inheritune scripts copy: blocks and head.")
]
Repair = Annotated[
    str, typer.Option(help="Refit the cut: final-norm, affine, block-scale, keep-last:M; comma-separated.")
]
RepairText = Annotated[Path | None, typer.Option(help="Text to fit on; default Python's language reference.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16; default the teacher's.")]
Seed = Annotated[int, typer.Option(help="Of fresh values.")]
FormatName = Annotated[str, typer.Option(help="Format of the student: hf, meta, megatron, torch_dist or ds_universal.")]
Tp = Annotated[int, typer.Option(min=1, help="Tensor-parallel size of the student.")]
Pp = Annotated[int, typer.Option(min=1, help="Pipeline-parallel size of the student.")]
Vpp = Annotated[int, typer.Option(min=1, help="Virtual chunks a pipeline rank.")]
Dialect = Annotated[str, typer.Option(help="Variant of the format, where it has several.")]
VocabMultiple = Annotated[
    int, typer.Option(min=1, help="The vocabulary is padded to a multiple of this times tp, where the format pads.")
]
MaxShardSize = Annotated[str, typer.Option(help="Largest file of a Hugging Face folder.")]
Optimizer = Annotated[str, typer.Option(help="keep: take the optimizer state along; drop.")]
ZeroCopy = Annotated[bool, typer.Option("--zero-copy", help="torch_dist only: hard links, new metadata.")]
HashTeacher = Annotated[bool, typer.Option("--hash-teacher", help="Hash the teacher's whole files too.")]
Resume = Annotated[bool, typer.Option("--resume", help="Can be continued by the same command.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Tensors moved at once.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and the exact bytes, write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(help="Make a student out of a teacher's blocks.")
def inherit(
    teacher: Teacher,
    student: Student,
    layers: Layers = "",
    reset: Reset = None,
    as_published: AsPublished = False,
    repair: Repair = "",
    repair_text: RepairText = None,
    dtype: Dtype = "",
    seed: Seed = 0,
    format: FormatName = "hf",
    tp: Tp = 1,
    pp: Pp = 1,
    vpp: Vpp = 1,
    dialect: Dialect = "",
    vocab_multiple: VocabMultiple = 128,
    max_shard_size: MaxShardSize = "5GB",
    optimizer: Optimizer = "drop",
    zero_copy: ZeroCopy = False,
    hash_teacher: HashTeacher = False,
    resume: Resume = False,
    threads: Threads = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Plan, then stream."""
    from megatron_inherit.base.atomic import refuse_existing
    from megatron_inherit.base.quantities import parse_bytes
    from megatron_inherit.checkpoint.manifest import hash_files
    from megatron_inherit.cli.outputs import refuse_ignored
    from megatron_inherit.cli.repairs import check, fit, repaired
    from megatron_inherit.cli.teachers import choose_layers, foresee_layers, open_teacher
    from megatron_inherit.cli.transfer import predict, run_transfer
    from megatron_inherit.inherit.select import parse_roles
    from megatron_inherit.plan.plan import Layout

    cut: dict[str, Any] = {"tp": tp, "pp": pp, "vpp": vpp, "dialect": dialect, "vocab_multiple": vocab_multiple}
    keep = refuse_ignored(format, max_shard_size=max_shard_size, optimizer=optimizer, **cut)
    if not dry_run:
        refuse_existing(student, overwrite=overwrite, source=teacher)
    roles = parse_roles(reset or ())
    layout = Layout(format=format, max_shard_bytes=parse_bytes(max_shard_size), **cut)
    source, config = open_teacher(teacher, everything_fresh=len(roles) == 7)
    foreseen = foresee_layers(layers, config)
    if repair:
        fresh = bool(roles) or as_published
        check(foreseen, repair, text=repair_text, fresh=fresh, optimizer=keep, zero_copy=zero_copy)
    wanted = (roles, as_published, dtype, seed, layout, keep)
    if repair or hash_teacher or layers.startswith("auto:"):  # these take minutes: the output is looked at before
        predict(_plan(source, config, foreseen, *wanted), source, zero_copy=zero_copy)
    chosen = choose_layers(layers, teacher, config)
    fixed = fit(teacher, chosen, repair, text=repair_text) if repair else None
    plan = _plan(source, config, fixed.layers if fixed else chosen, *wanted)
    record: dict[str, object] = {"as_published": as_published}
    if hash_teacher and source is not None and not dry_run:
        record["teacher_files"] = hash_files(source)
    switches = {"dry_run": dry_run, "as_json": as_json, "overwrite": overwrite, "resume": resume}
    with repaired(plan, fixed, repair, record) as final:
        run_transfer(final, source, student, threads=threads, zero_copy=zero_copy, record=record, **switches)


def _plan(
    source: Source | None,
    config: ModelConfig,
    layers: tuple[int, ...],
    roles: tuple[Role, ...],
    as_published: bool,
    dtype: str,
    seed: int,
    layout: Layout,
    optimizer: bool,
) -> TransferPlan:
    from megatron_inherit.base.errors import UsageError
    from megatron_inherit.checkpoint.dtypes import parse_dtype
    from megatron_inherit.inherit.inheritune import plan_fresh, plan_inheritance

    type_ = parse_dtype(dtype) if dtype else None
    if source is None and optimizer:
        raise UsageError("A shape without weights has no optimizer state.", fix="Leave --optimizer keep out.")
    if source is None:
        return plan_fresh(config.with_layers(len(layers)), seed=seed, dtype=type_ or "F32", layout=layout)
    return plan_inheritance(
        source,
        layers=layers,
        reset=roles,
        as_published=as_published,
        dtype=type_,
        seed=seed,
        layout=layout,
        optimizer=optimizer,
    )
