"""``minherit generate``: text from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Continue a prompt.", rich_markup_mode=None)


@app.command()
def generate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint of any format, or a run folder.")
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens that are added.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the tokens that hold this probability.")] = 1.0,
    count: Annotated[int, typer.Option(help="Continuations, when sampling.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer; default the checkpoint's.")] = None,
) -> None:
    """Print the prompt and its continuation."""
    from megatron_inherit.eval.generate import generate as run

    texts = run(
        checkpoint,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        count=count,
        seed=seed,
        device=device,
        dtype=dtype,
        tokenizer=tokenizer,
    )
    for text in texts:
        typer.echo(prompt + text)
