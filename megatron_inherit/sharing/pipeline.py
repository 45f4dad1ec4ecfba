"""Keeps a stage on several pipeline ranks one stage: broadcast at start, one all-reduce a step, a guard.

A stage inside one rank needs none of this. A stage on r ranks has r parameters that stand for one: their gradients are
summed over the ranks after the replicas' reduction, the norm counts the owner's copy only (``shared``), and each lies
in a bucket of its own (``shared_embedding``), so that the distributed optimizer cuts every copy at the same places.
Leaving any one of them out trains a different model and says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_inherit.base.errors import CheckpointError, ConfigError
from megatron_inherit.model.groups import group_of
from megatron_inherit.model.texts import gather_text
from megatron_inherit.sharing.aux_model import StageKey, StageParameters
from megatron_inherit.sharing.options import Sharing
from megatron_inherit.sharing.partition import Partition, Tie
from megatron_inherit.sharing.stage_plan import StagePlan

Group = Any


def make_tie_groups(partition: Partition, pipeline_group: Group) -> dict[tuple[int, ...], Group]:
    """Gives one process group for each set of pipeline ranks that shares a stage; called by all ranks of the job.

    Args:
        partition: Which layers each pipeline rank has.
        pipeline_group: This rank's pipeline.

    Returns:
        Pipeline ranks -> group, of the sets this rank belongs to.
    """
    mine = tuple(dist.get_process_group_ranks(pipeline_group))
    everyone = {tuple(json.loads(text)) for text in gather_text(json.dumps(mine), _device())}
    found: dict[tuple[int, ...], Group] = {}
    for pipeline in sorted(everyone):
        for ranks in sorted({tie.ranks for tie in partition.ties}):
            group = group_of([pipeline[rank] for rank in ranks], "shared stage")
            if pipeline == mine and dist.get_rank(pipeline_group) in ranks:
                found[ranks] = group
    return found


@dataclass(frozen=True)
class Copy:
    """This rank's copy of a parameter that other pipeline ranks hold too."""

    key: StageKey
    parameter: torch.nn.Parameter
    tie: Tie
    group: Group


def tie_stages(
    sharing: Sharing | None, parameters: StageParameters, pipeline_group: Group, chunks: int
) -> TiedStages | None:
    """Marks and equalises the copies of a model that was just filled; None where nothing is shared.

    Call it on all ranks, before the gradient buffers are made.
    """
    if sharing is None:
        return None
    layout = sharing.partition(pipeline_group.size(), chunks)
    ties = TiedStages(layout, parameters, pipeline_group, gradient=sharing.gradient)
    ties.guard_every_steps = sharing.guard_every_steps
    ties.mark()
    ties.broadcast()
    return ties


class TiedStages:
    """The copies on this rank and what each optimizer step owes them.

    Args:
        partition: Which layers each pipeline rank has.
        parameters: This rank's parameters by stage.
        pipeline_group: This rank's pipeline; the constructor is collective over the whole job.
        gradient: ``sum`` is what one weight used k times gets; ``mean`` divides by k before clipping.
    """

    def __init__(
        self,
        partition: Partition,
        parameters: StageParameters,
        pipeline_group: Group,
        *,
        gradient: Literal["sum", "mean"] = "sum",
    ) -> None:
        self.partition, self.gradient, self._parameters = partition, gradient, parameters
        self.guard_every_steps, self.hooks_checked = 100, False
        ties = {(tie.component, tie.physical): tie for tie in partition.ties}
        groups = make_tie_groups(partition, pipeline_group) if ties else {}
        rank = dist.get_rank(pipeline_group) if ties else 0
        self.copies = [
            Copy(key, parameter, tie, groups[tie.ranks])
            for key, parameter in sorted(parameters.items(), key=lambda item: item[0])
            if (tie := ties.get((key.component, key.physical))) is not None
        ]
        self._not_owned = {id(copy.parameter) for copy in self.copies if copy.tie.ranks[0] != rank}

    def mark(self) -> None:
        """Marks the copies for buckets, norm and clipping; call it before the gradient buffers are made."""
        for copy in self.copies:
            copy.parameter.shared_embedding = True  # type: ignore[attr-defined]
            copy.parameter.shared = not self.owns(copy.parameter)  # type: ignore[attr-defined]

    def owns(self, parameter: torch.nn.Parameter) -> bool:
        """Tells whether this rank counts and writes the parameter."""
        return id(parameter) not in self._not_owned

    @torch.no_grad()
    def broadcast(self) -> None:
        """Gives every copy the owner's values."""
        for copy in self.copies:
            dist.broadcast(copy.parameter.data, src=dist.get_process_group_ranks(copy.group)[0], group=copy.group)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sums the copies' gradients; call it after the replicas' reduction and before the norm."""
        for copy in self.copies:
            dist.all_reduce(gradient_of(copy.parameter), group=copy.group)
        if self.gradient == "mean":
            scale_by_uses(self.partition.plan, self._parameters)

    def check(self, step: int) -> None:
        """Compares the bits of all copies; all ranks of the job call it together, and stop together.

        Raises:
            CheckpointError: Copies differ somewhere; the run must stop, since it trains several models instead of one.
        """
        if not self.partition.ties:
            return
        everyone = gather_text("; ".join(self._differences()), _device())
        found = next((text for text in everyone if text), "")
        if found:
            raise CheckpointError(
                f"The copies of a shared stage differ at step {step}.",
                got=found,
                expected="equal hashes",
                fix="Go back to the last checkpoint; the ranks no longer train one model.",
            )

    def _differences(self) -> list[str]:
        found = []
        for copy in self.copies:
            hashes = gather_text(hash_values([copy.parameter]), _device(), copy.group)
            if len(set(hashes)) > 1:
                place = f"{copy.key.path} of stage {copy.key.physical} on pipeline ranks {copy.tie.ranks}"
                found.append(f"{place}: {', '.join(hashes)}")
        return found[:3]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@torch.no_grad()
def scale_by_uses(plan: StagePlan, parameters: StageParameters) -> None:
    """Divides each stage's gradient by the number of its uses, so that clipping sees one layer's norm."""
    for key, parameter in parameters.items():
        gradient_of(parameter).div_(len(plan.uses(key.component, key.physical)))


def divide_by_uses(plan: StagePlan, parameters: StageParameters) -> None:
    """Lets autograd divide each stage's gradient by the number of its uses, for engines that reduce as it comes."""
    for key, parameter in parameters.items():
        uses = len(plan.uses(key.component, key.physical))
        parameter.register_hook(partial(torch.div, other=uses))


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Gives the gradient buffer: Megatron-Core's ``main_grad``, or ``grad``."""
    found = getattr(parameter, "main_grad", None)
    found = parameter.grad if found is None else found
    if found is None:
        raise ConfigError("A shared parameter has no gradient.", fix="Reduce after the backward pass.")
    return found


def hash_values(tensors: Iterable[torch.Tensor]) -> str:
    """Hashes the bytes of tensors."""
    import xxhash

    state = xxhash.xxh3_64()
    for tensor in tensors:
        state.update(tensor.detach().contiguous().cpu().view(torch.uint8).reshape(-1).numpy().data)
    return state.hexdigest()
