"""What can happen to a student tensor: five kinds of operation, each one line of a plan and one object of its JSON."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from megatron_inherit.base.errors import PlanError

Shape = tuple[int, ...]
FreshKind = Literal["normal", "residual", "ones", "zeros"]


@dataclass(frozen=True, kw_only=True)
class Op(abc.ABC):
    """Gives one tensor of the output its values.

    Attributes:
        target: Canonical name in the output, or ``KIND:NAME`` for optimizer state.
        shape: Of the target.
        dtype: Of the target, safetensors name.
    """

    kind: ClassVar[str] = ""
    target: str
    shape: Shape
    dtype: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """Tensors of the source that it reads."""
        return ()

    @abc.abstractmethod
    def describe(self) -> str:
        """Says in a few words where the values come from."""

    def to_json(self) -> dict[str, Any]:
        """Gives plain values; ``op_from_json`` reverses it."""
        return {"op": self.kind} | dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Copy(Op):
    """Takes a tensor of the source, or a box of it, cast where the types differ; sources may be used repeatedly.

    Attributes:
        source: Name in the source.
        source_dtype: Its type.
        box: (start, stop) a dimension, or None for the whole tensor.
        decoded: The exact function that its reader applies (``dequantise Q4_1``, ``scale 1/3``), or empty.
    """

    kind: ClassVar[str] = "copy"
    source: str
    source_dtype: str
    box: tuple[tuple[int, int], ...] | None = None
    decoded: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The tensor it copies."""
        return (self.source,)

    def describe(self) -> str:
        """Names the source, the box and the cast."""
        box = "" if self.box is None else "[" + ", ".join(f"{a}:{b}" for a, b in self.box) + "]"
        cast = "" if self.source_dtype == self.dtype else f", cast {self.source_dtype} to {self.dtype}"
        decoded = f", {self.decoded}" if self.decoded else ""
        return f"copy {self.source}{box}{decoded}{cast}"


@dataclass(frozen=True, kw_only=True)
class Init(Op):
    """Draws fresh values that depend on (seed, target, element) alone.

    Attributes:
        init: ``normal``, ``residual``, ``ones`` or ``zeros``.
        std: Standard deviation of ``normal``; ``residual`` divides it by sqrt(2 num_layers).
        num_layers: Depth of the output.
        seed: Of the draw.
    """

    kind: ClassVar[str] = "init"
    init: FreshKind
    std: float
    num_layers: int
    seed: int

    def describe(self) -> str:
        """Names the distribution."""
        if self.init in ("ones", "zeros"):
            return f"fresh, {self.init}"
        scale = self.std if self.init == "normal" else self.std / (2 * self.num_layers) ** 0.5
        return f"fresh, normal with std {scale:.4g}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Tie(Op):
    """Repeats another tensor of the output.

    Attributes:
        to: Its name.
    """

    kind: ClassVar[str] = "tie"
    to: str

    def describe(self) -> str:
        """Names the other tensor."""
        return f"same as {self.to}"


@dataclass(frozen=True, kw_only=True)
class Compute(Op):
    """Applies a named pure function of ``plan.functions`` to tensors of the source.

    Attributes:
        function: Its name.
        sources: Names in the source, in the order of the function's arguments.
        arguments: Further JSON-able arguments.
    """

    kind: ClassVar[str] = "compute"
    function: str
    sources: tuple[str, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The tensors it reads."""
        return self.sources

    def describe(self) -> str:
        """Writes the call."""
        arguments = [*self.sources, *(f"{key}={value}" for key, value in self.arguments.items())]
        return f"compute {self.function}({', '.join(arguments)})"


@dataclass(frozen=True, kw_only=True)
class File(Op):
    """Takes a tensor that an earlier step wrote to a safetensors file.

    Attributes:
        file: Path of the file.
        name: Name of the tensor in it.
        header: Hash of the file's header when the plan was made; empty where it is not checked.
    """

    kind: ClassVar[str] = "file"
    file: str
    name: str
    header: str = ""

    def describe(self) -> str:
        """Names the file."""
        return f"{self.name} of {self.file}"


KINDS: dict[str, type[Op]] = {kind.kind: kind for kind in (Copy, Init, Tie, Compute, File)}


def op_from_json(value: Mapping[str, Any]) -> Op:
    """Reads an operation.

    Raises:
        PlanError: Its kind or a field is unknown.
    """
    fields = dict(value)
    kind = fields.pop("op", None)
    if kind not in KINDS:
        raise PlanError(f"Unknown operation {kind!r}.", expected=f"one of {', '.join(KINDS)}")
    for name in ("shape", "sources"):
        if name in fields:
            fields[name] = tuple(fields[name])
    if fields.get("box") is not None:
        fields["box"] = tuple(tuple(pair) for pair in fields["box"])
    try:
        return KINDS[kind](**fields)
    except TypeError as error:
        raise PlanError(f"The operation {kind!r} of a plan cannot be read.", got=error) from error
