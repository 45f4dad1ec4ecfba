"""Process groups: one process alone, or many under a launcher, cut into tensor, context, data and pipeline groups."""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from megatron_inherit.base.errors import ConfigError

_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_processes(*, timeout_s: float = 600.0) -> torch.device:
    """Joins the other processes of the launcher, or makes a world of one, and picks this process's device.

    Reads ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``, which launchers set. Does
    nothing where the processes are joined already.

    Raises:
        ConfigError: A launcher set some of them only, or there are more processes than GPUs.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", _own_gpu(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()))
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes its device from there
    if dist.is_initialized():
        return device
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    present = [name for name in _LAUNCHER if name in os.environ]
    if len(present) == len(_LAUNCHER):
        dist.init_process_group(backend, timeout=timeout)
    elif int(os.environ.get("WORLD_SIZE", "1")) == 1 and int(os.environ.get("RANK", "0")) == 0:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        missing = ", ".join(name for name in _LAUNCHER if name not in present)
        raise ConfigError(
            f"{', '.join(present)} set by a launcher, but not {missing}.",
            fix="Start with torchrun, deepspeed or srun torchrun.",
        )
    _timeout[:] = [timeout]
    return device


def _own_gpu(local_rank: int, visible: int) -> int:
    """Gives the number of this process's GPU; a scheduler that shows each process its own alone numbers them all 0."""
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise ConfigError(
            f"LOCAL_RANK is {local_rank}, but this process sees {visible} GPUs.",
            fix="Start no more processes a node than it has GPUs.",
        )
    return local_rank


def make_groups(*, tp: int = 1, pp: int = 1, vpp: int = 1, cp: int = 1) -> ProcessGroupCollection:
    """Cuts the joined processes into groups; replaces an earlier cut, whose groups serve the new one where they can.

    Args:
        tp: Tensor parallel size.
        pp: Pipeline stages.
        vpp: Chunks a stage.
        cp: Context parallel size.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    with _kept_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            context_parallel_size=cp,
            create_gloo_process_groups=False,
        )
    initialize_rng_tracker(inference_rng_tracker=True)  # no dropout, so no state to track
    return ProcessGroupCollection.use_mpu_process_groups()


_kept: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}
_kept_of: list[dist.ProcessGroup | None] = []
_timeout: list[datetime.timedelta] = []
"""With which the processes were joined; neither torch nor Megatron-Core gives it to further groups."""


def group_of(
    ranks: Sequence[int], purpose: str, make: Callable[..., dist.ProcessGroup] = dist.new_group
) -> dist.ProcessGroup:
    """Gives the group of some ranks, made once and kept as long as the processes stay joined.

    A model that is built anew so finds the groups of the one before it, which nothing else would leave. All ranks of
    the job ask for the same groups in the same order. Every group of gloo has threads that wake a hundred times a
    second: without CUDA one group serves all purposes.

    Args:
        ranks: Ranks of the job.
        purpose: Groups of NCCL that may talk at the same time have purposes of their own.
        make: Makes it from ``ranks`` and ``timeout``, that of all groups.
    """
    if _kept_of != [dist.group.WORLD]:
        _kept.clear()
        _kept_of[:] = [dist.group.WORLD]
    key = purpose if torch.cuda.is_available() else "", tuple(ranks)
    if key not in _kept:
        _kept[key] = make(list(ranks), timeout=_timeout[0] if _timeout else None)
    return _kept[key]


@contextlib.contextmanager
def _kept_groups() -> Iterator[None]:
    """Opens a block in which Megatron-Core takes its groups from ``group_of``."""
    create = parallel_state.create_group

    def kept(ranks: Sequence[int], *, group_desc: str, **options: object) -> dist.ProcessGroup:
        return group_of(ranks, group_desc, partial(create, group_desc=group_desc, **options))

    parallel_state.create_group = kept
    try:
        yield
    finally:
        parallel_state.create_group = create


def leave_processes() -> None:
    """Leaves all groups; a barrier comes first, for gloo aborts a process that leaves while others still talk."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    _kept.clear()
    _timeout.clear()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
