"""The model of this project: Megatron-Core's GPTModel with our positions, our attention masks and our loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import TensorSpec
from megatron_inherit.kernels.dispatch import linear_cross_entropy
from megatron_inherit.model.attention import Tables, attention_mask, context_order
from megatron_inherit.model.rope import Rotary

IGNORED = -100
"""Label of a token that does not count in the loss."""


class LanguageModel(GPTModel):
    """A decoder, or one pipeline stage of it.

    Args:
        model: Our description of the model.
        arguments: Those of GPTModel.

    Attributes:
        own_specs: What parameters that no ordinary model has are stored as, by their names in this module.
        stored_name: Gives the name under which a checkpoint stores a canonical tensor; another one with shared stages.
    """

    def __init__(self, model: ModelConfig, **arguments: Any) -> None:
        super().__init__(
            position_embedding_type="none" if model.rope else "learned_absolute",
            max_sequence_length=model.max_positions,
            share_embeddings_and_output_weights=model.tied,
            **arguments,
        )
        self.model = model
        self.rotary = Rotary(model) if model.rope else None
        self.stored_name: Callable[[str], str] = str
        self.own_specs: dict[str, tuple[TensorSpec, ...]] = {}
        self.tp_size, self.cp_size = self.pg_collection.tp.size(), self.pg_collection.cp.size()

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        reduction: Literal["sum", "none"] = "sum",
        objective: Callable[[LanguageModel, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Runs this stage on whole sequences; a context parallel rank takes its own part of them.

        Args:
            tokens: int64 [batch, sequence].
            labels: int64 [batch, sequence], each input's next token, ``IGNORED`` where it does not count.
            position_ids: int64 [batch, sequence], or None where positions run from 0.
            segment_ids: Integers [batch, sequence]: attention stays within equal neighbours; None for plain causal.
            reduction: ``sum`` over this rank's tokens, or ``none``.
            objective: Computes on the last stage what is returned instead, from the model and its last hidden states.

        Returns:
            Before the last stage, the hidden states [local sequence, batch, hidden]; with labels, the loss in nats, a
            scalar or [batch, local sequence], float32; else this rank's logits, see ``logits``.
        """
        hidden = self.hidden_states(tokens, position_ids, segment_ids)
        if not self.post_process:
            return hidden
        if objective is not None:
            return objective(self, hidden)
        return self.logits(hidden) if labels is None else self.loss(hidden, labels, reduction)

    def hidden_states(
        self, tokens: torch.Tensor, position_ids: torch.Tensor | None = None, segment_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Gives what the last block of this stage puts out (after the final norm on the last stage)."""
        length = tokens.size(1)
        mine = self.local_order(length, tokens.device)
        hidden = None
        if self.pre_process:
            positions = torch.arange(length, device=tokens.device)[None] if position_ids is None else position_ids
            local = tokens, positions
            if mine is not None:
                local = tokens[:, mine], positions[:, mine]
            hidden = self.embedding(*local)
        return self.decoder(
            hidden_states=hidden,
            attention_mask=self._mask(length, segment_ids, mine, tokens.device),
            rotary_pos_emb=self._tables(length, position_ids, mine, tokens.device),
        )

    def local_order(self, length: int, device: torch.device) -> torch.Tensor | None:
        """Gives the positions of a context parallel rank's tokens, or None where it holds all of them in order."""
        if self.cp_size == 1:
            return None
        return context_order(length, self.cp_size, self.pg_collection.cp.rank()).to(device)

    def _mask(
        self, length: int, segments: torch.Tensor | None, mine: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor | None:
        window = self.model.sliding_window
        window = None if window is None or window >= length else window
        if segments is None and mine is None and window is None:
            return None
        if mine is None:
            queries = keys = torch.arange(length, device=device)
        else:
            queries = mine
            keys = torch.cat([context_order(length, self.cp_size, rank) for rank in range(self.cp_size)]).to(device)
        return attention_mask(queries, keys, segments=segments, window=window)

    def _tables(
        self, length: int, positions: torch.Tensor | None, mine: torch.Tensor | None, device: torch.device
    ) -> Tables | None:
        if self.rotary is None:
            return None
        cos, sin = self.rotary.tables(length, device)
        if positions is not None:
            local = positions if mine is None else positions[:, mine]
            return cos[local.T], sin[local.T]
        return (cos, sin) if mine is None else (cos[mine], sin[mine])

    def head_weight(self) -> torch.Tensor:
        """Gives this rank's rows of the head, the embedding's where they are tied, padding rows included."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def padding_rows(self) -> int:
        """Tells how many of this rank's last head rows are vocabulary padding."""
        rows = self.vocab_size // self.tp_size
        return min(rows, max(0, (self.pg_collection.tp.rank() + 1) * rows - self.model.vocab_size))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gives logits [batch, local sequence, this rank's vocabulary rows], those of padding rows -inf."""
        logits, _ = self.output_layer(hidden, weight=self.head_weight())
        logits = logits.transpose(0, 1)
        padding = self.padding_rows()
        return F.pad(logits[..., : logits.size(-1) - padding], (0, padding), value=-torch.inf) if padding else logits

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor, reduction: Literal["sum", "none"]) -> torch.Tensor:
        """Gives the next-token loss of this rank's tokens, see ``forward``; whole logits never exist on one rank."""
        mine = self.local_order(labels.size(1), labels.device)
        labels = labels if mine is None else labels[:, mine]
        hidden, head = self.head_inputs(hidden)
        losses = linear_cross_entropy(hidden, self.head_weight(), labels.T, ignore_index=IGNORED, **head)
        return losses.sum() if reduction == "sum" else losses.T

    def head_inputs(self, hidden: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """Gives the hidden states [local sequence, batch, hidden] of all of a rank's tokens, and its part of the head.

        Returns:
            What the operations of ``kernels.dispatch`` on a linear head take: states and named arguments.
        """
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        return hidden, {
            "vocab_size": self.model.vocab_size,
            "vocab_start": self.pg_collection.tp.rank() * (self.vocab_size // self.tp_size),
            "tp_group": self.tp_group if self.tp_size > 1 else None,
            "reduce_hidden_grad": not self.config.sequence_parallel,
        }
