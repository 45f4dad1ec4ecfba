"""``minherit data``: text to tokens to subsets, and a look at what a run will read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from megatron_inherit.cli.data_progress import ProgressMeter

if TYPE_CHECKING:
    from megatron_inherit.data.inspection import Summary
    from megatron_inherit.data.packing import Boundary

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Ingest, tokenize, subset and inspect text.")

Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
BoundaryName = Annotated[str, typer.Option("--boundary", help="packed, reset or none.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def ingest(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="[DOMAIN=]PATH, URL or datasets:NAME_OR_FOLDER[:CONFIG[:SPLIT]]."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of text to write, or to go on with.")],
    layout: Annotated[str, typer.Option(help="files, redpajama, slimpajama, fineweb-edu or openwebtext.")] = "files",
    text_field: Annotated[str, typer.Option(help="Field of the text in JSON, parquet and data sets.")] = "text",
    pattern: Annotated[str, typer.Option(help="Shell pattern for file names inside folders.")] = "*",
    as_text: Annotated[bool, typer.Option("--as-text", help="Every file is plain text.")] = False,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of a plain text is a document.")] = False,
    max_document: Annotated[str, typer.Option(help="Longest document.")] = "64MiB",
    max_reject_share: Annotated[float, typer.Option(min=0, max=1, help="More bad records stop the job.")] = 0.01,
    shard: Annotated[str, typer.Option(help="Text of a shard, about; by default from the sources' size.")] = "auto",
    compression: Annotated[str, typer.Option(help="Of the shards: none or zst.")] = "none",
    workers: Workers = 1,
) -> None:
    """Read text of any form into shards, one folder a domain."""
    from megatron_inherit.base.errors import UsageError
    from megatron_inherit.base.quantities import format_bytes, parse_bytes
    from megatron_inherit.data.jobs import start_server

    if workers > 1:
        start_server("megatron_inherit.data.ingest")
    from megatron_inherit.data.ingest import IngestOptions
    from megatron_inherit.data.ingest import ingest as run

    if compression not in ("none", "zst"):
        raise UsageError(f"--compression {compression} is not understood.", expected="none or zst")
    options = IngestOptions(
        layout=layout,
        text_field=text_field,
        max_bytes=parse_bytes(max_document),
        lines=lines,
        max_reject_share=max_reject_share,
        shard_bytes=0 if shard == "auto" else parse_bytes(shard),
        compression=compression,  # type: ignore[arg-type]
    )
    with ProgressMeter("ingest") as meter:
        made = run(sources, out, options, pattern=pattern, as_text=as_text, workers=workers, on_progress=meter.add)
    size = sum(one.text_bytes for one in made.shards)
    documents = sum(one.documents for one in made.shards)
    rejected = sum(made.rejects.values())
    typer.echo(f"{out}: {documents} documents, {format_bytes(size)} of text, {rejected} rejected")


@app.command()
def tokenize(
    source: Annotated[Path, typer.Argument(metavar="TEXT", help="Folder that `ingest` wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of tokens to write, or to go on with.")],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", "-t", help="Folder, tokenizer.json, SentencePiece .model, or 'bytes'.")
    ],
    append_eos: Annotated[bool, typer.Option("--append-eos/--no-append-eos", help="End documents with EOS.")] = True,
    prepend_bos: Annotated[bool, typer.Option("--prepend-bos/--no-prepend-bos", help="Begin them with BOS.")] = False,
    eos: Annotated[str, typer.Option(help="Token to take as EOS.")] = "",
    bos: Annotated[str, typer.Option(help="Token to take as BOS.")] = "",
    backend: Annotated[str, typer.Option(help="auto, gigatoken or own.")] = "auto",
    merge: Annotated[bool, typer.Option("--merge", help="Also write OUT/DOMAIN.bin and .idx for each domain.")] = False,
    workers: Workers = 1,
) -> None:
    """Turn text into Megatron .bin/.idx files; a killed job goes on where it was."""
    from megatron_inherit.base.errors import UsageError
    from megatron_inherit.base.quantities import format_count
    from megatron_inherit.data.jobs import start_server

    if workers > 1:
        fast = () if backend == "own" else ("gigatoken", "awkward")
        start_server("megatron_inherit.data.tokenize", "sentencepiece", "tokenizers", *fast)
    from megatron_inherit.data.ingest import open_documents
    from megatron_inherit.data.merge import merge_domains
    from megatron_inherit.data.tokenize import TokenizeOptions
    from megatron_inherit.data.tokenize import tokenize as run

    if backend not in ("auto", "gigatoken", "own"):
        raise UsageError(f"--backend {backend} is not understood.", expected="auto, gigatoken or own")
    options = TokenizeOptions(
        tokenizer=tokenizer,
        append_eos=append_eos,
        prepend_bos=prepend_bos,
        eos=eos or None,
        bos=bos or None,
        backend=backend,  # type: ignore[arg-type]
    )
    total = sum(shard.text_bytes for shard in open_documents(source).shards)
    with ProgressMeter("tokenize", total_bytes=total) as meter:
        made = run(source, out, options, workers=workers, on_progress=meter.add)
    if merge:
        merge_domains(out, {shard.domain: out / shard.domain for shard in made.shards})
    tokens = sum(shard.tokens for shard in made.shards)
    size = sum(shard.text_bytes or 0 for shard in made.shards)
    documents = sum(shard.documents for shard in made.shards)
    typer.echo(
        f"{out}: {documents} documents, {format_count(tokens)} tokens ({tokens}), "
        f"{size / max(1, tokens):.2f} bytes a token"
    )


@app.command()
def subset(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="[DOMAIN=]folder of tokens or .bin/.idx prefix.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the subset.")],
    tokens: Annotated[str, typer.Option(help="Training tokens, such as 1B, or 'all'.")] = "all",
    seed: Annotated[int, typer.Option(help="Of the order of documents.")] = 0,
    weights: Annotated[str, typer.Option(help="natural, llama, or NAME=SHARE,...; 0 leaves a domain out.")] = "natural",
    epochs: Annotated[str, typer.Option(help="NAME=NUMBER,...: passes of a domain within one of the subset.")] = "",
    on_short: Annotated[
        str, typer.Option(help="A domain too small for its share: error, repeat or take-all.")
    ] = "error",
    valid: Annotated[float, typer.Option(min=0, max=0.5, help="Share of documents held out.")] = 0.005,
    test: Annotated[float, typer.Option(min=0, max=0.5, help="Share of documents held out.")] = 0.005,
    split_seed: Annotated[int, typer.Option(help="Of what is held out; leave it.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw whole documents at random up to a token budget; an index, no copy."""
    from megatron_inherit.base.errors import UsageError
    from megatron_inherit.base.quantities import parse_count
    from megatron_inherit.data.budget import make_subset
    from megatron_inherit.data.inspection import inspect_data
    from megatron_inherit.data.manifests import SubsetOptions
    from megatron_inherit.data.mixture import parse_numbers

    if on_short not in ("error", "repeat", "take-all"):
        raise UsageError(f"--on-short {on_short} is not understood.", expected="error, repeat or take-all")
    options = SubsetOptions(
        tokens=None if tokens == "all" else parse_count(tokens),
        seed=seed,
        weights=weights,
        epochs=parse_numbers(epochs, "a number of epochs"),
        on_short=on_short,  # type: ignore[arg-type]
        valid_share=valid,
        test_share=test,
        split_seed=split_seed,
    )
    with ProgressMeter("subset") as meter:
        made = make_subset(sources, out, options, overwrite=overwrite, on_progress=meter.add)
    for split in made.splits:
        _show(inspect_data(out, split=split), as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of text, of tokens, a subset, or a prefix.")],
    split: Annotated[str, typer.Option(help="Of a subset.")] = "train",
    samples: Annotated[int, typer.Option(min=0, help="Sample windows to decode.")] = 2,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a sample window.")] = 128,
    tokenizer: Annotated[str, typer.Option(help="For a prefix that names none.")] = "",
    boundary: BoundaryName = "packed",
    duplicates: Annotated[bool, typer.Option(help="Count exact duplicates.")] = True,
    full: Annotated[bool, typer.Option("--full", help="Hash every file and compare with the manifest.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show documents, tokens, lengths, domains, duplicates and decoded samples."""
    from megatron_inherit.data.inspection import inspect_data, sample_windows
    from megatron_inherit.data.opening import open_stream

    summary = inspect_data(path, split=split, duplicates=duplicates)
    split = split if summary.kind == "subset" else "all"
    if full and summary.kind != "documents":
        open_stream(path, split, verify="full")
    _show(summary, as_json)
    if summary.kind == "documents" or not samples or as_json or not (tokenizer or summary.tokenizer):
        return
    for window in sample_windows(
        path,
        split=split,
        count=samples,
        sequence_length=sequence_length,
        tokenizer=tokenizer or None,
        boundary=_boundary(boundary),
    ):
        typer.echo(f"\nsample {window.sample}, {len(window.ids)} tokens, {window.predicted} predicted:")
        typer.echo("\n----- attention begins anew -----\n".join(window.texts))


@app.command()
def order(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Subset, folder of tokens, or prefix.")],
    steps: Annotated[str, typer.Option(help="FIRST:LAST (exclusive) or one step.")] = "0:4",
    global_batch: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 8,
    world: Annotated[int, typer.Option(min=1, help="Replicas the samples are divided among.")] = 1,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
    split: Annotated[str, typer.Option(help="Of a subset; 'all' for other data.")] = "train",
    epochs: Annotated[int, typer.Option(min=0, help="Passes; 0: no limit.")] = 0,
    boundary: BoundaryName = "packed",
    as_json: AsJson = False,
) -> None:
    """Print which windows of the data each step and replica reads."""
    import json

    from megatron_inherit.base.errors import UsageError
    from megatron_inherit.data.loader import LoaderOptions, open_loader
    from megatron_inherit.data.order import steps_of_order

    first, _, last = steps.partition(":")
    if not first.isdigit() or (last and not last.isdigit()):
        raise UsageError(f"--steps {steps} is not understood.", expected="FIRST:LAST")
    options = LoaderOptions(
        str(path),
        sequence_length,
        seed=seed,
        epochs=epochs,
        boundary=_boundary(boundary),
        split=split,
    )
    stop = int(last) if last else int(first) + 1
    if stop <= int(first):
        raise UsageError(f"--steps {steps} holds no step.", expected="FIRST:LAST, LAST being the larger")
    loader = open_loader(options)
    for row in steps_of_order(loader, range(int(first), stop), global_batch=global_batch, world=world):
        if as_json:
            typer.echo(json.dumps(row.model_dump()))
        else:
            typer.echo(
                f"step {row.step} replica {row.replica}: samples {row.samples[0]}-{row.samples[-1]}, "
                f"epoch {row.epochs[0]}, windows {' '.join(map(str, row.windows))}"
            )


@app.command()
def windows(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Subset, folder of tokens, or prefix.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File of evaluation windows to write.")],
    count: Annotated[int, typer.Option("--count", min=1, help="Windows; fewer if the split is smaller.")] = 1024,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens predicted in a window.")] = 1024,
    split: Annotated[str, typer.Option(help="Of a subset; 'all' for other data.")] = "valid",
    seed: Annotated[int, typer.Option(help="Which windows are taken.")] = 0,
    tokenizer: Annotated[str, typer.Option(help="For data that names none.")] = "",
) -> None:
    """Fix evaluation windows: one file for all runs that are to be compared."""
    from megatron_inherit.base.errors import UsageError
    from megatron_inherit.data.loader import LoaderOptions, open_loader
    from megatron_inherit.data.tokenizer import open_tokenizer
    from megatron_inherit.data.windows import EvalWindows

    loader = open_loader(LoaderOptions(str(path), sequence_length, seed=seed, epochs=1, split=split))
    made_with = loader.stream.tokenizer
    name = tokenizer or (made_with.path if made_with else "")
    if not name:
        raise UsageError(f"{path} does not say which tokenizer made it.", fix="Pass --tokenizer.")
    made = EvalWindows.build(loader, open_tokenizer(name), windows=count)
    before = EvalWindows.load(out).fingerprint if out.is_file() else None
    if before not in (None, made.fingerprint):
        raise UsageError(f"{out} holds other windows, by which runs may be compared.", fix="Choose another --out.")
    if before is None:
        made.save(out)
    typer.echo(f"{out}: {len(made)} windows of {sequence_length} tokens, {made.num_bytes} bytes of text")
    typer.echo(f"fingerprint {made.fingerprint}")


def _boundary(name: str) -> Boundary:
    from megatron_inherit.base.errors import UsageError

    if name not in ("packed", "reset", "none"):
        raise UsageError(f"--boundary {name} is not understood.", expected="packed, reset or none")
    return cast("Boundary", name)


def _show(summary: Summary, as_json: bool) -> None:
    if as_json:
        typer.echo(summary.model_dump_json(indent=1))
        return
    from megatron_inherit.cli.data_progress import summary_lines

    for line in summary_lines(summary):
        typer.echo(line)
