"""Causal self-attention by torch's scaled_dot_product_attention, at any tensor and context parallel size.

The packed projection is Megatron's: for each key/value group its query heads, its key, its value.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.base.log import get_logger
from megatron_inherit.kernels.dispatch import rope, rope_qkv
from megatron_inherit.model.norm import Norm

_log = get_logger(__name__)

Tables = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine, float32 [sequence, rotated / 2] or [sequence, batch, rotated / 2]."""


def context_order(length: int, size: int, rank: int) -> torch.Tensor:
    """Lists the positions of a context parallel rank: chunk ``rank`` and its mirror image, so that causal work is even.

    Args:
        length: Tokens of the whole sequence, a multiple of 2 x size.
        size: Context parallel ranks.
        rank: Which of them.

    Returns:
        int64 [length / size].
    """
    chunk = length // (2 * size)
    mirror = 2 * size - 1 - rank
    low, high = torch.arange(rank * chunk, (rank + 1) * chunk), torch.arange(mirror * chunk, (mirror + 1) * chunk)
    return torch.cat([low, high])


def attention_mask(
    queries: torch.Tensor, keys: torch.Tensor, *, segments: torch.Tensor | None, window: int | None
) -> torch.Tensor:
    """Builds a boolean mask, True where a query may see a key.

    Args:
        queries: Positions of the local tokens, int64 [q].
        keys: Positions of all tokens in the order of the gathered keys, int64 [k].
        segments: Document of each token of the whole sequence [batch, k in sequence order], or None.
        window: Tokens a query sees, itself included, or None for all before it.

    Returns:
        bool [batch or 1, 1, q, k].
    """
    distance = queries[:, None] - keys[None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if segments is None:
        return mask[None, None]
    same = segments[:, queries][:, :, None] == segments[:, keys][:, None, :]
    return (mask & same)[:, None]


@cache
def _announce(backend: str, head_dim: int, padded: int, dtype: torch.dtype) -> None:
    padding = f", heads of {head_dim} padded to {padded}" if padded != head_dim else ""
    _log.info("Attention runs on the %s backend in %s%s.", backend, str(dtype).removeprefix("torch."), padding)


def _cuda_backend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, gqa: bool
) -> SDPBackend:
    """Chooses the fastest fused attention that takes these tensors; the slow unfused one is never an answer."""
    causal = mask is None
    parameters = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, causal, gqa)
    if torch.backends.cuda.can_use_cudnn_attention(parameters) and torch.cuda.get_device_capability(q.device)[0] >= 9:
        return SDPBackend.CUDNN_ATTENTION
    if torch.backends.cuda.can_use_flash_attention(parameters):
        return SDPBackend.FLASH_ATTENTION
    if torch.backends.cuda.can_use_efficient_attention(parameters):
        return SDPBackend.EFFICIENT_ATTENTION
    raise ConfigError(
        "No fused attention of torch takes these heads, and the unfused one is refused for its slowness.",
        got=f"heads of {q.size(-1)} in {q.dtype}" + ("" if causal else " with a mask"),
        fix="Train in bf16, or with a head size of at most 256.",
    )


def padded_head(head_dim: int, device: torch.device) -> int:
    """Gives the head size that the fused kernels of a device take: on CUDA the next multiple of 8.

    The zeros that fill it change no product as long as the scale stays that of the true size.
    """
    return head_dim + -head_dim % 8 if device.type == "cuda" else head_dim


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, head_dim: int
) -> torch.Tensor:
    """Computes softmax(q k^T / sqrt(head_dim)) v, causal unless a mask is given.

    Args:
        q: [batch, heads, q length, padded head size].
        k: [batch, groups, k length, padded head size]; heads is a multiple of groups.
        v: As k.
        mask: bool [batch or 1, 1, q length, k length], True where a query may see a key, or None.
        head_dim: Size of a head without padding.

    Returns:
        [batch, heads, q length, head size].
    """
    gqa, scale = q.size(1) != k.size(1), head_dim**-0.5
    if not q.is_cuda:
        _announce("CPU", head_dim, q.size(-1), q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
        return out[..., :head_dim]
    if gqa and mask is not None:  # the fused kernels with a mask know no groups
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
        gqa = False
    backend = _cuda_backend(q, k, v, mask, gqa)
    _announce(backend.name, head_dim, q.size(-1), q.dtype)
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
    return out[..., :head_dim]


class Attention(MegatronModule):
    """Projections, rotary positions, optional norms of queries and keys, attention, output projection."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        size = pg_collection.tp.size()
        self.heads, self.groups = config.num_attention_heads // size, config.num_query_groups // size
        self.head_dim = config.kv_channels
        self.cp_group = pg_collection.cp
        width = config.num_attention_heads * self.head_dim
        shared: dict[str, Any] = {"config": config, "skip_bias_add": False, "tp_group": pg_collection.tp}
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size,
            width + 2 * config.num_query_groups * self.head_dim,
            init_method=config.init_method,
            bias=config.add_qkv_bias,
            gather_output=False,
            **shared,
        )
        self.linear_proj = RowParallelLinear(
            width,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            bias=config.out_bias,
            input_is_parallel=True,
            is_expert=False,
            **shared,
        )
        self.q_layernorm = self.k_layernorm = None
        if config.qk_layernorm:
            self.q_layernorm = Norm(config, self.head_dim, config.layernorm_epsilon, over_heads=True)
            self.k_layernorm = Norm(config, self.head_dim, config.layernorm_epsilon, over_heads=True)

    def queries_keys_values(
        self, hidden: torch.Tensor, tables: Tables | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Projects [sequence, batch, hidden] to three tensors [sequence, batch, heads or groups, padded head size]."""
        packed, _ = self.linear_qkv(hidden)
        padded = padded_head(self.head_dim, hidden.device)
        if tables is not None and self.q_layernorm is None:
            sizes = {"num_heads": self.heads, "num_kv_heads": self.groups, "head_dim": self.head_dim}
            return rope_qkv(packed, *tables, **sizes, pad_to=padded)
        grouped = packed.view(*packed.shape[:2], self.groups, self.heads // self.groups + 2, self.head_dim)
        q, k, v = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if tables is not None:
            q, k = rope(q, *tables), rope(k, *tables)
        if padded > self.head_dim:
            q, k, v = (F.pad(x, (0, padded - self.head_dim)) for x in (q, k, v))
        return q, k, v

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None, tables: Tables | None) -> torch.Tensor:
        """Maps [sequence, batch, hidden] to the same shape."""
        q, k, v = self.queries_keys_values(hidden, tables)
        if self.cp_group.size() > 1:
            k = gather_from_sequence_parallel_region(k.contiguous(), group=self.cp_group)
            v = gather_from_sequence_parallel_region(v.contiguous(), group=self.cp_group)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = attend(q, k, v, mask=mask, head_dim=self.head_dim)
        out = out.permute(2, 0, 1, 3).reshape(out.size(2), out.size(0), self.heads * self.head_dim)
        return self.linear_proj(out)[0]
