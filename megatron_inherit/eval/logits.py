"""Do two checkpoints compute the same function: logits of both on the same tokens, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_inherit.base.errors import CheckpointError
from megatron_inherit.eval.hf_folder import as_hf_folder, load_model


def compare_logits(
    first: Path | str, second: Path | str, *, sequences: int = 2, tokens: int = 64, seed: int = 0
) -> dict[str, Any]:
    """Runs both models in fp32 on random tokens.

    Formats other than Hugging Face are exported to a temporary folder first. One model is in memory at a time.

    Args:
        first: A checkpoint.
        second: Another one with the same vocabulary.
        sequences: Sequences of the batch.
        tokens: Tokens of each; fewer where a model takes fewer positions.
        seed: Of the tokens.

    Returns:
        ``max_abs_difference`` of the logits, ``mean_abs_difference``, ``largest_logit`` of the first model, and
        ``same_prediction``, the share of positions whose most likely token agrees.

    Raises:
        CheckpointError: The vocabularies differ.
    """
    import torch

    left = _logits(first, sequences, tokens, seed)
    right = _logits(second, sequences, tokens, seed)
    if left.shape != right.shape:
        raise CheckpointError(
            "The logits cannot be compared: vocabularies or context lengths differ.",
            got=f"{list(left.shape)} and {list(right.shape)}",
        )
    gap = (left - right).abs()
    same = (left.argmax(dim=-1) == right.argmax(dim=-1)).double().mean()
    return {
        "max_abs_difference": float(gap.max()),
        "mean_abs_difference": float(gap.mean(dtype=torch.float64)),
        "largest_logit": float(left.abs().max()),
        "same_prediction": float(same),
        "tokens": left.shape[0] * left.shape[1],
    }


def _logits(path: Path | str, sequences: int, tokens: int, seed: int) -> Any:
    import torch

    with as_hf_folder(path) as folder:
        model = load_model(folder)
        length = min(tokens, getattr(model.config, "max_position_embeddings", None) or tokens)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(model.config.vocab_size, (sequences, length), generator=generator)
        with torch.no_grad():
            return model(ids).logits.float()
