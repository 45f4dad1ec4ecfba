"""What an engine minimises instead of the next-token loss: a mixture of distances from a teacher.

The engine shows every step's micro-batches before it starts, with a way to run a model forward over them, and asks for
each micro-batch's term right before it runs the student on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.distill.cache import CachedTargets
from megatron_inherit.distill.losses import Mix, hidden_distance, hidden_pairs
from megatron_inherit.distill.targets import ghost_of
from megatron_inherit.distill.teacher import layers_at
from megatron_inherit.kernels.dispatch import linear_cross_entropy, linear_kl, linear_topk_kl
from megatron_inherit.model.language_model import IGNORED
from megatron_inherit.sharing.stage_plan import StagePlan, unshared

if TYPE_CHECKING:
    from megatron_inherit.data.loader import Batch
    from megatron_inherit.model.language_model import LanguageModel

Run = Callable[["list[LanguageModel]", "Sequence[Batch]"], "list[torch.Tensor]"]
"""Runs a model forward over micro-batches and gives, on the last stage, the final hidden states of each."""

Term = Callable[["LanguageModel", torch.Tensor], torch.Tensor]
"""Gives the loss of a micro-batch, summed over this rank's tokens, from the student's final hidden states."""


class _Attach(torch.autograd.Function):
    """Gives hidden states as they are and lets a loss of theirs take part in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.loss_dtype = loss.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, torch.ones((), dtype=ctx.loss_dtype, device=gradient.device)


class Distillation:
    """The objective of one student.

    Args:
        mix: Weights of the terms.
        teacher: This rank's part of the frozen teacher, or None with a cache.
        cache: Targets made before, or None with a teacher.
        plan: The student's stages, at whose ends hidden states are compared; None compares at the end of every layer.

    Raises:
        ConfigError: There is neither teacher nor cache, or the mixture asks of a cache what it does not hold.
    """

    def __init__(
        self,
        mix: Mix,
        *,
        teacher: list[LanguageModel] | None = None,
        cache: CachedTargets | None = None,
        plan: StagePlan | None = None,
    ) -> None:
        if (teacher is None) == (cache is None):
            raise ConfigError("A distillation needs either a teacher or cached targets.", fix="Set one of them.")
        if cache is not None and (mix.kind != "forward" or mix.hidden_weight):
            raise ConfigError(
                "Cached targets hold the teacher's probabilities for forward KL and nothing else.",
                fix="Set distill.kind to forward and distill.hidden_weight to 0, or give distill.teacher.",
            )
        self.mix, self.teacher, self.cache, self.plan = mix, teacher, cache, plan
        self.alpha = mix.alpha
        self._scale = 1.0
        self._final: dict[bytes, torch.Tensor] = {}
        self._inner: dict[tuple[int, bytes], torch.Tensor] = {}
        self._current, self._mask = b"", torch.ones(())
        self._pending: list[bytes] = []
        self._seen: dict[int, int] = {}

    def attach(self, student: Sequence[LanguageModel]) -> None:
        """Puts the comparisons of hidden states into a student's layers; call it once, when the student is built."""
        if not self.mix.hidden_weight or self.teacher is None:
            return
        plan = self.plan or unshared(student[0].model.num_layers)
        pairs = hidden_pairs(plan, self.teacher[0].model.num_layers)
        own, others = layers_at(student), layers_at(self.teacher)
        for stage, (mine, theirs) in enumerate(pairs):
            if mine in own:
                others[theirs].register_forward_hook(self._keeper(stage))
                own[mine].register_forward_hook(self._comparer(stage, self.mix.hidden_weight / len(pairs)))

    def begin(self, step: int, micro_batches: Sequence[Batch], *, scale: float, run: Run) -> None:
        """Prepares an optimizer step.

        Args:
            step: Updates done before it.
            micro_batches: Of this replica.
            scale: What the engine multiplies the summed loss by.
            run: Runs the teacher.
        """
        self.alpha, self._scale = self.mix.alpha_at(step), scale
        self._final.clear()
        self._inner.clear()
        if self.teacher is None:
            return
        self._pending = [batch.sample_ids.tobytes() for batch in micro_batches]
        self._seen = {}
        for key, hidden in zip(self._pending, run(self.teacher, micro_batches), strict=False):
            self._final[key] = hidden

    def term(self, batch: Batch, inputs: Mapping[str, Any]) -> Term:
        """Gives the loss of one micro-batch; the next forward pass of the student must be on it."""
        labels: torch.Tensor = inputs["labels"]
        self._current, self._mask = batch.sample_ids.tobytes(), (labels != IGNORED).T
        return lambda model, hidden: self._loss(model, hidden, labels, batch)

    def _loss(self, model: LanguageModel, hidden: torch.Tensor, labels: torch.Tensor, batch: Batch) -> torch.Tensor:
        mine = model.local_order(labels.size(1), labels.device)
        local = (labels if mine is None else labels[:, mine]).T
        hidden, head = model.head_inputs(hidden)
        if self.teacher is not None:
            other, _ = self.teacher[-1].head_inputs(self._final[self._current])
            return linear_kl(
                hidden,
                model.head_weight(),
                other,
                self.teacher[-1].head_weight(),
                labels=local,
                ignore_index=IGNORED,
                temperature=self.mix.temperature,
                kind=self.mix.kind,
                alpha=self.alpha,
                **head,
            ).sum()
        if self.cache is None:
            raise ConfigError("A distillation needs either a teacher or cached targets.")
        return self._cached(self.cache, model, hidden, local, mine, batch, head)

    def _cached(
        self,
        cache: CachedTargets,
        model: LanguageModel,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        mine: torch.Tensor | None,
        batch: Batch,
        head: Mapping[str, Any],
    ) -> torch.Tensor:
        found = cache.read(batch.sample_ids)
        ids, log_probs = (torch.from_numpy(values).to(hidden.device).transpose(0, 1) for values in found)
        if mine is not None:
            ids, log_probs = ids[mine], log_probs[mine]
        drawn = cache.manifest.method == "draw"
        ghost = log_probs.new_full(ids.shape[:-1], -torch.inf) if drawn else ghost_of(log_probs)
        loss = linear_topk_kl(
            hidden,
            model.head_weight(),
            ids,
            log_probs,
            ghost,
            temperature=self.mix.temperature,
            mask=labels != IGNORED,
            **head,
        ).sum()
        if self.alpha == 1:
            return loss
        plain = linear_cross_entropy(hidden, model.head_weight(), labels, ignore_index=IGNORED, **head).sum()
        return self.alpha * loss + (1 - self.alpha) * plain

    def _keeper(self, stage: int) -> Callable[..., None]:
        def keep(layer: torch.nn.Module, inputs: Any, output: Any) -> None:
            index = self._seen.get(stage, 0)
            self._seen[stage] = index + 1
            self._inner[stage, self._pending[index]] = output[0].detach()

        return keep

    def _comparer(self, stage: int, weight: float) -> Callable[..., Any]:
        def compare(layer: torch.nn.Module, inputs: Any, output: Any) -> Any:
            target = self._inner.get((stage, self._current))
            if target is None or not torch.is_grad_enabled():
                return None
            distance = hidden_distance(output[0], target, self.mix.hidden_kind)
            loss = (distance * self._mask).sum() * (weight * self._scale)
            return (_Attach.apply(output[0], loss), *output[1:])

        return compare
