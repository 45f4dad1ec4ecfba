"""A narrower student: the channels, heads and MLP columns of the teacher whose activations are largest.

Importance as in Minitron (Muralidharan et al. 2024, arXiv:2407.14679) and NVIDIA's Model Optimizer: for a sequence,
u[c] = mean over its tokens of |a[c]|; score[c] = sqrt(sum over sequences of u[c]^2). Of MLP columns a is the input of
the down projection, of heads the input of the output projection (a head's score is the L2 norm over its channels), of
the residual stream the outputs of both norms of every block, whose scores are added.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.arch.tensors import enumerate_tensors, family_of
from megatron_inherit.base.errors import ConfigError
from megatron_inherit.checkpoint.formats.hf_config import write_config
from megatron_inherit.checkpoint.stream import Source
from megatron_inherit.eval.blocks import blocks_of
from megatron_inherit.eval.calibration import sample_windows
from megatron_inherit.eval.hf_folder import as_hf_folder, default_device, load_model, load_tokenizer
from megatron_inherit.plan.ops import Compute, Copy, Init, Op
from megatron_inherit.plan.plan import TransferPlan
from megatron_inherit.study.schema import CutSection

if TYPE_CHECKING:
    import torch

SEQUENCES, TOKENS = 32, 256
_NORMS = (("input_layernorm", "post_attention_layernorm"), ("ln_1", "ln_2"))
_OUTPUTS = ("self_attn.o_proj", "attn.c_proj")
_DOWNS = ("mlp.down_proj", "mlp.c_proj")


@dataclass(frozen=True)
class WidthScores:
    """Importance of what can be cut.

    Attributes:
        hidden: [width].
        heads: [blocks][query heads].
        ffn: [blocks][MLP columns].
    """

    hidden: list[float]
    heads: list[list[float]]
    ffn: list[list[float]]


def measure_width(
    checkpoint: Path | str, *, text: Path | str | None = None, sequences: int = SEQUENCES, tokens: int = TOKENS
) -> WidthScores:
    """Measures mean activations; of one sequence at a time, and never more than one block's are in memory.

    Args:
        checkpoint: Of any format, or a run folder.
        text: Where the sequences come from; see ``calibration.sample_windows``.
        sequences: Number of sequences.
        tokens: Length of each; fewer where the model takes fewer.
    """
    import torch

    device = default_device()
    with as_hf_folder(checkpoint) as folder:
        model = load_model(folder, device=device)
        tokens = min(tokens, model.config.max_position_embeddings)
        windows = sample_windows(load_tokenizer(folder), text, sequences=sequences, tokens=tokens).to(device)
    sums: dict[tuple[str, int], torch.Tensor] = {}

    def see(kind: str, block: int, values: torch.Tensor) -> None:
        means = values[0].double().abs().mean(0)
        sums[kind, block] = sums.get((kind, block), torch.zeros_like(means)) + means.square()

    with torch.no_grad(), _watched(model, see):
        for window in windows:
            model(window[None], use_cache=False, logits_to_keep=1)
    depth, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    hidden = torch.stack([sums[kind, block].sqrt() for kind in ("norm0", "norm1") for block in range(depth)]).sum(0)
    return WidthScores(
        hidden=hidden.tolist(),
        heads=[sums["heads", block].view(heads, -1).sum(1).sqrt().tolist() for block in range(depth)],
        ffn=[sums["ffn", block].sqrt().tolist() for block in range(depth)],
    )


@contextlib.contextmanager
def _watched(model: Any, see: Any) -> Iterator[None]:
    """Calls ``see(kind, block, activations)`` with [1, sequence, channels] as they pass."""
    handles = []
    for number, block in enumerate(blocks_of(model)):
        norms = next(pair for pair in _NORMS if hasattr(block, pair[0]))
        for place, name in enumerate(norms):
            kind = f"norm{place}"
            handles.append(
                block.get_submodule(name).register_forward_hook(
                    lambda _m, _a, output, kind=kind, number=number: see(kind, number, output)
                )
            )
        for kind, names in (("heads", _OUTPUTS), ("ffn", _DOWNS)):
            handles.append(
                _first_of(block, names).register_forward_pre_hook(
                    lambda _m, arguments, kind=kind, number=number: see(kind, number, arguments[0])
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_of(block: Any, names: Sequence[str]) -> Any:
    modules = dict(block.named_modules())
    return next(modules[name] for name in names if name in modules)


def cut_width(plan: TransferPlan, source: Source, cut: CutSection, scores: WidthScores | None = None) -> TransferPlan:
    """Narrows the student of an inheritance plan.

    Args:
        plan: Of whole blocks.
        source: The opened teacher.
        cut: Shares that are kept.
        scores: What ``measure_width`` gave; measured where they are needed and not given.

    Raises:
        ConfigError: The family cannot have that shape.
    """
    config = _narrow(plan.config, cut)
    if scores is None and cut.by == "activation":
        scores = measure_width(source.path)
    kept = _kept(source.config, config, scores)
    axes = {row.name: row.shape for row in family_of(config).rows}
    inherited = {op.target: op for op in plan.ops}
    ops: list[Op] = []
    for spec in enumerate_tensors(config):
        old = inherited[spec.name]
        if not isinstance(old, Copy):
            ops.append(dataclasses.replace(old, shape=spec.shape) if isinstance(old, Init) else old)
            continue
        of = None if spec.layer is None else int(old.source.split(".")[1])
        row = spec.name if spec.layer is None else spec.name.replace(f".{spec.layer}.", ".{i}.", 1)
        indices = [kept.get((axis, of if axis in ("q", "kv", "ffn") else None)) for axis in axes[row]]
        ops.append(_taken(old, spec.shape, indices))
    words = f"{config.hidden_size} of {plan.config.hidden_size} channels, {config.num_heads} of {plan.config.num_heads}"
    hf_config = plan.hf_config and {**plan.hf_config, **write_config(config, ops[0].dtype)}
    return dataclasses.replace(
        plan,
        config=config,
        ops=tuple(ops),
        hf_config=hf_config,
        title=f"{plan.title}; {words} heads, {config.ffn_size} of {plan.config.ffn_size} MLP columns, by {cut.by}",
    ).check()


def _narrow(config: ModelConfig, cut: CutSection) -> ModelConfig:
    groups = max(1, round(config.num_kv_heads * cut.heads))
    heads = groups * (config.num_heads // config.num_kv_heads)
    narrow = dataclasses.replace(
        config,
        hidden_size=max(1, round(config.hidden_size * cut.hidden)),
        num_heads=heads,
        num_kv_heads=groups,
        ffn_size=max(1, round(config.ffn_size * cut.ffn)),
    )
    if config.family == "gpt2" and narrow.hidden_size != heads * config.head_dim:
        raise ConfigError(
            "cut: the heads of a GPT-2 fill its width.",
            got=f"{heads} heads of {config.head_dim} in {narrow.hidden_size} channels",
            fix="Give cut.hidden and cut.heads the same share, one that keeps whole heads.",
        )
    return narrow


def _kept(
    wide: ModelConfig, narrow: ModelConfig, scores: WidthScores | None
) -> dict[tuple[str, int | None], list[int]]:
    """Gives the indices that stay, by dimension and teacher's block; ascending, so that what stays keeps its order."""

    def best(values: Sequence[float] | None, of: int, number: int) -> list[int]:
        if values is None:
            return list(range(number))
        return sorted(sorted(range(of), key=lambda place: (-values[place], place))[:number])

    kept: dict[tuple[str, int | None], list[int]] = {
        ("hidden", None): best(None if scores is None else scores.hidden, wide.hidden_size, narrow.hidden_size)
    }
    per_group, size = wide.num_heads // wide.num_kv_heads, wide.head_dim
    for block in range(wide.num_layers):
        kept["ffn", block] = best(None if scores is None else scores.ffn[block], wide.ffn_size, narrow.ffn_size)
        of_groups = (
            None
            if scores is None
            else [
                sum(value**2 for value in scores.heads[block][group * per_group : (group + 1) * per_group])
                for group in range(wide.num_kv_heads)
            ]
        )
        groups = best(of_groups, wide.num_kv_heads, narrow.num_kv_heads)
        kept["kv", block] = [group * size + place for group in groups for place in range(size)]
        wide_group = per_group * size
        kept["q", block] = [group * wide_group + place for group in groups for place in range(wide_group)]
    return kept


def _taken(op: Copy, shape: tuple[int, ...], indices: Sequence[list[int] | None]) -> Op:
    if all(chosen is None for chosen in indices):
        return op
    arguments = {name: chosen for name, chosen in zip(("rows", "columns"), indices, strict=False) if chosen is not None}
    return Compute(
        target=op.target, shape=shape, dtype=op.dtype, function="take", sources=(op.source,), arguments=arguments
    )
