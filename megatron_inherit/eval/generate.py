"""Text from a checkpoint: greedy or sampled, the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_inherit.base.errors import DataError, UsageError
from megatron_inherit.eval.hf_folder import as_hf_folder, chosen_device, load_model, load_tokenizer


def generate(
    checkpoint: Path | str,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    count: int = 1,
    seed: int = 0,
    device: str = "",
    dtype: str = "fp32",
    tokenizer: Path | None = None,
) -> list[str]:
    """Continues a prompt.

    Args:
        checkpoint: Of any format, or a run folder.
        prompt: Text to continue; may be empty.
        max_new_tokens: Most tokens that are added.
        temperature: 0 takes the most likely token, else logits are divided by it before sampling.
        top_k: Samples among the k most likely tokens; 0 among all.
        top_p: Samples among the most likely tokens that hold this share of probability.
        count: Continuations.
        seed: Of the sampling.
        device: ``cpu`` or ``cuda``; default: a GPU if there is one.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        tokenizer: Folder of the tokenizer; default the checkpoint's.

    Returns:
        The continuations, without the prompt.

    Raises:
        UsageError: An option is out of range, or the model has no positions for so many tokens.
        DataError: There is no tokenizer, or the prompt is empty and the tokenizer has no start token.
    """
    _check(max_new_tokens, temperature, top_p, count)
    import torch

    device = chosen_device(device)
    with as_hf_folder(checkpoint) as folder:
        words = load_tokenizer(tokenizer or folder)
        model = load_model(folder, device=device, dtype=dtype)
    ids = _encode(words, prompt)
    _require_room(model.config, len(ids) + max_new_tokens)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    _forget_habits(model)
    batch = torch.tensor([ids] * (count if temperature > 0 else 1), device=model.device)
    with torch.no_grad():
        out = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=max_new_tokens,
            pad_token_id=words.eos_token_id if words.eos_token_id is not None else 0,
            **options,
        )
    return [_added(words, ids, row.tolist()) for row in out]


def _added(tokenizer: Any, ids: list[int], row: list[int]) -> str:
    """Gives the text behind the prompt's: decoded by itself, SentencePiece's would lose the space it begins with."""
    before, whole = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (ids, row))
    alone: str = tokenizer.decode(row[len(ids) :], skip_special_tokens=True)
    return whole.removeprefix(before) if whole.startswith(before) else alone


def _forget_habits(model: Any) -> None:
    """Leaves of what generation_config.json asks for only where a text ends: penalties and the like change the text."""
    habits = type(model.generation_config)
    model.generation_config = habits(eos_token_id=model.generation_config.eos_token_id)


def _require_room(config: Any, tokens: int) -> None:
    """Refuses to go beyond a table of learned positions; rotary positions have no end."""
    if getattr(config, "rope_parameters", None) is None and tokens - 1 > config.max_position_embeddings:
        raise UsageError(
            "The prompt and what is added to it exceed the model's positions.",
            got=f"{tokens} tokens",
            expected=f"at most {config.max_position_embeddings + 1}",
            fix="Lower --max-new-tokens, or shorten the prompt.",
        )


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt)
    start = next((id_ for id_ in (tokenizer.bos_token_id, tokenizer.eos_token_id) if id_ is not None), None)
    if not ids and start is None:
        raise DataError("The prompt is empty and the tokenizer has no start token.", fix="Give a prompt.")
    return ids or [start]


def _check(max_new_tokens: int, temperature: float, top_p: float, count: int) -> None:
    if max_new_tokens < 1 or count < 1:
        raise UsageError("Tokens and continuations are counted from 1.", got=(max_new_tokens, count))
    if count > 1 and temperature == 0:
        raise UsageError("Without sampling all continuations are the same.", fix="Pass --temperature, or one --count.")
    if temperature < 0 or not 0 < top_p <= 1:
        raise UsageError(
            "The sampling options are out of range.",
            got=f"temperature {temperature}, top_p {top_p}",
            expected="temperature >= 0 and 0 < top_p <= 1",
        )
