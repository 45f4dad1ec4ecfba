"""Which implementation runs: asked of the environment once, said in one line, never changed silently."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

from megatron_inherit.kernels.checks import TRITON_FLOATS
from megatron_inherit.kernels.errors import KernelValueError

VARIABLE = "MINHERIT_KERNELS"
CHOICES = ("auto", "reference", "triton", "liger", "quack")

_logger = logging.getLogger(__name__)


@functools.cache
def requested() -> str:
    """Reads ``MINHERIT_KERNELS`` once a process.

    Raises:
        KernelValueError: The value is none of ``CHOICES``.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in CHOICES:
        raise KernelValueError(
            f"The environment variable {VARIABLE} is wrong.", got=value, expected=" | ".join(CHOICES)
        )
    return value


@functools.cache
def chosen(device: str) -> str:
    """Gives the implementation for a device type, and logs it the first time; a GPU without Triton is a warning."""
    want = requested()
    name = want
    if want == "auto":
        name = "triton" if device == "cuda" and importlib.util.find_spec("triton") else "reference"
    if device == "cuda" and name == "reference" and want == "auto":
        _logger.warning(
            "kernels on cuda: reference, far slower: triton is not installed (pip install 'megatron-inherit[kernels]')"
        )
    else:
        _logger.info("kernels on %s: %s (%s=%s)", device, name, VARIABLE, want)
    return name


@functools.cache
def _fall_back(function: str, name: str, reason: str) -> None:
    _logger.warning("kernels: %s runs its reference, not %s: %s", function, name, reason)


@functools.cache
def _triton_missing(device: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"triton does not run on {device}"


def _triton_refuses(x: torch.Tensor, width: int) -> str:
    if x.dtype not in TRITON_FLOATS:
        return f"it takes float32 and bfloat16, not {x.dtype}"
    missing = _triton_missing(x.device.type)
    if missing:
        return missing
    from megatron_inherit.kernels.launch import MAX_WIDTH

    return f"heads of {width} elements exceed the {MAX_WIDTH} that a block holds" if width > MAX_WIDTH else ""


def implementation(folder: str, function: str, x: torch.Tensor, *, width: int = 0) -> ModuleType:
    """Gives the module that computes ``function`` for ``x``.

    Args:
        folder: The kernel's folder.
        function: What is computed.
        x: The tensor whose device and dtype decide.
        width: Elements of a head where a block must hold a whole one.

    Returns:
        ``<folder>.reference``, ``<folder>.kernel`` or, for a rival that has the function, ``rivals``.
    """
    name = chosen(x.device.type)
    package = __package__
    if name == "triton":
        reason = _triton_refuses(x, width)
        if not reason:
            return importlib.import_module(f"{package}.{folder}.kernel")
        _fall_back(function, name, reason)
    elif name != "reference":
        rivals = importlib.import_module(f"{package}.rivals")
        reason = rivals.refuses(name, function, x)
        if not reason:
            return rivals.load(name)
        _fall_back(function, name, reason)
    return importlib.import_module(f"{package}.{folder}.reference")
