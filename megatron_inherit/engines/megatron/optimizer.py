"""Megatron-Core's AdamW around a model's chunks: its construction, its shards and one guarded step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer, ParamKey, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_inherit.base.log import get_logger
from megatron_inherit.engines.base import EngineOptions
from megatron_inherit.engines.megatron.config import optimizer_config
from megatron_inherit.engines.parts import MOMENTS, Shard, decays
from megatron_inherit.model.language_model import LanguageModel
from megatron_inherit.model.pieces import pieces_of

_log = get_logger(__name__)


class Stepper:
    """Owns the optimizer of all chunks of this rank.

    Args:
        chunks: The models.
        wrapped: The same in their gradient buffers.
        options: The engine's.
        groups: Process groups.
    """

    def __init__(
        self,
        chunks: list[LanguageModel],
        wrapped: list[DistributedDataParallel],
        options: EngineOptions,
        groups: ProcessGroupCollection,
    ) -> None:
        self.options, self.groups, self.wrapped, self.updates = options, groups, wrapped, 0
        self.named = [
            (parameters[name], pieces)
            for chunk in chunks
            for parameters in (dict(chunk.named_parameters()),)
            for name, pieces in pieces_of(chunk).items()
        ]
        for parameter, pieces in self.named:
            parameter.undecayed = not decays(pieces[0].spec)
        chained = get_megatron_optimizer(
            optimizer_config(options),
            wrapped,
            config_overrides={ParamKey(attr="undecayed"): {"wd_mult": 0.0, "weight_decay": 0.0}},
            use_gloo_process_groups=False,
            pg_collection=groups,
        )
        self.optimizer: MegatronOptimizer = chained.chained_optimizers[0]
        self.adam: Any = self.optimizer.optimizer
        if isinstance(self.adam, torch.optim.AdamW):
            for group in self.adam.param_groups:
                group["fused"], group["foreach"] = True, False
        if options.overlap_param_gather:
            for chunk, buffers in zip(chunks, wrapped, strict=True):
                _await_uncalled(chunk, buffers)
        _log.info("The optimizer is %s of %s.", type(self.adam).__name__, type(self.adam).__module__.partition(".")[0])

    def step(self, lr: float) -> tuple[float, bool]:
        """Clips and applies the gradients in the buffers.

        Returns:
            The gradient's norm, and whether it was finite; nothing changes if it was not.
        """
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            return norm, False
        for group in self.adam.param_groups:
            group["lr"] = lr
        self._clip(norm)
        self.optimizer.step_with_ready_grads()
        self.updates += 1
        return norm, True

    def _clip(self, norm: float) -> None:
        factor = self.options.clip / (norm + 1e-6) if self.options.clip else 1.0
        gradients = [p.grad for p in self.optimizer.get_parameters() if p.grad is not None]
        if factor < 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)

    def _stored(self, parameter: torch.nn.Parameter) -> tuple[torch.Tensor | None, int, int]:
        """Gives the tensor that AdamW updates for a parameter, and the parameter's range that it covers."""
        optimizer = self.optimizer
        if isinstance(optimizer, DistributedOptimizer):
            if parameter not in optimizer.model_param_gbuf_map:
                return None, 0, 0
            bounds = optimizer._get_model_param_range_map(parameter)["param"]
            return optimizer._get_main_param_and_optimizer_states(parameter)["param"], bounds.start, bounds.end
        return getattr(parameter, "main_param", parameter), 0, parameter.numel()

    def gather_weights(self) -> None:
        """Makes the weights whole on every replica, which ``overlap_param_gather`` leaves to the next forward pass."""
        if self.options.overlap_param_gather:
            for wrapped in self.wrapped:
                wrapped.start_param_sync(force_sync=True)

    def weight_shards(self) -> Iterator[Shard]:
        """Yields the model's weights; the replicas take turns in writing them."""
        self.gather_weights()
        turn, size = self.groups.dp_cp.rank(), self.groups.dp_cp.size()
        for index, (parameter, pieces) in enumerate(self.named):
            values = {"weight": parameter.data.view(-1)}
            yield Shard(pieces, 0, parameter.numel(), values, written=index % size == turn)

    def state_shards(self) -> Iterator[Shard]:
        """Yields fp32 masters (bf16 only) and moments, as far as they exist."""
        turn, size = self.groups.dp_cp.rank(), self.groups.dp_cp.size()
        sharded = isinstance(self.optimizer, DistributedOptimizer)
        for index, (parameter, pieces) in enumerate(self.named):
            main, low, high = self._stored(parameter)
            if main is None:
                continue
            state = self.adam.state.get(main, {})
            values = {kind: state[kind].view(-1) for kind in MOMENTS if kind in state}
            if parameter.dtype != torch.float32:
                values = {"fp32": main.data.view(-1), **values}
            yield Shard(pieces, low, high, values, written=sharded or index % size == turn)

    def prepare_restore(self, updates: int) -> None:
        """Makes room for the moments of ``updates`` earlier steps."""
        self.updates = updates
        for group in self.adam.param_groups:
            if not isinstance(self.adam, torch.optim.AdamW):  # apex and Transformer Engine count by group
                group["step"] = updates
            for parameter in group["params"]:
                if not updates:
                    self.adam.state.pop(parameter, None)
                    continue
                state = self.adam.state[parameter]
                if isinstance(self.adam, torch.optim.AdamW):
                    state["step"] = torch.tensor(float(updates), dtype=torch.float32, device=parameter.device)
                for kind in MOMENTS:
                    state.setdefault(kind, torch.zeros_like(parameter))


def _await_uncalled(chunk: LanguageModel, wrapped: DistributedDataParallel) -> None:
    """Waits for gathered weights whose module is used without being called, so that its own hook never runs."""

    def wait(module: torch.nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            wrapped.param_to_bucket_group[parameter].finish_param_sync()

    for layer in chunk.decoder.layers:
        layer.register_forward_pre_hook(lambda layer, _: wait(layer.pre_mlp_layernorm))
    if chunk.post_process:
        chunk.decoder.register_forward_hook(lambda *_: wait(chunk.output_layer))
