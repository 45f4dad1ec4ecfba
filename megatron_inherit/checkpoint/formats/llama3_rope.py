"""LLaMA 3's scaling of rotary positions in formats that keep its factor alone.

Meta's and Megatron's programs have the other three numbers in their code (``apply_scaling`` of meta-llama/llama-models,
``RotaryEmbedding._apply_scaling`` of Megatron-Core), so that no field of a checkpoint can change them.
"""

from __future__ import annotations

from typing import Any

from megatron_inherit.arch.model_config import Rope
from megatron_inherit.base.errors import CheckpointError

KIND = "llama3"
_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_scaling(factor: float) -> dict[str, Any]:
    """Gives Hugging Face's fields of a model that is known by its factor."""
    return {"rope_type": KIND, "factor": float(factor), **_FIXED}


def refuse_lost_scaling(rope: Rope | None, format: str) -> None:
    """Refuses a scaling whose other numbers are not those that readers of the format use.

    Args:
        rope: The model's rotary positions.
        format: For the message.

    Raises:
        CheckpointError: Another program would compute other positions from the checkpoint, without a word.
    """
    if rope is None or rope.scaling.get("rope_type") != KIND:
        return
    for name, value in _FIXED.items():
        if rope.scaling.get(name) != value:
            raise CheckpointError(
                f"{format} has no place for {name} of this model's llama3 rope scaling.",
                got=rope.scaling.get(name),
                expected=f"{value:g}, which its readers use whatever the checkpoint says",
                fix="Use --format hf, whose config.json has it.",
            )
