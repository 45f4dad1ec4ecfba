"""``minherit export``: any checkpoint, a run's newest one included, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command(help="Write a training checkpoint as a Hugging Face folder.")
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="Run folder (its newest checkpoint), step folder, or any format."),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; default each tensor's own.")] = "",
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
    push: Annotated[bool, typer.Option("--push", help="Upload the folder to the Hugging Face hub.")] = False,
    repository: Annotated[str, typer.Option("--repo", help="USER/NAME on the hub; default the folder's name.")] = "",
    public: Annotated[bool, typer.Option("--public", help="Create a public repository; default private.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and exact bytes, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Convert, upload if asked."""
    from megatron_inherit.base.atomic import refuse_existing
    from megatron_inherit.base.optional import require
    from megatron_inherit.base.quantities import parse_bytes
    from megatron_inherit.checkpoint.detect import open_source
    from megatron_inherit.checkpoint.dtypes import parse_dtype
    from megatron_inherit.cli.transfer import run_transfer
    from megatron_inherit.eval.card import complete_card, run_of
    from megatron_inherit.plan.convert import plan_conversion
    from megatron_inherit.plan.plan import Layout

    hub = require("huggingface_hub", "--push") if push else None
    if not dry_run:
        refuse_existing(folder, overwrite=overwrite, source=checkpoint)
    layout = Layout(max_shard_bytes=parse_bytes(max_shard_size))
    with open_source(checkpoint) as source:
        plan = plan_conversion(source, layout=layout, dtype=parse_dtype(dtype) if dtype else None)
        run_transfer(plan, source, folder, dry_run=dry_run, as_json=as_json, overwrite=overwrite)
    run = run_of(Path(checkpoint))
    if run is not None and not dry_run:
        complete_card(folder, run)
    if hub is not None and not dry_run:
        typer.echo(_upload(hub, folder, repository or folder.name, private=not public))


def _upload(hub: Any, folder: Path, repository: str, *, private: bool) -> str:
    from megatron_inherit.base.errors import CheckpointError

    api = hub.HfApi()
    try:
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add the model"))
    except Exception as error:  # of the hub, of its HTTP library, or of the system: the folder is whole all the same
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        fix = f"Check the network and 'hf auth login', then: hf upload {repository} {folder}"
        raise CheckpointError(f"{folder} is complete, but was not uploaded ({said}).", fix=fix) from error
