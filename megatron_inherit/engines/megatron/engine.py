"""The Megatron engine: tensor, sequence, pipeline, context and data parallel, by ``megatron.core`` schedules."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.data.loader import Batch
from megatron_inherit.distill.objective import Distillation
from megatron_inherit.distill.options import Distill
from megatron_inherit.engines import ranks
from megatron_inherit.engines.base import EngineOptions, Part, ReadPart, StepResult, Topology
from megatron_inherit.engines.batches import count_tokens, equal_micro_batches, model_inputs
from megatron_inherit.engines.megatron.config import buffer_config, model_fields, parallel_of, pipeline_layout
from megatron_inherit.engines.megatron.optimizer import Stepper
from megatron_inherit.engines.parts import restore_shards, shard_parts
from megatron_inherit.model.attention import context_order
from megatron_inherit.model.build import DTYPES, build_chunks, decoder_config
from megatron_inherit.model.cpu import cuda_means_cpu
from megatron_inherit.model.groups import leave_processes, make_groups, start_processes
from megatron_inherit.model.language_model import LanguageModel
from megatron_inherit.model.load import Reader, load_chunk
from megatron_inherit.sharing.hooks import check_hook_counts
from megatron_inherit.sharing.options import Sharing
from megatron_inherit.sharing.pipeline import tie_stages
from megatron_inherit.sharing.regularise import keep_zeros, soft_tie
from megatron_inherit.sharing.relax import share_model
from megatron_inherit.sharing.stage_plan import unshared
from megatron_inherit.sharing.tensors import restoring


class MegatronEngine:
    """One model spread over all processes; see ``engines.base.Engine`` for what its methods promise.

    Args:
        options: How it is spread and stepped; checked by ``engines.check.check_options``.
        config: The model.
        read: Where the initial weights come from.
        distill: Trains towards a teacher instead of the next token.
    """

    def __init__(
        self, options: EngineOptions, config: ModelConfig, read: Reader, distill: Distill | None = None
    ) -> None:
        self.options, self.config, self.forward_seconds = options, config, 0.0
        if options.deterministic:
            ranks.make_deterministic()
        self.device = start_processes(timeout_s=options.timeout_s)
        self.groups = make_groups(tp=options.tp, pp=options.pp, vpp=options.vpp, cp=options.cp)
        self.topology = self._topology()
        self.core = decoder_config(
            config,
            parallel_of(options),
            dtype=DTYPES[options.dtype],
            recompute=options.recompute,
            pipeline_model_parallel_layout=pipeline_layout(options),
            **model_fields(options),
        )
        self.chunks = list(build_chunks(config, self.core, self.groups, self.device))
        shared = share_model(self.chunks, options.sharing) if options.sharing else {}
        for chunk in self.chunks:
            load_chunk(chunk, read)
        self.edits = [] if options.soft_tie is None else [soft_tie(self.chunks, options.soft_tie)]
        self.edits += [keep_zeros(self.chunks)] if options.keep_zeros else []
        self.ties = tie_stages(options.sharing, shared, self.groups.pp, options.vpp)
        self.objective = None if distill is None else self._objective(distill)
        with cuda_means_cpu():
            buffers = buffer_config(options)
            self.wrapped = [
                DistributedDataParallel(self.core, buffers, chunk, pg_collection=self.groups) for chunk in self.chunks
            ]
            self.stepper = Stepper(self.chunks, self.wrapped, options, self.groups)
        self._connect()
        self.is_last = self.groups.pp.rank() == self.groups.pp.size() - 1

    def rebuild(self, options: EngineOptions, read: Reader, distill: Distill | None = None) -> None:
        """Makes the engine anew in its place, within the same processes."""
        config = self.config
        self.__dict__.clear()
        gc.collect()  # hooks and buffers hold each other, and the old weights on the GPU, in circles
        MegatronEngine.__init__(self, options, config, read, distill)

    def _topology(self) -> Topology:
        groups = self.groups
        model_rank = groups.pp.rank() * groups.tp.size() + groups.tp.rank()
        return Topology(
            dist.get_rank(), dist.get_world_size(), groups.dp.rank(), groups.dp.size(), model_rank=model_rank
        )

    def _connect(self) -> None:
        """Tells the schedules how gradients are finished: summed, never scaled, for the loss is scaled already."""
        config = self.core

        def finish(model: list[Any], tokens: Any = None, **more: Any) -> None:
            finalize_model_grads(model, None, **more)
            if self.ties is not None:
                self.ties.reduce_gradients()
            for edit in self.edits:
                edit(self.stepper.updates)

        config.finalize_model_grads_func = finish
        if self.options.overlap_grad_reduce:
            single = len(self.wrapped) == 1
            config.no_sync_func = self.wrapped[0].no_sync if single else [w.no_sync for w in self.wrapped]
            if not single:
                config.grad_sync_func = [w.start_grad_sync for w in self.wrapped]

    def _objective(self, distill: Distill) -> Distillation:
        options = self.options
        plan = unshared(self.config.num_layers) if options.sharing is None else options.sharing.plan
        sharing = options.sharing or Sharing(plan=plan)
        teacher = distill.build_teacher(
            parallel_of(options),
            self.groups,
            self.device,
            layout=sharing.partition(options.pp, options.vpp),
            dtype=DTYPES[options.dtype],
            **model_fields(options),
        )
        return distill.objective(self.chunks, teacher, plan if options.sharing else None)

    def _teach(self, teacher: list[LanguageModel], micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Runs a teacher forward and gives, on the last stage, its last hidden states of each micro-batch."""
        with torch.no_grad():
            return self._run(micro_batches, "hidden", 1.0, backward=False, models=teacher)

    def _run(
        self,
        micro_batches: Sequence[Batch],
        reduction: str,
        scale: float,
        *,
        backward: bool,
        models: list[Any] | None = None,
    ) -> list[Any]:
        """Runs the schedule and gives what the loss function kept of each micro-batch, on the last stage."""

        def forward(batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
            batch = next(batches)
            inputs: dict[str, Any] = model_inputs(batch, self.device)
            if reduction == "logits":
                inputs["labels"] = None
            elif reduction == "hidden":
                inputs["objective"] = lambda _, hidden: hidden
            elif backward and self.objective is not None:
                inputs["objective"] = self.objective.term(batch, inputs)
            else:
                inputs["reduction"] = reduction

            def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                counted = torch.ones((), dtype=torch.int, device=self.device)
                return output.sum() * scale, counted, output.detach()

            began = time.perf_counter()
            output = model(**inputs)
            self.forward_seconds += time.perf_counter() - began
            return output, loss

        batch, length = micro_batches[0].tokens.shape
        models = models or (self.wrapped if backward else self.chunks)
        iterators: list[Iterator[Batch]] = [iter(micro_batches) for _ in models]
        single = len(models) == 1
        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators[0] if single else iterators,
            model=models[0] if single else models,
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=batch,
            forward_only=not backward,
        )

    def train_step(self, micro_batches: Sequence[Batch], *, lr: float) -> StepResult:
        """Runs one optimizer step on this replica's micro-batches of the global batch."""
        tokens = count_tokens(micro_batches)
        if self.topology.data_size > 1:
            tokens = round(ranks.sum_over([tokens], self.groups.dp, self.device)[0])
        self.forward_seconds = 0.0
        with cuda_means_cpu():
            for wrapped in self.wrapped:
                wrapped.train()
                wrapped.zero_grad_buffer()
            self.stepper.optimizer.zero_grad()
            scale = 1.0 / max(tokens, 1)
            if self.objective is not None:
                self.objective.begin(self.stepper.updates, micro_batches, scale=scale, run=self._teach)
            kept = self._run(micro_batches, "sum", scale, backward=True)
            norm, finite = self.stepper.step(lr)
        self._guard()
        counts = self.is_last and self.groups.tp.rank() == 0
        local = float(torch.stack(kept).double().sum()) if counts else 0.0
        total = ranks.sum_over([local], None, self.device)[0] if self.topology.world_size > 1 else local
        return StepResult(
            total / max(tokens, 1), norm, tokens, skipped=not finite, forward_seconds=self.forward_seconds
        )

    def _guard(self) -> None:
        """Compares the copies of shared stages now and then, and once the counts of their gradient hooks."""
        if self.ties is None:
            return
        if self.stepper.updates % self.ties.guard_every_steps == 0:
            self.ties.check(self.stepper.updates)
        counted = self.options.overlap_grad_reduce and self.core.grad_sync_func is None
        if counted and not self.ties.hooks_checked:
            check_hook_counts(self.wrapped)
            self.ties.hooks_checked = True

    def _evaluate(self, micro_batches: Sequence[Batch], reduction: str) -> list[torch.Tensor]:
        for chunk in self.chunks:
            chunk.eval()
        with cuda_means_cpu(), torch.no_grad():
            return self._run(micro_batches, reduction, 1.0, backward=False)

    def _replica_sum(self, value: torch.Tensor) -> torch.Tensor:
        """Adds a tensor over the ranks of this replica in which only tensor rank 0 of the last stage has values."""
        if not (self.is_last and self.groups.tp.rank() == 0):
            value = torch.zeros_like(value)
        for group in (self.groups.mp, self.groups.cp):
            if group.size() > 1:
                dist.all_reduce(value, group=group)
        return value

    def sequence_losses(self, batch: Batch) -> tuple[list[float], list[int]]:
        """Sums the loss and counts the unmasked tokens of each sequence, in evaluation mode."""
        pieces = equal_micro_batches(batch, self.options.micro_batch, self.options.pp if self.options.vpp > 1 else 1)
        kept = self._evaluate(pieces, "none")
        sums = torch.zeros(sum(len(piece) for piece in pieces), dtype=torch.float64, device=self.device)
        if self.is_last:
            sums = torch.cat([losses.double().sum(dim=1) for losses in kept])
        sums = self._replica_sum(sums)[: len(batch)]
        return sums.tolist(), batch.loss_mask.sum(axis=1).tolist()

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Gives fp32 logits [batch, sequence, vocab_size] of int64 tokens [batch, sequence], on every rank."""
        ids = tokens.cpu().numpy()
        batch = Batch(tokens=ids, labels=ids, loss_mask=ids >= 0, sample_ids=ids[:, 0])
        pieces = equal_micro_batches(batch, self.options.micro_batch, self.options.pp if self.options.vpp > 1 else 1)
        kept = self._evaluate(pieces, "logits")
        rows = self.chunks[0].vocab_size // self.options.tp
        local = torch.zeros(len(tokens), tokens.size(1) // self.options.cp, rows, device=self.device)
        if self.is_last:
            local = torch.cat(kept)[: len(tokens)].float()
        whole = torch.zeros(len(tokens), tokens.size(1), rows * self.options.tp, device=self.device)
        if self.is_last:
            mine = context_order(tokens.size(1), self.options.cp, self.groups.cp.rank()) if self.options.cp > 1 else ...
            columns = slice(self.groups.tp.rank() * rows, (self.groups.tp.rank() + 1) * rows)
            whole[:, mine, columns] = local
        for group in (self.groups.mp, self.groups.cp):
            if group.size() > 1:
                dist.all_reduce(whole, group=group)
        return whole[..., : self.config.vocab_size]

    def parts(self) -> Iterator[Part]:
        """Yields this rank's share of the weights and optimizer state."""
        shards = itertools.chain(self.stepper.weight_shards(), self.stepper.state_shards())
        return shard_parts(shards, model_rank=self.groups.tp.rank())

    def step_count(self) -> int:
        """Tells how many updates the optimizer has applied."""
        return self.stepper.updates

    def restore(self, read: ReadPart, *, step_count: int) -> None:
        """Sets weights and optimizer state from a stored state, whatever layout or engine wrote it."""
        if self.options.sharing is not None:
            read = restoring(read, self.options.sharing.plan, relaxed=self.options.sharing.relaxed)
        self.stepper.prepare_restore(step_count)
        restore_shards(itertools.chain(self.stepper.weight_shards(), self.stepper.state_shards()), read)

    def reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Adds values over the replicas, in float64, the same bits on every rank."""
        return ranks.sum_over(values, self.groups.dp, self.device)

    def any_rank(self, flag: bool) -> bool:
        """Tells whether the flag is set on any rank."""
        return ranks.any_rank(flag, self.device)

    def gather_text(self, text: str) -> list[str]:
        """Gives every rank's text on every rank, in order of ranks."""
        return ranks.gather_text(text, self.device)

    def weight_hash(self) -> str:
        """Hashes this rank's weights; equal on ranks of equal ``topology.model_rank``."""
        self.stepper.gather_weights()
        return ranks.hash_tensors([parameter for chunk in self.chunks for parameter in chunk.parameters()])

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier()

    def close(self) -> None:
        """Leaves the process groups, after a barrier."""
        leave_processes()
