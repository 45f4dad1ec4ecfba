"""Engine options in the words of DeepSpeed, and its import without a compiler."""

from __future__ import annotations

import logging
import os
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_inherit.engines.base import EngineOptions

BUCKET_ELEMENTS = 500_000_000
"""Of gradients that are reduced, and weights that are gathered, at a time; DeepSpeed's default."""


def import_deepspeed() -> ModuleType:
    """Imports DeepSpeed; on a CPU without its shared-memory operation, which a compiler would build at the first use.

    Only inference uses that operation; the table that is edited is DeepSpeed's own list of what a machine can build.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if torch.distributed.get_world_size() == 1:
        os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed.initialize insists on it without a launcher too
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def deepspeed_config(options: EngineOptions, *, replicas: int, parameters: int) -> dict[str, Any]:
    """Writes DeepSpeed's configuration.

    The engine says itself where accumulation ends, so that the number of micro-batches may change from step to step;
    the one written here is a placeholder. ZeRO-0 is clipped by our optimizer, for DeepSpeed gives no norm there.

    Args:
        options: The engine's.
        replicas: Data parallel size.
        parameters: Of the model; buckets are not larger, for deterministic runs fill them at every step.
    """
    stage, bucket = options.zero_stage, min(BUCKET_ELEMENTS, parameters)
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": options.overlap_grad_reduce,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    pinned = torch.cuda.is_available()
    if options.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if options.nvme_path:
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": options.nvme_path, "pin_memory": pinned}
    if options.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    config: dict[str, Any] = {
        "train_batch_size": options.micro_batch * replicas,
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": options.clip if stage else 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if options.nvme_path:
        config["aio"] = dict(options.aio)
    if options.dtype == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return config


def mpu_of(groups: ProcessGroupCollection) -> SimpleNamespace:
    """Gives what DeepSpeed asks about tensor parallelism, from our process groups."""

    def three(name: str, group: torch.distributed.ProcessGroup) -> dict[str, Any]:
        return {
            f"get_{name}_group": lambda: group,
            f"get_{name}_rank": group.rank,
            f"get_{name}_world_size": group.size,
        }

    return SimpleNamespace(
        **three("model_parallel", groups.tp),
        **three("tensor_model_parallel", groups.tp),
        **three("data_parallel", groups.dp),
    )
