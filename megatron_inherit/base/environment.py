"""What a result was made with: program, machine and package versions, as plain values for ``environment.json``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
import time
from typing import Any

from megatron_inherit import __version__

_PACKAGES = (
    "torch",
    "megatron-core",
    "deepspeed",
    "transformers",
    "tokenizers",
    "triton",
    "numpy",
    "safetensors",
    "pydantic",
    "xxhash",
    "gguf",
)


def collect_environment(**facts: Any) -> dict[str, Any]:
    """Gathers what can be known without importing a package; no host name, user name or path but in the command.

    Args:
        facts: Further entries, which come first: device, world size, parameters.
    """
    versions = {"python": platform.python_version(), "megatron-inherit": __version__}
    versions |= {name: version for name in _PACKAGES if (version := _version(name))}
    return {
        **facts,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
