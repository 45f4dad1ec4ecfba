"""The blocks of a decoder: MLP and pre-norm layer, on Megatron-Core's parallel linears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch.utils.checkpoint import checkpoint

from megatron_inherit.kernels.dispatch import gelu_tanh, swiglu
from megatron_inherit.model.attention import Attention, Tables
from megatron_inherit.model.norm import Norm

SELECTED = frozenset({"pre_mlp_layernorm", "mlp"})
"""The children of a layer that selective recomputation computes anew."""


class Mlp(MegatronModule):
    """SwiGLU (Shazeer 2020) on packed gate and up rows, or GELU in its tanh form."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.gated = config.gated_linear_unit
        shared: dict[str, Any] = {
            "config": config,
            "bias": config.add_bias_linear,
            "skip_bias_add": False,
            "tp_group": pg_collection.tp,
        }
        self.linear_fc1 = ColumnParallelLinear(
            config.hidden_size,
            config.ffn_hidden_size * (2 if self.gated else 1),
            init_method=config.init_method,
            gather_output=False,
            **shared,
        )
        self.linear_fc2 = RowParallelLinear(
            config.ffn_hidden_size,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            is_expert=False,
            **shared,
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps [sequence, batch, hidden] to the same shape."""
        inner, _ = self.linear_fc1(hidden)
        return self.linear_fc2(swiglu(inner) if self.gated else gelu_tanh(inner))[0]


class Layer(MegatronModule, BaseTransformerLayer):
    """One pre-norm block: x + attention(norm(x)), then + mlp(norm(...)).

    Args:
        config: The model's; ``recompute`` says what the backward pass computes anew, ``residual`` whether there is any
            ``+``.
        layer_number: 1-based index among this stage's blocks.
        pg_collection: Process groups.
        vp_stage: Chunk of a virtual pipeline.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        self.input_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attention = Attention(config, pg_collection)
        self.pre_mlp_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = Mlp(config, pg_collection)

    def recomputes(self, child: str) -> bool:
        """Tells whether the backward pass computes a child of this layer anew."""
        return self.config.recompute == "full" or (self.config.recompute == "selective" and child in SELECTED)

    def _recomputed(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> torch.Tensor:
        """Calls a function and keeps its inputs only, so that the backward pass computes it anew."""
        if self.config.reentrant:
            return tensor_parallel.checkpoint(function, False, *inputs)
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _block(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tables = None if cos is None or sin is None else (cos, sin)
        attended = self.self_attention(self.input_layernorm(hidden), mask, tables)
        if self.config.recompute == "selective" and torch.is_grad_enabled():
            return self._recomputed(self._second_half, attended + hidden if self.config.residual else attended)
        if not self.config.residual:
            return self._second_half(attended)
        normed, hidden = self.pre_mlp_layernorm.add(attended, hidden)
        return hidden + self.mlp(normed)

    def _second_half(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.mlp(self.pre_mlp_layernorm(hidden))
        return hidden + out if self.config.residual else out

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_pos_emb: Tables | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """Maps [sequence, batch, hidden] to the same shape; the second value is Megatron-Core's unused context."""
        inputs = hidden_states, attention_mask, *(rotary_pos_emb or ())
        if self.config.recompute == "full" and torch.is_grad_enabled():
            return self._recomputed(self._block, *inputs), None
        return self._block(*inputs), None
