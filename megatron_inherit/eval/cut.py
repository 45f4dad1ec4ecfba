"""A cut of a teacher, in memory and without copies, to measure and repair it before any student is written."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_inherit.base.errors import UsageError
from megatron_inherit.eval.blocks import blocks_of

if TYPE_CHECKING:
    import torch

_PROJECTIONS = {
    "self_attn.o_proj": "attn.o",
    "mlp.down_proj": "mlp.down",
    "attn.c_proj": "attn.o",
    "mlp.c_proj": "mlp.down",
}
"""Module of a transformers block -> canonical name of what writes to the stream."""


class _CapturedError(Exception):
    """Ends a forward pass once the first block's arguments are known."""


class Cut:
    """A student made of a teacher's blocks.

    Args:
        model: The teacher, a transformers causal language model; it stays as it is.
        layers: The teacher's block of each student block.

    Attributes:
        head: [vocabulary, width].
        has_bias: The final norm has a bias.
        depth: Blocks of the teacher.
    """

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        self.model, self.layers = model, tuple(layers)
        self.depth = model.config.num_hidden_layers
        self.blocks = [blocks_of(model)[layer] for layer in layers]
        self.norm = copy.deepcopy(_final_norm(model))
        self.head: torch.Tensor = model.get_output_embeddings().weight.detach()
        self.has_bias = getattr(self.norm, "bias", None) is not None

    def teacher_states(self, windows: torch.Tensor) -> torch.Tensor:
        """Gives what the teacher's final norm gives, the first token of each window left out: [tokens, width]."""
        import torch

        found = []
        with torch.no_grad():
            for window in windows.split(4):
                hidden, kwargs = block_kwargs(self.model, window)
                for block in blocks_of(self.model):
                    hidden = _call(block, hidden, kwargs)
                found.append(_final_norm(self.model)(hidden)[:, 1:].flatten(0, 1))
        return torch.cat(found)

    def student_states(self, windows: torch.Tensor) -> torch.Tensor:
        """Gives the student's last states, normalised without gain and bias, for the same tokens: [tokens, width]."""
        import torch

        found = []
        with torch.no_grad():
            for window in windows.split(4):
                states = self.states(*block_kwargs(self.model, window))
                found.append(self.normalised(states)[:, 1:].flatten(0, 1))
        return torch.cat(found)

    def states(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Runs the student's blocks."""
        for place in range(len(self.blocks)):
            hidden = self.run_block(place, hidden, kwargs)
        return hidden

    def run_block(self, place: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Runs one block of the student."""
        return _call(self.blocks[place], hidden, kwargs)

    def teacher_inputs(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> dict[int, torch.Tensor]:
        """Gives the teacher's hidden state before the blocks that follow a student's block; ``depth`` is its last."""
        import torch

        wanted = {*self.layers[1:], self.depth}
        found = {0: hidden}
        with torch.no_grad():
            for layer, block in enumerate(blocks_of(self.model)):
                hidden = _call(block, hidden, kwargs)
                if layer + 1 in wanted:
                    found[layer + 1] = hidden
        return found

    def normalised(self, hidden: torch.Tensor) -> torch.Tensor:
        """Applies the final norm without its gain and bias."""
        import torch

        if self.has_bias:
            return torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=self.norm.eps)
        return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=self.norm.variance_epsilon)

    def set_final_norm(self, gain: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Replaces gain and bias of the student's final norm."""
        self.norm.weight.data = gain.to(self.norm.weight)
        if bias is not None:
            self.norm.bias.data = bias.to(self.norm.bias)

    def scale_block(self, place: int, factor: float) -> None:
        """Multiplies what a student's block adds to the stream; the teacher's own block is not touched."""
        block = copy.deepcopy(self.blocks[place])
        for module in output_projections(block).values():
            for parameter in module.parameters():
                parameter.data.mul_(factor)
        self.blocks[place] = block

    def loss(self, windows: torch.Tensor) -> float:
        """Gives the student's mean next-token loss over windows [sequences, tokens], in nats."""
        import torch

        total = 0.0
        with torch.no_grad():
            for window in windows:
                states = self.states(*block_kwargs(self.model, window[None, :-1]))
                logits = self.norm(states)[0].float() @ self.head.float().T
                total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        return total / (windows.shape[0] * (windows.shape[1] - 1))


def output_projections(block: Any) -> dict[str, Any]:
    """Gives the modules that write to the stream, under their parameters' canonical names without the suffix."""
    found = {name: module for path, name in _PROJECTIONS.items() if (module := _submodule(block, path)) is not None}
    if len(found) != 2:
        raise UsageError(f"block-scale does not know the projections of {type(block).__name__}.")
    return found


def block_kwargs(model: Any, windows: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Gives what the model hands its first block for windows [batch, tokens]: hidden state and the other arguments."""
    import torch

    captured: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def capture(_module: Any, args: Any, kwargs: Any) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        captured.append((hidden, rest))
        raise _CapturedError

    handle = blocks_of(model)[0].register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with torch.no_grad():
            model(windows, use_cache=False)
    except _CapturedError:
        pass
    finally:
        handle.remove()
    return captured[0]


def _call(block: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    out = block(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def _final_norm(model: Any) -> Any:
    base = model.base_model
    found = next((getattr(base, name) for name in ("norm", "ln_f") if hasattr(base, name)), None)
    if found is None:
        raise UsageError(f"{type(model).__name__} has no final norm that a repair could fit.")
    return found


def _submodule(block: Any, path: str) -> Any:
    for part in path.split("."):
        block = getattr(block, part, None)
        if block is None:
            return None
    return block
