"""Process groups: one process alone, or many under a launcher, cut into tensor, context, data and pipeline groups."""

from __future__ import annotations

import datetime
import os
import warnings

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from megatron_inherit.base.errors import ConfigError
from megatron_inherit.model.cpu import shared_groups

_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_processes(*, timeout_s: float = 600.0) -> torch.device:
    """Joins the other processes of the launcher, or makes a world of one, and picks this process's device.

    Reads ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``, which launchers set. Does
    nothing where the processes are joined already.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    present = [name for name in _LAUNCHER if name in os.environ]
    if len(present) == len(_LAUNCHER):
        dist.init_process_group(backend, timeout=timeout)
    elif int(os.environ.get("WORLD_SIZE", "1")) == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        missing = ", ".join(name for name in _LAUNCHER if name not in present)
        raise ConfigError(
            f"WORLD_SIZE is set but {missing} is not.", fix="Start with torchrun, deepspeed or srun torchrun."
        )
    return device


def make_groups(*, tp: int = 1, pp: int = 1, vpp: int = 1, cp: int = 1) -> ProcessGroupCollection:
    """Cuts the joined processes into groups; replaces an earlier cut.

    Args:
        tp: Tensor parallel size.
        pp: Pipeline stages.
        vpp: Chunks a stage.
        cp: Context parallel size.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    with shared_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            context_parallel_size=cp,
            create_gloo_process_groups=False,
        )
    initialize_rng_tracker(inference_rng_tracker=True)  # no dropout, so no state to track
    return ProcessGroupCollection.use_mpu_process_groups()


def leave_processes() -> None:
    """Leaves all groups; a barrier comes first, for gloo aborts a process that leaves while others still talk."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
