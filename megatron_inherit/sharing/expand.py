"""Descendants: models of any depth whose layers are copies of a learngene's stages, and share nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_inherit.base.errors import ConfigError, UsageError
from megatron_inherit.checkpoint.packing import KEY as PACKING
from megatron_inherit.checkpoint.packing import MADE_BY
from megatron_inherit.checkpoint.stages import KEY
from megatron_inherit.checkpoint.stream import Source
from megatron_inherit.inherit.inheritune import plan_inheritance
from megatron_inherit.plan.ops import Compute, Copy, Op
from megatron_inherit.plan.plan import Layout, TransferPlan
from megatron_inherit.sharing.compress import Method
from megatron_inherit.sharing.learngene import require_plan
from megatron_inherit.sharing.stage_plan import StagePlan

DEEPEST = 1000
"""Layers of the deepest descendant of a family."""
RULES = ("front", "middle", "back", "even", "ends", "proportional")
_SHALLOW = ("even", "ends", "proportional")
"""Rules that leave stages out where there are fewer layers than stages."""


def place(plan: StagePlan, depth: int, rule: str) -> tuple[int, ...]:
    """Chooses the stage of each layer of a descendant.

    ``front``, ``middle`` and ``back`` give every stage depth // S layers and the remainder to the first, the central or
    the last stages (the released code is ``front``); ``even`` spreads it; ``ends`` goes from the first stage to the
    last in equal strides, so that neither is left out; ``proportional`` follows the auxiliary's own repeats, so that
    its own depth gives its own layout, and is what no rule means; else a list of stages such as ``0,0,1,2``. Fewer
    layers than stages leave stages out: only ``even``, ``ends``, ``proportional`` and a list do that.

    Args:
        plan: The auxiliary's.
        depth: Layers of the descendant.
        rule: Which; may be empty.

    Raises:
        UsageError: The rule is unknown, does not fit the depth or a plan that is not contiguous.
    """
    if rule and rule not in RULES:
        return _explicit(plan, depth, rule)
    stages, order = plan.num_stages, plan.stages
    if depth < stages and rule not in _SHALLOW:
        raise UsageError(
            f"{depth} layers cannot hold the {stages} stages of the learngene.",
            fix=f"Say which stages to take: --place {', '.join(_SHALLOW)}, or a list such as 0,1,3.",
        )
    if rule in ("", "proportional"):
        return tuple(order[layer * plan.num_layers // depth] for layer in range(depth))
    if tuple(sorted(order)) != order:
        raise UsageError(
            f"The rule {rule} is for stages that follow one another, and {plan} returns to earlier ones.",
            fix="Use --place proportional, or a list of stages.",
        )
    if rule == "even":
        return tuple(layer * stages // depth for layer in range(depth))
    if rule == "ends":
        steps = max(1, depth - 1)
        return tuple((2 * layer * (stages - 1) + steps) // (2 * steps) for layer in range(depth))
    rest = depth % stages
    first = {"front": 0, "middle": (stages - rest) // 2, "back": stages - rest}[rule]
    counts = [depth // stages + (first <= stage < first + rest) for stage in range(stages)]
    return tuple(stage for stage, count in enumerate(counts) for _ in range(count))


def _explicit(plan: StagePlan, depth: int, text: str) -> tuple[int, ...]:
    try:
        chosen = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UsageError(
            f"--place {text!r} is not understood.", expected=f"{', '.join(RULES)}, auto, or a list of stages"
        ) from None
    if len(chosen) != depth or not all(0 <= stage < plan.num_stages for stage in chosen):
        raise UsageError(
            f"--place {text} does not say the stage of each of the {depth} layers.",
            expected=f"{depth} numbers from 0 to {plan.num_stages - 1}",
        )
    return chosen


def parse_depths(text: str) -> tuple[int, ...]:
    """Reads the depths of a family: numbers and ranges, both ends included, such as ``4,6-10``; ascending, each once.

    Raises:
        UsageError: The text is none, or names a depth of no layer.
    """
    found: set[int] = set()
    for word in text.split(","):
        low, dash, high = (part.strip() for part in word.partition("-"))
        high = high if dash else low
        if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high) <= DEEPEST):
            raise UsageError(
                f"--depths {text!r} is not understood.",
                expected=f"numbers from 1 to {DEEPEST} and ranges of them, for instance 6-16 or 4,6-10,16",
            )
        found.update(range(int(low), int(high) + 1))
    return tuple(sorted(found))


def candidates(plan: StagePlan, depth: int) -> dict[tuple[int, ...], str]:
    """Lists the different placements that rules give for a depth, with the rule's name: what ``auto`` tries."""
    found: dict[tuple[int, ...], str] = {}
    for rule in RULES:
        try:
            found.setdefault(place(plan, depth, rule), rule)
        except UsageError:
            continue
    return found


def plan_descendant(
    learngene: Source,
    stages: Sequence[int],
    *,
    layout: Layout | None = None,
    dtype: str | None = None,
    compress: Method | None = None,
) -> TransferPlan:
    """Plans a descendant as an ordinary model in any checkpoint format.

    Args:
        learngene: A learngene, or the training checkpoint of an auxiliary.
        stages: The stage of each layer.
        layout: Format and layout of the output; default a Hugging Face folder.
        dtype: Type of all weights; default the learngene's.
        compress: Rounds or prunes the blocks' matrices on the way.
    """
    shared = require_plan(learngene)
    raw = {name: value for name, value in (learngene.hf_config or {}).items() if name != KEY}
    ordinary = dataclasses.replace(learngene, hf_config=raw or None)
    layers = use_layers(shared, stages)
    plan = plan_inheritance(ordinary, layers=layers, layout=layout, dtype=dtype)
    title = f"a {len(stages)}-layer descendant of {learngene.path}"
    return compressed(dataclasses.replace(plan, title=title, stages=tuple(stages)), compress)


def use_layers(plan: StagePlan, stages: Sequence[int]) -> list[int]:
    """Gives the auxiliary's layer for each layer of a descendant: a stage's uses in turn, in case they differ."""
    uses = [[layer for layer, own in enumerate(plan.stages) if own == stage] for stage in range(plan.num_stages)]
    return [uses[stage][list(stages[:place]).count(stage) % len(uses[stage])] for place, stage in enumerate(stages)]


def compressed(plan: TransferPlan, method: Method | None) -> TransferPlan:
    """Rounds or prunes the matrices of the blocks that a plan copies; norms, biases and embeddings stay as they are.

    Statistics are those of one matrix alone, so that a compressed learngene, expanded, is the compressed descendant.
    A learngene is stored packed; other formats, which any tool must read, hold the rounded values and the zeros.
    """
    if method is None:
        return plan
    ops = tuple(_compressed(op, method) for op in plan.ops)
    hf_config = plan.hf_config
    if plan.layout.format == "learngene":
        hf_config = {**(hf_config or {}), PACKING: {"form": method, "dtype": _block_dtype(plan)}}
    return dataclasses.replace(plan, title=f"{plan.title}, {method}", ops=ops, hf_config=hf_config).check()


def _block_dtype(plan: TransferPlan) -> str:
    return next(op.dtype for op in plan.ops if op.target.startswith("layers.") and len(op.shape) == 2)


def _compressed(op: Op, method: Method) -> Op:
    if not isinstance(op, Copy) or not op.target.startswith("layers.") or len(op.shape) != 2:
        return op
    function, arguments = MADE_BY[method]
    group = arguments.get("of", 1)
    if op.shape[1] % group:
        raise ConfigError(
            f"--compress {method}: the columns of {op.target} do not split into groups of {group}.", got=op.shape[1]
        )
    return Compute(
        target=op.target,
        shape=op.shape,
        dtype=op.dtype,
        function=function,
        sources=(op.source,),
        arguments=dict(arguments),
    )
