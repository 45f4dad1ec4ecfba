"""Trains a tiny shared model for a few steps on Megatron-Core's own buffers, schedules and optimizers, over gloo."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VOCAB, SEQUENCE, SAMPLES = 128, 16, 8


@dataclass(frozen=True)
class Case:
    """One run of three optimizer steps; ``twin`` leaves one safeguard out."""

    plan: str
    pp: int = 1
    vpp: int = 1
    distributed_optimizer: bool = False
    overlap: bool = False
    recompute: str = "none"
    dtype: str = "fp32"
    twin: str = ""
    steps: int = 3


@dataclass
class Outcome:
    """What a case gave; bytes handed to all-reduces and parts of gradients (``hooks``) are of its first step."""

    losses: list[float]
    norms: list[float]
    drift: float = 0.0
    guard: str = ""
    refused: str = ""
    tie_bytes: int = 0
    replica_bytes: int = 0
    hooks: dict[str, int] = dataclasses.field(default_factory=dict)


def tiny(layers: int):
    from megatron_inherit.arch.presets import preset

    shape = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_size": 48, "vocab_size": VOCAB}
    return dataclasses.replace(preset("llama-tiny"), num_layers=layers, **shape)


def fill(chunks, plan) -> None:
    """Gives every parameter values that depend on its stage and path only."""
    import torch

    from megatron_inherit.sharing.aux_model import layer_parameters, layers_of

    names = {id(p): name for chunk in chunks for name, p in chunk.named_parameters() if "decoder.layers" not in name}
    for index, layer in layers_of(chunks):
        for component, path, module, attribute in layer_parameters(layer):
            names[id(getattr(module, attribute))] = f"{component}/{plan.ids(component)[index]}/{path}"
    for chunk in chunks:
        for parameter in chunk.parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(names[id(parameter)].encode()))
            values = torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.dim() > 1 else 0.02)
            parameter.data.copy_(values if parameter.dim() > 1 else 1 + values)


class World:
    """What one case needs, in the order an engine sets it up."""

    def __init__(self, case: Case) -> None:
        import torch
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from megatron_inherit.model.build import DTYPES, Parallel, build_chunks, decoder_config
        from megatron_inherit.model.groups import make_groups
        from megatron_inherit.sharing.aux_model import share_stages
        from megatron_inherit.sharing.partition import aligned_cuts, partition
        from megatron_inherit.sharing.pipeline import TiedStages
        from megatron_inherit.sharing.stage_plan import parse_plan

        self.case, self.plan = case, parse_plan(case.plan)
        self.groups = make_groups(pp=case.pp, vpp=case.vpp)
        crossing = len(aligned_cuts(self.plan)) + 1 < case.pp * case.vpp
        layout = partition(self.plan, case.pp, case.vpp, allow_cross_rank=crossing)
        parallel = Parallel(pp=case.pp, vpp=case.vpp)
        model = tiny(self.plan.num_layers)
        self.config = decoder_config(
            model,
            parallel,
            dtype=DTYPES[case.dtype],
            recompute=case.recompute,
            reentrant=True,
            pipeline_model_parallel_layout=layout.layout() if case.pp > 1 else None,
            overlap_p2p_comm=case.vpp > 1,
            batch_p2p_comm=case.vpp == 1,
        )
        self.chunks = list(build_chunks(model, self.config, self.groups, torch.device("cpu")))
        kept = share_stages(self.chunks, self.plan)
        fill(self.chunks, self.plan)
        if case.twin in ("wrong start", "no broadcast") and self.groups.pp.rank():
            for parameter in kept.values():
                parameter.data.add_(0.01)
        self.ties = TiedStages(layout, kept, self.groups.pp)
        self.ties.mark()
        for copy in self.ties.copies:
            if case.twin == "no mark":
                copy.parameter.shared = False
            if case.twin == "no bucket":
                copy.parameter.shared_embedding = False
        if case.twin != "no broadcast":
            self.ties.broadcast()
        buffers = DistributedDataParallelConfig(
            use_distributed_optimizer=case.distributed_optimizer,
            overlap_grad_reduce=case.overlap,
            grad_reduce_in_fp32=True,
            bucket_size=20000 if case.overlap else None,
        )
        self.ddp = [DistributedDataParallel(self.config, buffers, chunk) for chunk in self.chunks]
        options = OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            clip_grad=1.0,
            weight_decay=0.1,
            use_distributed_optimizer=case.distributed_optimizer,
            bf16=case.dtype == "bf16",
            params_dtype=DTYPES[case.dtype],
        )
        self.optimizer = get_megatron_optimizer(options, self.ddp, use_gloo_process_groups=False)
        self.config.finalize_model_grads_func = self.finalize
        self.config.no_sync_func = [chunk.no_sync for chunk in self.ddp] if case.overlap else None
        if case.overlap and case.vpp == 1:
            self.config.no_sync_func = self.ddp[0].no_sync

    def finalize(self, model, *args, **kwargs) -> None:
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads(model, *args, **kwargs)
        if self.case.twin != "no reduce":
            self.ties.reduce_gradients()

    def step(self, rows) -> tuple[float, float]:
        import torch
        import torch.distributed as dist
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_inherit.model.cpu import cuda_means_cpu

        mine = rows.chunk(self.groups.dp.size())[self.groups.dp.rank()]

        def forward(data, model):
            row = next(data)
            out = model(row[:, :-1], labels=row[:, 1:])
            return out, lambda loss: (loss.float() / SEQUENCE, {"loss": loss.detach() / SEQUENCE})

        feeds = [iter([row[None] for row in mine]) for _ in self.ddp]
        with cuda_means_cpu():
            for chunk in self.ddp:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            found = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=feeds if self.case.vpp > 1 else feeds[0],
                model=self.ddp if self.case.vpp > 1 else self.ddp[0],
                num_microbatches=len(mine),
                seq_length=SEQUENCE,
                micro_batch_size=1,
            )
            _, norm, _ = self.optimizer.step()
        loss = torch.stack([value["loss"] for value in found]).mean() if found else torch.zeros(())
        dist.all_reduce(loss)
        return loss.item() / self.groups.dp.size(), float(norm)

    @contextlib.contextmanager
    def counted(self, outcome: Outcome) -> Iterator[None]:
        """Counts the bytes that this rank hands to all-reduces over its replicas and over its tied stages."""
        import torch.distributed as dist

        plain, ties = dist.all_reduce, {id(copy.group) for copy in self.ties.copies}
        replicas = getattr(self.ddp[0].bucket_groups[0], "data_parallel_group", None)

        def count(tensor, *arguments, group=None, **more):
            size = tensor.numel() * tensor.element_size() if tensor.numel() > 1 else 0  # norms go over the same groups
            if id(group) in ties:
                outcome.tie_bytes += size
            elif group is not None and group is replicas:
                outcome.replica_bytes += size
            return plain(tensor, *arguments, group=group, **more)

        dist.all_reduce = count
        try:
            yield
        finally:
            dist.all_reduce = plain

    def hook_counts(self) -> dict[str, int]:
        """Gives how often Megatron-Core counted each parameter's gradient in the first step, by name."""
        found = {}
        for chunk in self.ddp:
            names = {parameter: name for name, parameter in chunk.module.named_parameters()}
            for group in chunk.bucket_groups:
                found |= {names[parameter]: count for parameter, count in group.per_param_grad_ready_counts.items()}
        return found

    def drift(self) -> float:
        import torch
        import torch.distributed as dist

        worst = 0.0
        for copy in self.ties.copies:
            values = [torch.empty_like(copy.parameter.data) for _ in copy.tie.ranks]
            dist.all_gather(values, copy.parameter.data.contiguous(), group=copy.group)
            worst = max([worst] + [(value - values[0]).abs().max().item() for value in values])
        return worst


def run_case(case: Case) -> Outcome:
    import torch

    from megatron_inherit.base.errors import MinheritError
    from megatron_inherit.model.cpu import cuda_means_cpu
    from megatron_inherit.sharing.hooks import check_hook_counts

    outcome = Outcome([], [])
    try:
        with cuda_means_cpu():
            world = World(case)
    except MinheritError as error:
        return Outcome([], [], refused=str(error))
    generator = torch.Generator().manual_seed(3)
    for step in range(case.steps):
        rows = torch.randint(0, VOCAB, (SAMPLES, SEQUENCE + 1), generator=generator)
        with world.counted(outcome) if step == 0 else contextlib.nullcontext():
            loss, norm = world.step(rows)
        outcome.losses.append(loss)
        outcome.norms.append(norm)
        if step == 0 and case.overlap:
            check_hook_counts(world.ddp)
            outcome.hooks = world.hook_counts()
    outcome.drift = world.drift()
    try:
        world.ties.check(case.steps)
    except MinheritError as error:
        outcome.guard = str(error)
    return outcome


def work(rank: int, world: int, store: str, cases: dict[str, Case]) -> None:
    """Runs the cases in one process of the world; rank 0 writes the outcomes, the worst drift of all ranks in them."""
    import logging
    import warnings

    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}/rendezvous", rank=rank, world_size=world)
    outcomes = {}
    for name, case in cases.items():
        found = run_case(case)
        everyone: list = [None] * world
        dist.all_gather_object(everyone, found)
        found.drift = max(other.drift for other in everyone)
        found.tie_bytes = max(other.tie_bytes for other in everyone)
        found.guard = next((other.guard for other in everyone if other.guard), "")
        outcomes[name] = dataclasses.asdict(found)
        if rank == 0:
            Path(store, "outcomes.json").write_text(json.dumps(outcomes))
    from megatron_inherit.model.groups import leave_processes

    leave_processes()


def outcomes_of(world: int, store: Path, cases: dict[str, Case]) -> dict[str, Outcome]:
    """Runs all cases in one spawned world."""
    import torch.multiprocessing as mp

    mp.spawn(work, args=(world, str(store), cases), nprocs=world)
    stored = json.loads((store / "outcomes.json").read_text())
    return {name: Outcome(**value) for name, value in stored.items()}
