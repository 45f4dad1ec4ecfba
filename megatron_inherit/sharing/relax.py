"""What each repeat of a stage may have of its own: a learned gate on what it adds, and low-rank factors.

A gate is one number for the attention and one for the MLP of each layer, 1 at the start. Low-rank factors (LoRA, Hu et
al. 2021) a layer take up what the stage's weights are not: the truncated SVD of the difference where the start is a
model of unshared layers (Bae et al., ICLR 2025), nothing where it is a learngene. Both leave the function of a
learngene unchanged at the start, and both fold into the weights of ordinary layers when a checkpoint is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from megatron_inherit.arch.families import Init, Role, Split
from megatron_inherit.arch.tensors import TensorSpec, tensor_table
from megatron_inherit.checkpoint.stages import LAYER_PREFIX
from megatron_inherit.plan.init import draw
from megatron_inherit.sharing.aux_model import StageParameters, layers_of, share_stages
from megatron_inherit.sharing.compress import low_rank
from megatron_inherit.sharing.options import Sharing
from megatron_inherit.sharing.stage_plan import StagePlan
from megatron_inherit.sharing.tensors import first_user, stored_name

if TYPE_CHECKING:
    from megatron_inherit.arch.model_config import ModelConfig
    from megatron_inherit.model.language_model import LanguageModel
    from megatron_inherit.model.load import Reader


@dataclass(frozen=True)
class Site:
    """A linear that factors are added to.

    Attributes:
        child: Module of a layer that holds it.
        linear: Its attribute there.
        down: Name of the first factor.
        parts: Canonical tensors that the linear packs, in order.
    """

    child: str
    linear: str
    down: str
    parts: tuple[str, ...]


SITES = (
    Site("self_attention", "linear_qkv", "attn.qkv", ("attn.q", "attn.k", "attn.v")),
    Site("self_attention", "linear_proj", "attn.o", ("attn.o",)),
    Site("mlp", "linear_fc1", "mlp.in", ("mlp.gate", "mlp.up")),
    Site("mlp", "linear_fc2", "mlp.down", ("mlp.down",)),
)
GATED = {"self_attention": "attn", "mlp": "mlp"}


def share_model(chunks: Sequence[LanguageModel], sharing: Sharing) -> StageParameters:
    """Shares a built model's stages and gives its layers what they may have of their own."""
    shared = share_stages(chunks, sharing.plan)
    relax(chunks, sharing)
    return shared


def relax(chunks: Sequence[LanguageModel], sharing: Sharing) -> None:
    """Gives the layers of a shared model what the options allow them of their own; tensor parallel size 1."""
    for chunk in chunks:
        names = {id(module): name for name, module in chunk.named_modules()}
        for index, layer in layers_of([chunk]):
            for child, component in GATED.items() if sharing.gates else ():
                module = getattr(layer, child)
                module.gate = _parameter((1,), layer)
                module.register_forward_hook(lambda module, _, output: output * module.gate)
                spec = _spec(index, f"gate.{component}", (1,), "norm", "none", "ones")
                chunk.own_specs[f"{names[id(module)]}.gate"] = (spec,)
            for site in SITES if sharing.low_rank else ():
                _add_factors(chunk, index, layer, names, site, sharing.low_rank)


def _add_factors(chunk: LanguageModel, index: int, layer: Any, names: dict[int, str], site: Site, rank: int) -> None:
    table = tensor_table(chunk.model)
    owner = getattr(layer, site.child)
    linear = getattr(owner, site.linear)
    rows, columns = linear.weight.shape
    up, down = _parameter((rows, rank), layer), _parameter((rank, columns), layer)
    linear.low_rank_up = up
    setattr(owner, f"{site.linear}_down", down)
    linear.register_forward_hook(
        lambda _, inputs, output: (output[0] + F.linear(F.linear(inputs[0], down), up), output[1])
    )
    role: Role = "attn" if site.child == "self_attention" else "mlp"
    present = [part for part in site.parts if f"layers.{index}.{part}.weight" in table]
    chunk.own_specs[f"{names[id(linear)]}.low_rank_up"] = tuple(
        _spec(index, f"up.{part}", (table[f"layers.{index}.{part}.weight"].shape[0], rank), role, "column", "zeros")
        for part in present
    )
    spec = _spec(index, f"down.{site.down}", (rank, columns), role, "none", "normal")
    chunk.own_specs[f"{names[id(owner)]}.{site.linear}_down"] = (spec,)


def _parameter(shape: tuple[int, ...], layer: Any) -> torch.nn.Parameter:
    like = layer.input_layernorm.weight
    made = torch.nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
    made.sequence_parallel = getattr(like, "sequence_parallel", False)  # type: ignore[attr-defined]
    return made


def _spec(layer: int, name: str, shape: tuple[int, ...], role: Role, split: Split, init: Init) -> TensorSpec:
    return TensorSpec(f"{LAYER_PREFIX}{layer}.{name}", role, layer, shape, split, init)


def own_reader(read: Reader, start: Reader | None, config: ModelConfig, sharing: Sharing, seed: int) -> Reader:
    """Extends a reader of stored tensors to the layers' own: gates at 1, factors from the start's differences.

    Args:
        read: Reads stored tensors.
        start: Reads the canonical tensors of the model that training starts from; None where values are drawn.
        config: The model.
        sharing: Its stages and rank.
        seed: Of drawn values.
    """
    plan, rank = sharing.plan, sharing.low_rank

    @lru_cache(maxsize=len(SITES))
    def factors(layer: int, down: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        parts = next(site.parts for site in SITES if site.down == down)
        return None if start is None else difference_factors(start, config, plan, layer, parts, rank)

    def own(spec: TensorSpec, box: tuple[slice, ...]) -> torch.Tensor:
        if not spec.name.startswith(LAYER_PREFIX):
            return read(spec, box)
        layer, kind, part = spec.name.removeprefix(LAYER_PREFIX).split(".", 2)
        if kind != "gate":
            site = next(site for site in SITES if (part == site.down if kind == "down" else part in site.parts))
            found = factors(int(layer), site.down)
            if found is not None:
                if kind == "down":
                    return found[1][box]
                return found[0][_row(config, int(layer), site.parts, part) :][: spec.shape[0]][box]
        values = draw(spec, num_layers=config.num_layers, seed=seed)
        return torch.from_numpy(values).view(spec.shape)[box]

    return own


def difference_factors(
    start: Reader, config: ModelConfig, plan: StagePlan, layer: int, parts: Sequence[str], rank: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Gives the best factors of what a layer is more than its stage, for tensors that one linear packs.

    Returns:
        ``up`` [rows of all parts, rank] and ``down`` [rank, columns]; None where there is no difference.
    """
    table = tensor_table(config)
    rows = []
    for part in parts:
        name = f"layers.{layer}.{part}.weight"
        if name in table:
            spec = table[name]
            box = tuple(slice(0, size) for size in spec.shape)
            first = table[first_user(stored_name(name, plan), plan)]
            rows.append(start(spec, box).double() - start(first, box).double())
    residual = torch.cat(rows)
    return low_rank(residual, rank) if bool(residual.any()) else None


def _row(config: ModelConfig, layer: int, parts: Sequence[str], part: str) -> int:
    table = tensor_table(config)
    before = parts[: parts.index(part)]
    return sum(table[name].shape[0] for other in before if (name := f"layers.{layer}.{other}.weight") in table)
