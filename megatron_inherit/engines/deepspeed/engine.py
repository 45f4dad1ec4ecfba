"""The DeepSpeed engine: ZeRO stages 0 to 3 around the same model, tensor parallelism by Megatron-Core's groups."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_inherit.arch.counts import count_parameters
from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.log import get_logger
from megatron_inherit.data.loader import Batch
from megatron_inherit.distill.objective import Distillation
from megatron_inherit.distill.options import Distill
from megatron_inherit.engines import ranks
from megatron_inherit.engines.base import EngineOptions, Part, ReadPart, StepResult, Topology
from megatron_inherit.engines.batches import count_tokens, equal_micro_batches, model_inputs
from megatron_inherit.engines.deepspeed import nvme, shards
from megatron_inherit.engines.deepspeed.adam import ClippedAdamW
from megatron_inherit.engines.deepspeed.config import deepspeed_config, import_deepspeed, mpu_of
from megatron_inherit.engines.deepspeed.edits import GradientEdits
from megatron_inherit.engines.parts import MOMENTS, Shard, decays, fill_flat, restore_shards, shard_parts
from megatron_inherit.model.build import DTYPES, Parallel, build_chunks, decoder_config
from megatron_inherit.model.cpu import cuda_means_cpu
from megatron_inherit.model.groups import leave_processes, make_groups, start_processes
from megatron_inherit.model.language_model import LanguageModel
from megatron_inherit.model.load import Reader, load_chunk
from megatron_inherit.model.pieces import pieces_of
from megatron_inherit.sharing.hooks import OneGradient
from megatron_inherit.sharing.partition import Partition
from megatron_inherit.sharing.pipeline import divide_by_uses
from megatron_inherit.sharing.relax import share_model
from megatron_inherit.sharing.stage_plan import unshared
from megatron_inherit.sharing.tensors import count_shared, restoring

_log = get_logger(__name__)


class DeepSpeedEngine:
    """One model whose replicas share out its optimizer, gradients or weights; see ``engines.base.Engine``.

    Args:
        options: How it is spread and stepped; checked by ``engines.check.check_options``.
        config: The model.
        read: Where the initial weights come from. Under ZeRO-3 each rank reads only the slices that it keeps.
        distill: Trains towards a teacher instead of the next token; the teacher is whole on every rank.
    """

    def __init__(
        self, options: EngineOptions, config: ModelConfig, read: Reader, distill: Distill | None = None
    ) -> None:
        self.options, self.config, self.updates = options, config, 0
        if options.deterministic:
            ranks.make_deterministic()
        self.device = start_processes(timeout_s=options.timeout_s)
        self.groups = make_groups(tp=options.tp)
        deepspeed = import_deepspeed()
        self.disk = self._claim_disk()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False, dist_init_required=False)
        groups = self.groups
        self.topology = Topology(
            dist.get_rank(), dist.get_world_size(), groups.dp.rank(), groups.dp.size(), model_rank=groups.tp.rank()
        )
        self.mpu = mpu_of(groups)
        stored = options if self.disk is None else dataclasses.replace(options, nvme_path=str(self.disk.path))
        ds_config = deepspeed_config(stored, replicas=groups.dp.size(), parameters=count_parameters(config))
        self.model = self._build(deepspeed, ds_config)
        pieces = pieces_of(self.model)
        self.named = [(parameter, pieces[name]) for name, parameter in self.model.named_parameters()]
        self._fill(read)
        self._sum_over_tensor_ranks()
        edited = options.soft_tie is not None or options.keep_zeros
        self.edits = GradientEdits(self.model, options, groups.dp, self.device) if edited else None
        self.objective = None if distill is None else self._objective(distill)
        self.once = OneGradient(self.model) if options.sharing is not None else None
        self.adam = self._adam()
        with cuda_means_cpu(), contextlib.redirect_stdout(io.StringIO()):  # it prints memory figures
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=self.model, optimizer=self.adam, config=ds_config, mpu=self.mpu
            )

    def rebuild(self, options: EngineOptions, read: Reader, distill: Distill | None = None) -> None:
        """Makes the engine anew in its place, within the same processes."""
        config = self.config
        self._end()
        self.__dict__.clear()
        gc.collect()  # hooks and buffers hold each other, and the old weights on the GPU, in circles
        DeepSpeedEngine.__init__(self, options, config, read, distill)

    def _claim_disk(self) -> nvme.OwnFolder | None:
        if not self.options.nvme_path:
            return None
        sharing = self.options.sharing
        count = count_parameters(self.config) if sharing is None else count_shared(self.config, sharing.plan).unique
        return nvme.claim_folder(self.options.nvme_path, count // dist.get_world_size(), self.gather_text)

    def _build(self, deepspeed: Any, ds_config: dict[str, Any]) -> Any:
        dtype = DTYPES[self.options.dtype]
        parallel = Parallel(tp=self.options.tp, sequence_parallel=self.options.sequence_parallel)
        core = decoder_config(self.config, parallel, dtype=dtype, recompute=self.options.recompute)
        context: Any = contextlib.nullcontext()
        if self.options.zero_stage == 3:
            # the configuration says the dtype: an argument of that name is ignored where fp16 is not supported
            context = deepspeed.zero.Init(
                config_dict_or_path=ds_config, data_parallel_group=self.groups.dp, mpu=self.mpu
            )
        with context:
            model = next(build_chunks(self.config, core, self.groups, self.device))
        if self.options.sharing is not None:
            shared = share_model([model], self.options.sharing)
            if self.options.sharing.gradient == "mean":
                divide_by_uses(self.options.sharing.plan, shared)
        return model

    def _objective(self, distill: Distill) -> Distillation:
        sharing, depth = self.options.sharing, self.config.num_layers
        layout = Partition(unshared(depth), 1, 1, (0, depth))
        parallel = Parallel(tp=self.options.tp, sequence_parallel=self.options.sequence_parallel)
        dtype = DTYPES[self.options.dtype]
        teacher = distill.build_teacher(parallel, self.groups, self.device, layout=layout, dtype=dtype)
        return distill.objective([self.model], teacher, None if sharing is None else sharing.plan)

    @torch.no_grad()
    def _teach(self, teacher: list[LanguageModel], micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        inputs = (model_inputs(batch, self.device) for batch in micro_batches)
        return [teacher[0](**values, objective=lambda _, hidden: hidden) for values in inputs]

    @torch.no_grad()
    def _fill(self, read: Reader) -> None:
        if self.options.zero_stage < 3:
            load_chunk(self.model, read)
            return
        for shard in self._weights():
            fill_flat(shard.values["weight"], shard, read)

    def _sum_over_tensor_ranks(self) -> None:
        """Adds up over tensor ranks the gradients of weights that each applies to its own share of activations."""
        group = self.groups.tp
        if group.size() == 1:
            return

        def add(gradient: torch.Tensor) -> torch.Tensor:
            total = gradient.clone()
            dist.all_reduce(total, group=group)
            return total

        for name, parameter in self.model.named_parameters():
            own_heads = ".q_layernorm." in name or ".k_layernorm." in name
            own_tokens = self.options.sequence_parallel and getattr(parameter, "sequence_parallel", False)
            if own_heads or own_tokens:
                parameter.register_hook(add)

    def _adam(self) -> torch.optim.AdamW:
        options = self.options
        groups = [
            {"params": [p for p, pieces in self.named if decays(pieces[0].spec) == decayed], "weight_decay": decay}
            for decayed, decay in ((True, options.weight_decay), (False, 0.0))
        ]
        settings: dict[str, Any] = {"lr": 0.0, "betas": options.betas, "eps": options.eps, "fused": True}
        _log.info("The optimizer is torch's fused AdamW inside ZeRO-%d.", options.zero_stage)
        if options.zero_stage:
            return torch.optim.AdamW(groups, **settings)
        return ClippedAdamW(groups, clip=options.clip, tensor_group=self.groups.tp, **settings)

    def train_step(self, micro_batches: Sequence[Batch], *, lr: float) -> StepResult:
        """Runs one optimizer step on this replica's micro-batches of the global batch."""
        replicas = self.topology.data_size
        tokens = count_tokens(micro_batches)
        if replicas > 1:
            tokens = round(ranks.sum_over([tokens], self.groups.dp, self.device)[0])
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.train()
        kept, forward = [], 0.0
        scale = replicas / max(tokens, 1)  # DeepSpeed divides gradients by the number of replicas
        with cuda_means_cpu():
            for index, batch in enumerate(micro_batches):
                inputs: dict[str, Any] = model_inputs(batch, self.device)
                if self.objective is not None:
                    self.objective.begin(self.updates, [batch], scale=scale, run=self._teach)
                    inputs["objective"] = self.objective.term(batch, inputs)
                self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
                began = time.perf_counter()
                loss = self.engine(**inputs)
                forward += time.perf_counter() - began
                kept.append(loss.detach())
                if self.once is not None:
                    self.once.expect(self.updates)
                if self.edits is not None:
                    self.edits.begin(self.updates, last=index == len(micro_batches) - 1)
                self.engine.backward(loss * scale, scale_wrt_gas=False)
            if self.edits is not None:
                self.edits.finish()
            self.engine.step()
        norm, applied = self._outcome()
        self.updates += applied
        total = self.reduce_sum([float(torch.stack(kept).double().sum())])[0]
        return StepResult(total / max(tokens, 1), norm, tokens, skipped=not applied, forward_seconds=forward)

    def _outcome(self) -> tuple[float, bool]:
        if isinstance(self.adam, ClippedAdamW):
            return self.adam.norm, self.adam.applied
        return float(self.engine.get_global_grad_norm()), self.engine.was_step_applied()

    @torch.no_grad()
    def sequence_losses(self, batch: Batch) -> tuple[list[float], list[int]]:
        """Sums the loss and counts the unmasked tokens of each sequence, in evaluation mode."""
        self.engine.eval()
        sums: list[float] = []
        for piece in equal_micro_batches(batch, self.options.micro_batch, 1):
            with cuda_means_cpu():
                losses = self.engine(**model_inputs(piece, self.device), reduction="none")
            sums += losses.double().sum(dim=1).tolist()
        return sums[: len(batch)], batch.loss_mask.sum(axis=1).tolist()

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Gives fp32 logits [batch, sequence, vocab_size] of int64 tokens [batch, sequence], on every rank."""
        self.engine.eval()
        with cuda_means_cpu():
            local = self.engine(tokens=tokens.to(self.device)).float().contiguous()
        parts = [torch.empty_like(local) for _ in range(self.options.tp)]
        dist.all_gather(parts, local, group=self.groups.tp)
        return torch.cat(parts, dim=-1)[..., : self.config.vocab_size]

    def _where(self) -> dict[str, int]:
        return {"stage": self.options.zero_stage, "rank": self.topology.data_rank, "size": self.topology.data_size}

    def _weights(self) -> Iterator[Shard]:
        return shards.weight_shards(self.named, **self._where())

    def _states(self) -> Iterator[Shard]:
        return shards.state_shards(self.named, self.optimizer, **self._where())

    def parts(self) -> Iterator[Part]:
        """Yields this rank's share of the weights and optimizer state."""
        found = shard_parts(itertools.chain(self._weights(), self._states()), model_rank=self.groups.tp.rank())
        left_out = {"fp32"} if self.options.dtype == "fp32" else set()
        left_out |= set() if self.updates else set(MOMENTS)
        return (part for part in found if part.kind not in left_out)

    def step_count(self) -> int:
        """Tells how many updates the optimizer has applied."""
        return self.updates

    @torch.no_grad()
    def restore(self, read: ReadPart, *, step_count: int) -> None:
        """Sets weights and optimizer state from a stored state, whatever layout or engine wrote it."""
        self.updates = step_count
        if self.options.sharing is not None:
            read = restoring(read, self.options.sharing.plan, relaxed=self.options.sharing.relaxed)
        self._prepare_moments(step_count)
        restore_shards(itertools.chain(self._weights(), self._states()), read)
        kept = getattr(self.optimizer, "persistent_parameters", [])
        if kept:  # small ZeRO-3 weights that stay whole on each rank
            kept[0].all_gather(kept)

    def _prepare_moments(self, step_count: int) -> None:
        for flat in shards.masters(self.optimizer):
            with nvme.fresh_state(self.optimizer, flat):
                if not step_count:
                    self.adam.state.pop(flat, None)
                    continue
                state = self.adam.state[flat]
                state["step"] = torch.tensor(float(step_count), dtype=torch.float32, device=flat.device)
                for kind in MOMENTS:
                    state.setdefault(kind, torch.zeros_like(flat, requires_grad=False)).zero_()

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
        """Hashes this rank's weights; a constant under ZeRO-3, where no two ranks hold the same ones."""
        return "" if self.options.zero_stage == 3 else ranks.hash_tensors([parameter for parameter, _ in self.named])

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier()

    def close(self) -> None:
        """Leaves the process groups, after a barrier."""
        self._end()
        leave_processes()

    def _end(self) -> None:
        self.engine.destroy()
        if self.disk is not None:
            self.disk.remove()
