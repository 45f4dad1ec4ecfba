"""``minherit inspect``: what a checkpoint holds, from its headers."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command(help="Show what a checkpoint holds.")
def inspect(
    path: Annotated[str, typer.Argument(help="Checkpoint of any format: folder, file or URL.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    hashes: Annotated[bool, typer.Option("--hashes", help="Hash every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read headers; with ``--hashes`` read everything."""
    from megatron_inherit.checkpoint.detect import open_source
    from megatron_inherit.checkpoint.manifest import hash_source

    with open_source(path) as source:
        facts = describe(source)
        if tensors or as_json:
            facts["tensors"] = {
                name: {"dtype": stored.dtype, "shape": list(stored.shape), "files": list(stored.files)}
                for name, stored in source.tensors.items()
            }
        if hashes:
            facts["xxh3"] = {name: entry.xxh3 for name, entry in hash_source(source).items()}
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
        return
    listed, digests = facts.pop("tensors", {}), facts.pop("xxh3", {})
    for key, value in facts.items():
        typer.echo(f"{key:<12} {_plain(value)}")
    width = max(map(len, listed or digests or [""]))
    for name in listed or digests:
        entry = listed.get(name, {})
        columns = (entry.get("dtype", ""), entry.get("shape", ""), digests.get(name, ""))
        typer.echo(f"{name:<{width}}  " + "  ".join(str(column) for column in columns if column != ""))


def describe(source: Any) -> dict[str, Any]:
    """Gathers what ``inspect`` shows of an open source."""
    from megatron_inherit.arch.counts import count_parameters
    from megatron_inherit.base.quantities import format_bytes, format_count

    config = source.config
    types = sorted({stored.dtype for stored in source.tensors.values()})
    size = sum(stored.stored_bytes for stored in {id(one): one for one in source.tensors.values()}.values())
    heads = f"{config.num_heads} query, {config.num_kv_heads} key/value of {config.head_dim}"
    return {
        "format": source.format,
        "path": source.path,
        "family": config.family,
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "heads": heads,
        "ffn": config.ffn_size,
        "vocabulary": config.vocab_size,
        "positions": config.max_positions,
        "head": "tied to the embedding" if config.tied else "its own",
        "parameters": f"{format_count(count_parameters(config))} ({count_parameters(config):,})",
        "dtype": ", ".join(types),
        "bytes": f"{format_bytes(size)} ({size:,})",
        "optimizer": ", ".join(sorted({key.partition(":")[0] for key in source.optimizer})) or "none",
        "licence": source.licence or "not told",
        "side files": ", ".join(side.name for side in source.side_files) or "none",
        **source.details,
        "config": config.to_json(),
    }


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items() if item not in (None, False, {}))
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
