"""``minherit share``: stages of shared weights, from the plan to descendants of any depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_inherit.arch.model_config import ModelConfig
    from megatron_inherit.checkpoint.stream import Source
    from megatron_inherit.sharing.compress import Method
    from megatron_inherit.sharing.learngene import Start
    from megatron_inherit.sharing.stage_plan import StagePlan

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Stages of shared weights: plan, distil, extract, expand."
)

PlanText = Annotated[
    str, typer.Option("--plan", help="3,3,4,3,3 or ids:, cycle:, each:, albert:, sandwich:, or attn=;mlp=;norm=.")
]
DType = Annotated[str, typer.Option(help="fp32, bf16 or fp16; default as it is.")]
Compress = Annotated[str, typer.Option(help="Round or prune the blocks' matrices: int8, int4 or 2:4.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and the exact bytes, write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")]
Place = Annotated[
    str,
    typer.Option(
        help="front, middle, back, even, ends, proportional (default, with at least as many layers as stages), auto, "
        "or a stage a layer: 0,0,1,2."
    ),
]
Windows = Annotated[str, typer.Option(help="File of evaluation windows; --place auto is measured on them.")]
ProbeTokens = Annotated[
    str, typer.Option(metavar="COUNT", help="Tokens of the first windows to measure on, for instance 64k.")
]
PROBE_TOKENS = "64k"


@app.command()
def plan(
    text: Annotated[str, typer.Argument(metavar="PLAN", help="Stage plan, or a learngene or checkpoint that has one.")],
    model: Annotated[str, typer.Option(help="Preset or checkpoint whose layers are counted.")] = "",
    pp: Annotated[int, typer.Option(min=1, help="Pipeline ranks.")] = 1,
    vpp: Annotated[int, typer.Option(min=1, help="Chunks a rank.")] = 1,
    allow_cross_rank: Annotated[
        bool, typer.Option("--allow-cross-rank", help="A stage may lie on several ranks, at the price of traffic.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Draw a stage plan and lay it over a pipeline."""
    import json

    from megatron_inherit.sharing.partition import partition
    from megatron_inherit.sharing.tensors import count_shared

    stages, config = _plan_and_model(text, model)
    split = partition(stages, pp, vpp, allow_cross_rank=allow_cross_rank)
    counts = None if config is None else count_shared(config, stages)
    if as_json:
        more = {} if counts is None else {"unique": counts.unique, "virtual": counts.virtual}
        typer.echo(json.dumps({"plan": stages.to_json(), **split.to_json(config), **more}))
        return
    ranks = {"rank": [split.rank_of(layer) for layer in range(stages.num_layers)]} if pp > 1 else {}
    typer.echo(f"{stages}\n{stages.draw(**ranks)}")
    if counts is not None:
        typer.echo(f"parameters: {counts.unique:,} stored, {counts.virtual:,} passed by a token ({counts.ratio:.2f}x)")
    if pp > 1:
        typer.echo(split.describe(config))


@app.command()
def init(
    teacher: Annotated[
        str, typer.Argument(metavar="TEACHER", help="Checkpoint of any format, of the auxiliary's width.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Learngene folder to write.")],
    stages: PlanText,
    start: Annotated[
        str, typer.Option(help="random (the paper), stepwise, average, lower, or first (inherited layers).")
    ] = "random",
    dtype: DType = "",
    seed: Annotated[int, typer.Option(help="Of random values.")] = 0,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make an auxiliary to distil: its stages from a teacher, or at random."""
    from megatron_inherit.cli.transfer import run_transfer
    from megatron_inherit.sharing.learngene import plan_auxiliary
    from megatron_inherit.sharing.stage_plan import parse_plan

    with _open(teacher) as source:
        made = plan_auxiliary(source, parse_plan(stages), start=_start(start), dtype=_dtype(dtype), seed=seed)
        run_transfer(made, source, out, dry_run=dry_run, as_json=as_json, overwrite=overwrite)


@app.command()
def cache(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe that will train with these targets.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of targets to write, or to go on with.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Overrides of the recipe.")
    ] = None,
    entries: Annotated[int, typer.Option(min=1, help="Stored tokens for each token.")] = 32,
    method: Annotated[str, typer.Option(help="top: the most probable; draw: random ones, unbiased.")] = "top",
    samples: Annotated[int | None, typer.Option(min=1, help="Samples; default all that the recipe trains on.")] = None,
    shard_samples: Annotated[int, typer.Option(min=1, help="Samples of a file.")] = 256,
    share: Annotated[
        str,
        typer.Option(
            metavar="INDEX/COUNT", help="This process's share of the files, from 0/COUNT on; then join without."
        ),
    ] = "0/1",
) -> None:
    """Store a teacher's targets for the samples of a recipe, once for all runs of the same order."""
    from megatron_inherit.base.errors import UsageError
    from megatron_inherit.base.quantities import format_bytes
    from megatron_inherit.cli.share_cache import make_cache, share_of
    from megatron_inherit.config.load import load_recipe

    if method not in ("top", "draw"):
        raise UsageError(f"--method {method} is not understood.", expected="top or draw")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file.", expected="a folder of targets, or a path where there is nothing")
    own, config = share_of(share), load_recipe(recipe, overrides or [])
    count = make_cache(
        config,
        out,
        entries=entries,
        method=method,  # type: ignore[arg-type]
        samples=samples,
        shard_samples=shard_samples,
        share=own,
        tell=typer.echo,
    )
    if own.of > 1:
        typer.echo(f"{out}: share {share} is finished. When all are, the same command without --share joins them.")
        return
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    typer.echo(f"{out}: {count} samples, {format_bytes(size)}")


@app.command()
def extract(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run or training checkpoint of an auxiliary, or a learngene.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Learngene folder to write.")],
    dtype: DType = "",
    compress: Compress = "",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Take the learngene out of a trained auxiliary."""
    from megatron_inherit.cli.transfer import run_transfer
    from megatron_inherit.sharing.expand import compressed
    from megatron_inherit.sharing.learngene import plan_extraction

    with _open(checkpoint) as source:
        made = compressed(plan_extraction(source, dtype=_dtype(dtype)), _method(compress))
        run_transfer(made, source, out, dry_run=dry_run, as_json=as_json, overwrite=overwrite)


@app.command()
def expand(
    learngene: Annotated[
        Path, typer.Argument(metavar="LEARNGENE", help="Learngene, run or training checkpoint of an auxiliary.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    depth: Annotated[int, typer.Option(min=1, max=1000, help="Layers of the descendant.")],
    place: Place = "",
    windows: Windows = "",
    probe_tokens: ProbeTokens = PROBE_TOKENS,
    format: Annotated[str, typer.Option(help="hf, meta, megatron, torch_dist or ds_universal.")] = "hf",
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size of the output.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel size of the output.")] = 1,
    vpp: Annotated[int, typer.Option(min=1, help="Chunks a pipeline rank of the output.")] = 1,
    dtype: DType = "",
    compress: Compress = "",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a descendant of any depth, an ordinary model."""
    from megatron_inherit.base.atomic import refuse_existing
    from megatron_inherit.base.quantities import parse_count
    from megatron_inherit.cli.outputs import refuse_ignored
    from megatron_inherit.cli.share_place import choose, probe_windows
    from megatron_inherit.cli.transfer import run_transfer
    from megatron_inherit.plan.plan import Layout
    from megatron_inherit.sharing.expand import plan_descendant

    refuse_ignored(format, tp=tp, pp=pp, vpp=vpp)
    with _open(learngene) as source:
        if not dry_run:
            refuse_existing(out, overwrite=overwrite, source=source.path)
        chosen = choose(source, depth, place, probe_windows(windows, parse_count(probe_tokens), source.config))
        for line in () if as_json else chosen.table():
            typer.echo(line)
        layout = Layout(format=format, tp=tp, pp=pp, vpp=vpp)
        made = plan_descendant(source, chosen.stages, layout=layout, dtype=_dtype(dtype), compress=_method(compress))
        run_transfer(made, source, out, dry_run=dry_run, as_json=as_json, overwrite=overwrite)


@app.command()
def family(
    learngene: Annotated[
        Path, typer.Argument(metavar="LEARNGENE", help="Learngene, run or training checkpoint of an auxiliary.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that gets one folder a depth.")],
    depths: Annotated[str, typer.Option(help="For instance 6-16 or 6,8,12.")] = "6-16",
    place: Place = "",
    windows: Windows = "",
    probe_tokens: ProbeTokens = PROBE_TOKENS,
    auxiliary_steps: Annotated[int, typer.Option(min=0, help="Steps the auxiliary took, for the report.")] = 0,
    tuning_steps: Annotated[int, typer.Option(min=0, help="Steps each descendant will take.")] = 0,
    scratch_steps: Annotated[int, typer.Option(min=0, help="Steps each would take from scratch.")] = 0,
    format: Annotated[str, typer.Option(help="hf, meta, megatron, torch_dist or ds_universal.")] = "hf",
    dtype: DType = "",
    compress: Compress = "",
    overwrite: Overwrite = False,
) -> None:
    """Make descendants of many depths, and say what that saves over storing and training each."""
    from megatron_inherit.base.quantities import parse_count
    from megatron_inherit.cli.outputs import refuse_ignored
    from megatron_inherit.cli.share_family import make_family, require_steps
    from megatron_inherit.cli.share_place import probe_windows
    from megatron_inherit.plan.plan import Layout
    from megatron_inherit.sharing.expand import parse_depths, plan_descendant
    from megatron_inherit.sharing.learngene import require_plan
    from megatron_inherit.sharing.tensors import family_report

    refuse_ignored(format)
    require_steps(auxiliary_steps, tuning_steps, scratch_steps)
    chosen, kind, method = parse_depths(depths), _dtype(dtype), _method(compress)
    with _open(learngene) as source:
        report = family_report(
            source.config,
            require_plan(source),
            chosen,
            auxiliary_steps=auxiliary_steps,
            tuning_steps=tuning_steps,
            scratch_steps=scratch_steps,
        )
        make_family(
            source,
            out,
            report,
            lambda stages: plan_descendant(source, stages, layout=Layout(format=format), dtype=kind, compress=method),
            place=place,
            windows=probe_windows(windows, parse_count(probe_tokens), source.config),
            overwrite=overwrite,
        )


def _open(path: str | Path) -> Source:
    """Opens a checkpoint, or the newest one of a run."""
    from megatron_inherit.checkpoint.detect import open_source

    return open_source(path)


def _plan_and_model(text: str, model: str) -> tuple[StagePlan, ModelConfig | None]:
    from megatron_inherit.arch.presets import PRESETS
    from megatron_inherit.sharing.learngene import require_plan
    from megatron_inherit.sharing.stage_plan import parse_plan

    config: ModelConfig | None = None
    if text and Path(text).exists():
        with _open(text) as source:
            return require_plan(source), source.config
    stages = parse_plan(_require_plan_text(text))
    if model:
        found = PRESETS.get(model)
        if found is None:
            with _open(model) as source:
                found = source.config
        config = found.with_layers(stages.num_layers)
    return stages, config


def _require_plan_text(text: str) -> str:
    """Lets through what is meant as a plan, right or wrong; what cannot be one is a path to nothing."""
    if set(text) <= set("0123456789,- ") or any(mark in text for mark in ":=;"):
        return text
    from megatron_inherit.base.errors import CheckpointError

    raise CheckpointError(
        f"{text} is no stage plan, and there is no such file or folder.",
        expected="a plan such as 3,3,4,3,3, or a learngene, or a run that trained one",
    )


def _start(text: str) -> Start:
    from megatron_inherit.base.errors import UsageError
    from megatron_inherit.sharing.learngene import STARTS

    for start in STARTS:
        if start == text:
            return start
    raise UsageError(f"--start {text} is not understood.", expected=", ".join(STARTS))


def _dtype(text: str) -> str | None:
    from megatron_inherit.checkpoint.dtypes import parse_dtype

    return parse_dtype(text) if text else None


def _method(text: str) -> Method | None:
    from megatron_inherit.base.errors import UsageError
    from megatron_inherit.sharing.compress import METHODS

    for method in METHODS:
        if method == text:
            return method
    if text:
        raise UsageError(f"--compress {text} is not understood.", expected=", ".join(METHODS))
    return None
