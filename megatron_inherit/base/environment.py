"""What a result was made with: program, machine and package versions, as plain values for ``environment.json``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from typing import Any

from megatron_inherit import __version__

_PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "megatron-core",
    "deepspeed",
    "transformers",
    "tokenizers",
    "triton",
    "xxhash",
    "gguf",
)


def collect_environment() -> dict[str, Any]:
    """Gathers what can be known without importing a package; no host name, user name or path."""
    return {
        "minherit": __version__,
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
