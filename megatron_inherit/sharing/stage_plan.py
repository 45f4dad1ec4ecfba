"""Which physical weights each layer of a model with shared stages applies; a value that needs no tensor library.

Stage-wise weight sharing: Xia et al., "Exploring Learngene via Stage-wise Weight Sharing for Initializing
Variable-sized Models", IJCAI 2024. A plan is a list of physical ids, one a layer, so that contiguous stages, cycles
(Takase and Kiyono 2021), sandwiches (Subformer), ALBERT's groups and repeated layers (MobileLLM-LS) are all plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_inherit.arch.model_config import ModelConfig
from megatron_inherit.base.errors import ConfigError

Component = Literal["attn", "mlp", "norm"]
COMPONENTS: tuple[Component, ...] = ("attn", "mlp", "norm")
DRAWN = 32
"""Layers drawn side by side."""


@dataclass(frozen=True)
class StagePlan:
    """Physical id of each layer's attention, MLP and norms.

    Ids of a component are numbered by first use: 0 appears first, then 1, and so on without a hole.

    Attributes:
        attn: Physical attention of each layer; query and key norms belong to it.
        mlp: Physical MLP of each layer.
        norm: Physical pair of norms (before the attention, before the MLP) of each layer.

    Raises:
        ConfigError: The three lists differ in length, are empty or are not numbered by first use.
    """

    attn: tuple[int, ...]
    mlp: tuple[int, ...]
    norm: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = {component: len(self.ids(component)) for component in COMPONENTS}
        if len(set(lengths.values())) != 1:
            raise ConfigError(
                "The plans of attention, MLP and norms do not cover the same layers.",
                got=", ".join(f"{name}: {length} layers" for name, length in lengths.items()),
                fix="Give all three the same number of layers.",
            )
        if not self.attn:
            raise ConfigError("A stage plan has no layer.", fix="Give at least one stage, for instance 3,3,4,3,3.")
        for component in COMPONENTS:
            _check_numbering(component, self.ids(component))

    @classmethod
    def same(cls, ids: Sequence[int]) -> StagePlan:
        """Makes a plan that shares whole layers; ids are renumbered by first use."""
        numbered = renumber(ids)
        return cls(numbered, numbered, numbered)

    def ids(self, component: Component) -> tuple[int, ...]:
        """Gives the physical id of each layer for one component."""
        return getattr(self, component)

    @property
    def num_layers(self) -> int:
        """Virtual depth: how many layers a token passes."""
        return len(self.attn)

    @property
    def uniform(self) -> bool:
        """Tells whether whole layers are shared, so that one list says it all."""
        return self.attn == self.mlp == self.norm

    @property
    def contiguous(self) -> bool:
        """Tells whether each component's ids never decrease: stages follow one another."""
        return all(tuple(sorted(self.ids(component))) == self.ids(component) for component in COMPONENTS)

    @property
    def num_stages(self) -> int:
        """Distinct combinations of physical ids; of whole layers where the plan is uniform."""
        return len(set(self.layers))

    @property
    def layers(self) -> tuple[tuple[int, int, int], ...]:
        """The (attn, mlp, norm) ids of each layer."""
        return tuple(zip(self.attn, self.mlp, self.norm, strict=True))

    @property
    def stages(self) -> tuple[int, ...]:
        """One stage id a layer, numbered by first use; equal ids apply the same weights everywhere."""
        return renumber(self.layers)

    @property
    def counts(self) -> tuple[int, ...]:
        """How often each stage is applied, in order of first use."""
        return tuple(self.stages.count(stage) for stage in range(self.num_stages))

    @property
    def first_layers(self) -> tuple[int, ...]:
        """The first layer of each stage."""
        return tuple(self.stages.index(stage) for stage in range(self.num_stages))

    def num_physical(self, component: Component) -> int:
        """Counts the stored copies of one component."""
        return max(self.ids(component)) + 1

    def uses(self, component: Component, physical: int) -> tuple[int, ...]:
        """Lists the layers that apply one physical component."""
        return tuple(layer for layer, value in enumerate(self.ids(component)) if value == physical)

    def refines(self, coarse: StagePlan) -> bool:
        """Tells whether a split of ``coarse`` gives this plan: layers that share here shared there."""
        if self.num_layers != coarse.num_layers:
            return False
        return all(
            len({coarse.ids(component)[layer] for layer in self.uses(component, physical)}) == 1
            for component in COMPONENTS
            for physical in range(self.num_physical(component))
        )

    def to_json(self) -> dict[str, Any]:
        """Gives plain values for JSON; ``from_json`` reverses it."""
        return {component: list(self.ids(component)) for component in COMPONENTS}

    @classmethod
    def from_json(cls, value: Mapping[str, Sequence[int]]) -> StagePlan:
        """Reads what ``to_json`` gave."""
        if set(value) != set(COMPONENTS):
            raise ConfigError("A stored stage plan is incomplete.", got=sorted(value), expected=sorted(COMPONENTS))
        return cls(tuple(value["attn"]), tuple(value["mlp"]), tuple(value["norm"]))

    def __str__(self) -> str:
        if self.uniform:
            return _text(self.attn)
        return ";".join(f"{component}={_text(self.ids(component))}" for component in COMPONENTS)

    def draw(self, **beside: Sequence[int]) -> str:
        """Draws the plan as text: one column a layer, one row a component, equal numbers share weights.

        Args:
            beside: Further rows, a value a layer, by name: ``rank=(0, 0, 1, 1)``.
        """
        rows: list[tuple[str, Sequence[int]]] = [("depth", range(self.num_layers))]
        rows += [("stage", self.attn)] if self.uniform else [(name, self.ids(name)) for name in COMPONENTS]
        rows += beside.items()
        width = max(2, len(str(self.num_layers - 1)))
        blocks = []
        for start in range(0, self.num_layers, DRAWN):
            block = ((name, values[start : start + DRAWN]) for name, values in rows)
            blocks.append("\n".join(f"{n:>6}  " + " ".join(f"{value:>{width}}" for value in v) for n, v in block))
        return "\n\n".join(blocks)


def renumber(ids: Sequence[Any]) -> tuple[int, ...]:
    """Numbers values by first use: ``(7, 7, 2, 7)`` gives ``(0, 0, 1, 0)``."""
    first = {value: index for index, value in enumerate(dict.fromkeys(ids))}
    return tuple(first[value] for value in ids)


def contiguous(counts: Sequence[int]) -> StagePlan:
    """Repeats each stage in place: ``(3, 3, 4, 3, 3)`` are five stages and sixteen layers."""
    if not counts or min(counts) < 1:
        raise ConfigError("Each stage must be applied at least once.", got=list(counts))
    return StagePlan.same([stage for stage, count in enumerate(counts) for _ in range(count)])


def cycle(num_stages: int, rounds: int) -> StagePlan:
    """Passes all stages in turn, ``rounds`` times: 0 1 2 0 1 2."""
    return StagePlan.same([stage for _ in range(rounds) for stage in range(num_stages)])


def sandwich(num_layers: int) -> StagePlan:
    """Leaves the first and last layer alone and shares all between them."""
    if num_layers < 3:
        raise ConfigError("A sandwich has at least three layers.", got=num_layers)
    return contiguous((1, num_layers - 2, 1))


def albert(num_layers: int, num_groups: int) -> StagePlan:
    """Cuts the depth into equal groups as ALBERT does: layer i belongs to group int(i / L * G)."""
    if not 1 <= num_groups <= num_layers:
        raise ConfigError("The groups must be between 1 and the layers.", got=f"{num_groups} of {num_layers}")
    return StagePlan.same([layer * num_groups // num_layers for layer in range(num_layers)])


def repeat_each(num_stages: int, times: int) -> StagePlan:
    """Applies every layer ``times`` in place (MobileLLM-LS with ``times`` 2)."""
    return contiguous([times] * num_stages)


def unshared(num_layers: int) -> StagePlan:
    """Shares nothing: the plan of an ordinary model."""
    return StagePlan.same(range(num_layers))


def _numbers(form: str, text: str, count: int | None = None) -> list[int]:
    try:
        values = [int(word) for word in text.replace(":", ",").split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 0 or (count is not None and len(values) != count):
        raise ConfigError(
            f"{form}:{text} is not a stage plan.", expected=f"{count or 'some'} whole numbers after {form!r}"
        )
    return values


PRESETS: Mapping[str, Callable[[str], StagePlan]] = {
    "stages": lambda text: contiguous(_numbers("stages", text)),
    "ids": lambda text: StagePlan.same(_numbers("ids", text)),
    "cycle": lambda text: cycle(*_numbers("cycle", text, 2)),
    "each": lambda text: repeat_each(*_numbers("each", text, 2)),
    "albert": lambda text: albert(*_numbers("albert", text, 2)),
    "sandwich": lambda text: sandwich(*_numbers("sandwich", text, 1)),
    "unshared": lambda text: unshared(*_numbers("unshared", text, 1)),
}
"""Form of a plan on the command line -> its reader; the text after the colon is given."""


def parse_plan(text: str) -> StagePlan:
    """Reads a plan as people write it.

    ``3,3,4,3,3`` or ``stages:3,3,4,3,3`` (repeats of each stage), ``ids:0,0,1,1``, ``cycle:S:ROUNDS``,
    ``each:S:TIMES``, ``albert:L:GROUPS``, ``sandwich:L``, ``unshared:L``; or a plan a component,
    ``attn=4,4;mlp=8;norm=unshared:8``, where a component that is not named follows ``attn``.

    Raises:
        ConfigError: The text is no plan, or its components differ in depth.
    """
    if "=" not in text:
        form, colon, rest = text.strip().partition(":")
        form, rest = (form, rest) if colon else ("stages", form)
        if form not in PRESETS:
            raise ConfigError(f"There is no stage plan of the form {form!r}.", expected=f"one of {', '.join(PRESETS)}")
        return PRESETS[form](rest)
    parts = [part.partition("=") for part in text.replace(" ", "").split(";")]
    words = {name: form for name, equals, form in parts if equals and form}
    if len(words) != len(parts) or not {"attn"} <= set(words) <= set(COMPONENTS):
        raise ConfigError(f"{text!r} is not a stage plan.", expected="attn=...;mlp=...;norm=..., each once")
    plans = {component: parse_plan(words.get(component, words["attn"])) for component in COMPONENTS}
    return StagePlan(*(plans[component].ids("attn") for component in COMPONENTS))


def require_cover(plan: StagePlan, config: ModelConfig) -> None:
    """Checks that a plan fits a model.

    Raises:
        ConfigError: The depths differ, or the model's layers differ inside a stage.
    """
    if plan.num_layers != config.num_layers:
        raise ConfigError(
            "The stage plan does not cover the model's layers.",
            got=f"{plan.num_layers} layers planned ({plan})",
            expected=f"{config.num_layers}",
            fix="Change the plan, or the model's depth.",
        )
    if config.attn_scale_by_layer and plan.num_stages < plan.num_layers:
        raise ConfigError(
            "This model scales attention by the layer's index, so layers of one stage are not the same function.",
            fix="Export it first: the factor is then folded into the query weights.",
        )


def _check_numbering(component: str, ids: tuple[int, ...]) -> None:
    if ids != renumber(ids):
        raise ConfigError(
            f"The {component} plan is not numbered by first use.",
            got=_join(ids),
            expected=_join(renumber(ids)),
            fix="Use StagePlan.same, or renumber the ids.",
        )


def _text(ids: tuple[int, ...]) -> str:
    """Writes one component's ids as repeats where they never decrease."""
    if tuple(sorted(ids)) != ids:
        return f"ids:{_join(ids)}"
    return f"stages:{_join([ids.count(physical) for physical in range(ids[-1] + 1)])}"


def _join(values: Sequence[int]) -> str:
    return ",".join(str(value) for value in values)
