"""Compares an operation with a float64 evaluation of its reference: every value and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]
CANCELLED = 0.1
"""Tensors smaller than this throughout are compared absolutely: inputs are of order one, so they are what cancelled."""
Operation = Callable[[Tensors], tuple[torch.Tensor, ...] | torch.Tensor]


def tensor(
    *shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0, device: str = "cpu"
) -> torch.Tensor:
    """Draws normal values; the same on every device and, up to rounding, in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale + shift).to(dtype).to(device)


def spread(x: torch.Tensor) -> torch.Tensor:
    """Gives the same values at twice the stride between rows: dense in the last dimension, not contiguous."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def transposed(x: torch.Tensor) -> torch.Tensor:
    """Gives the same values with the last dimension strided."""
    return x.transpose(-1, 0).contiguous().transpose(-1, 0)


def _evaluate(operation: Operation, inputs: Tensors, upstream: Callable[[int, torch.Tensor], torch.Tensor]) -> Tensors:
    outputs = operation(inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [upstream(index, output.detach()) for index, output in enumerate(outputs)]
    leaves = {name: value for name, value in inputs.items() if value.requires_grad}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return results | {f"gradient of {name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def errors(
    operation: Operation, truth: Operation, inputs: Tensors, *, same_upstream: bool = False, seed: int = 99
) -> dict[str, float]:
    """Gives each value's and gradient's largest difference from the truth, relative to the truth's largest magnitude.

    Args:
        operation: What is tested; it gets the inputs as they are.
        truth: Its reference; it gets the float inputs in float64.
        inputs: By name. Floats that require no gradient yet are made leaves that do, unless their name starts with
            ``_``; strides are kept.
        same_upstream: The incoming gradient is one number, not one a value.
        seed: Of the incoming gradients.
    """

    def leaf(name: str, value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        if not value.is_floating_point():
            return value
        value = value.detach() if dtype is None else value.detach().to(dtype)
        return value.requires_grad_(not name.startswith("_"))

    def upstream(index: int, output: torch.Tensor) -> torch.Tensor:
        if same_upstream:
            return torch.full_like(output, 0.37)
        return tensor(*output.shape, seed=seed + index, dtype=torch.float32).to(output)

    got = _evaluate(operation, {name: leaf(name, value, None) for name, value in inputs.items()}, upstream)

    def exact_upstream(index: int, output: torch.Tensor) -> torch.Tensor:
        dtype = got[f"output {index}"].dtype
        return upstream(index, output.to(dtype)).to(output.dtype)

    want = _evaluate(truth, {name: leaf(name, value, torch.float64) for name, value in inputs.items()}, exact_upstream)
    return {name: _difference(got[name], want[name]) for name in want}


def _difference(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape, (got.shape, want.shape)
    if want.numel() == 0:
        return 0.0
    got = got.double()
    assert bool(torch.isfinite(got).all()), "a value is not finite"
    return float((got - want).abs().max() / want.abs().max().clamp(min=CANCELLED))
