"""Makes an engine of either kind."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.optional import require
from megatron_inherit.engines.base import Engine, EngineKind, EngineOptions
from megatron_inherit.engines.check import check_options
from megatron_inherit.sharing.tensors import by_first_layer

if TYPE_CHECKING:
    from megatron_inherit.checkpoint.stream import Source
    from megatron_inherit.distill.options import Distill


def create_engine(
    kind: EngineKind,
    options: EngineOptions,
    config: ModelConfig,
    *,
    source: Source | None = None,
    seed: int = 0,
    distill: Distill | None = None,
) -> Engine:
    """Builds the model on this process's device and fills it.

    Args:
        kind: ``deepspeed`` or ``megatron``.
        options: How the model is spread and stepped.
        config: The model.
        source: The checkpoint whose tensors it starts from, or None for fresh values.
        seed: Of the fresh values.
        distill: Trains towards a teacher instead of the next token.

    Raises:
        ConfigError: The options cannot work, see ``engines.check``.
        CheckpointError: The source lacks a tensor or has it in another shape.
        MissingExtraError: The engine's package is not installed.
    """
    check_options(kind, options, config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    require("megatron.core", "the model")
    from megatron_inherit.model.load import random_reader, source_reader

    read = random_reader(config, seed) if source is None else source_reader(source, config)
    if options.sharing is not None:
        start = None if source is None else read
        read = read if source is None else by_first_layer(read, options.sharing.plan)
        if options.sharing.relaxed:
            from megatron_inherit.sharing.relax import own_reader

            read = own_reader(read, start, config, options.sharing, seed)
    if kind == "deepspeed":
        require("deepspeed", "engine=deepspeed")
        from megatron_inherit.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(options, config, read, distill)
    from megatron_inherit.engines.megatron.engine import MegatronEngine

    return MegatronEngine(options, config, read, distill)
