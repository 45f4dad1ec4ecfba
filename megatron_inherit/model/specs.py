"""Our layer specification for Megatron-Core's GPTModel, the same for every family and engine."""

from __future__ import annotations

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_inherit.model.modules import Layer
from megatron_inherit.model.norm import Norm


def block_spec(
    config: TransformerConfig, *, pp_rank: int = 0, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Lists the blocks of one pipeline stage (or of one chunk of a virtual pipeline) and the final norm.

    Args:
        config: The model's.
        pp_rank: Which pipeline stage.
        vp_stage: Which of its chunks, or None without a virtual pipeline.
    """
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[ModuleSpec(module=Layer)] * count, layer_norm=Norm)
