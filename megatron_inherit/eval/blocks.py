"""Where the blocks of a transformers model are, and how to watch them without keeping what they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from megatron_inherit.base.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def blocks_of(model: Any) -> Any:
    """Gives the ``ModuleList`` of a causal language model's blocks.

    Raises:
        CheckpointError: The model has no such list.
    """
    import torch

    depth = model.config.num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == depth)
    found = next(lists, None)
    if found is None:
        raise CheckpointError(f"{type(model).__name__} has no list of {depth} blocks that could be measured.")
    return found


@contextlib.contextmanager
def watch_blocks(model: Any, see: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Calls ``see(block, input, output)`` with each block's hidden states [batch, sequence, width] as they pass."""

    def hook(index: int) -> Callable[..., None]:
        return lambda _module, args, kwargs, output: see(index, _hidden(args, kwargs), _first(output))

    handles = [
        block.register_forward_hook(hook(index), with_kwargs=True) for index, block in enumerate(blocks_of(model))
    ]
    with _removed(handles):
        yield


@contextlib.contextmanager
def watch_attention(model: Any, see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Calls ``see(block, maps)`` with each block's attention [batch, heads, sequence, sequence] after the softmax.

    The model must have been loaded with ``attn_implementation="eager"``; no map outlives its block.

    Raises:
        CheckpointError: A block has no attention, or its attention gives no maps.
    """

    def hook(index: int) -> Callable[..., Any]:
        def keep_nothing(_module: Any, _args: Any, output: Any) -> Any:
            maps = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if maps is None or maps.dim() != 4:
                raise CheckpointError(
                    "This model gives no attention maps.", fix="Attention statistics need a model with plain attention."
                )
            see(index, maps)
            return (output[0], None, *output[2:])

        return keep_nothing

    handles = [_attention(block).register_forward_hook(hook(index)) for index, block in enumerate(blocks_of(model))]
    with _removed(handles):
        yield


@contextlib.contextmanager
def without_block(model: Any, index: int) -> Iterator[None]:
    """Lets the hidden state pass a block unchanged."""

    def skip(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = _hidden(args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with _removed([blocks_of(model)[index].register_forward_hook(skip, with_kwargs=True)]):
        yield


def _attention(block: Any) -> Any:
    found = next((child for name, child in block.named_children() if "attn" in name and "norm" not in name), None)
    if found is None:
        raise CheckpointError(f"{type(block).__name__} has no attention that could be measured.")
    return found


@contextlib.contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(args: Any, kwargs: Any) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
