"""Imports of optional dependencies that fail with the line that installs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from megatron_inherit.base.errors import MissingExtraError

EXTRA_OF = {
    "aiohttp": "remote",
    "datasets": "data",
    "deepspeed": "deepspeed",
    "fsspec": "remote",
    "gguf": "gguf",
    "gigatoken": "fast-tokenize",
    "huggingface_hub": "hf",
    "liger_kernel": "rivals",
    "lm_eval": "eval",
    "matplotlib": "plots",
    "megatron.core": "megatron",
    "mlflow": "loggers",
    "pyarrow": "data",
    "quack": "rivals",
    "s3fs": "remote",
    "sentencepiece": "data",
    "tensorboard": "loggers",
    "tokenizers": "hf",
    "trackio": "loggers",
    "transformers": "hf",
    "triton": "kernels",
    "wandb": "loggers",
    "zstandard": "data",
}


def require(module: str, why: str = "") -> ModuleType:
    """Imports an optional module.

    Args:
        module: Dotted module name, for instance ``"deepspeed"``.
        why: What needs it, for the message.

    Raises:
        MissingExtraError: The module is not installed; the message holds the pip line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        extra = EXTRA_OF.get(module) or EXTRA_OF.get(module.partition(".")[0])
        package = f"'megatron-inherit[{extra}]'" if extra else module
        needed = f" for {why}" if why else ""
        raise MissingExtraError(
            f"The Python module {module!r} is needed{needed} and is not installed.",
            fix=f"Install it: pip install {package}",
        ) from error
