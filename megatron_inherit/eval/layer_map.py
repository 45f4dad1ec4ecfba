"""The picture of an inheritance: which block of the teacher each part of the student came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_inherit.plan.plan import checkpoint_name

_BLOCK = re.compile(r"layers\.(\d+)\.(attn_norm|mlp_norm|attn|mlp)\.(q_norm|k_norm)?")
_OUTSIDE = ("embed", "pos_embed", "final_norm", "head")
_TITLES = {"embed": "embedding", "pos_embed": "positions", "final_norm": "final norm", "head": "head"}
PARTS = ("norm", "attn", "mlp")

WIDTH, COLUMN, TOP, GAP = 520.0, 168.0, 30.0, 3.0


@dataclass(frozen=True)
class Origin:
    """Where one student tensor comes from.

    Attributes:
        tensor: Canonical name in the student.
        kind: ``copy``, ``init``, ``tie``, ``compute`` or ``file``.
        teacher: Canonical name in the teacher, or None where nothing of it is used.
    """

    tensor: str
    kind: str
    teacher: str | None


@dataclass(frozen=True)
class Box:
    """A rectangle of the picture; ``state`` is its CSS class: kept, fresh, made, tied or dropped."""

    x: float
    y: float
    width: float
    height: float
    state: str
    text: str
    title: str


@dataclass(frozen=True)
class LayerMap:
    """The picture, in the coordinates of its SVG view box ``0 0 width height``.

    Attributes:
        boxes: Parts of teacher (left) and student (right).
        links: SVG paths from teacher to student.
        layers: Teacher block of each student block, None for a fresh one.
    """

    height: float
    boxes: tuple[Box, ...]
    links: tuple[str, ...]
    layers: tuple[int | None, ...]
    teacher_layers: int
    width: float = WIDTH

    def has(self, state: str) -> bool:
        """Tells whether a box has the state, for the key of the picture."""
        return any(box.state == state for box in self.boxes)

    @property
    def summary(self) -> str:
        """Says the map in words, runs of blocks joined: ``blocks 0-7 of 26``."""
        kept = [layer for layer in self.layers if layer is not None]
        fresh = len(self.layers) - len(kept)
        words = f"blocks {join_ranges(kept)} of {self.teacher_layers}" if kept else "no block"
        return words + (f", {fresh} fresh" if fresh and kept else "")


def join_ranges(layers: Iterable[int]) -> str:
    """Writes ascending neighbours as ranges: (0, 1, 2, 5, 5) -> ``0-2, 5, 5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def draw_map(origins: Iterable[Origin], *, teacher_layers: int) -> LayerMap:
    """Lays the picture out.

    Args:
        origins: The source of every student tensor.
        teacher_layers: Blocks of the teacher.
    """
    blocks, outside = _collect(origins)
    depth = max(blocks, default=-1) + 1
    rows = max(teacher_layers, depth)
    height = 17.0 if rows <= 26 else max(6.0, 442.0 / rows)
    parents = [_parent(blocks.get(layer, {})) for layer in range(depth)]
    used = {parent for states in blocks.values() for _, parent in states.values() if parent is not None}
    step, extra = height + GAP, [part for part in _OUTSIDE if part in outside]
    before = [part for part in extra if part in ("embed", "pos_embed")]
    after = [part for part in extra if part not in before]
    offset = TOP + len(before) * 20.0
    shift = max(0.0, (teacher_layers - depth) * step / 2)
    right = WIDTH - COLUMN
    boxes = [
        Box(0, offset + layer * step, COLUMN, height, "kept" if layer in used else "dropped", str(layer), "")
        for layer in range(teacher_layers)
    ]
    for layer in range(depth):
        boxes += _student_block(blocks.get(layer, {}), layer, right, offset + shift + layer * step, height)
    links = [
        _link(offset + parent * step + height / 2, offset + shift + layer * step + height / 2)
        for layer, parent in enumerate(parents)
        if parent is not None
    ]
    bottom = offset + max(teacher_layers * step, shift + depth * step)
    places = {part: TOP + 20.0 * row for row, part in enumerate(before)}
    places |= {part: bottom + 20.0 * row for row, part in enumerate(after)}
    for part, y in places.items():
        boxes += _outer(part, outside[part], y, right)
        if outside[part] in ("kept", "made"):
            links.append(_link(y + 8.5, y + 8.5))
    return LayerMap(bottom + 20.0 * len(after) + 2, tuple(boxes), tuple(links), tuple(parents), teacher_layers)


_States = dict[str, tuple[str, int | None]]


def _collect(origins: Iterable[Origin]) -> tuple[dict[int, _States], dict[str, str]]:
    blocks: dict[int, _States] = {}
    outside: dict[str, str] = {}
    for origin in origins:
        state = {"init": "fresh", "tie": "tied", "copy": "kept"}.get(origin.kind, "made")
        match = _BLOCK.match(origin.tensor)
        if match is None:
            outside.setdefault(origin.tensor.split(".")[0], state)
            continue
        part = "norm" if match[2].endswith("norm") or match[3] else match[2]
        teacher = _BLOCK.match(origin.teacher or "")
        blocks.setdefault(int(match[1]), {}).setdefault(part, (state, int(teacher[1]) if teacher else None))
    return blocks, outside


def _parent(states: _States) -> int | None:
    return next(
        (states[part][1] for part in ("attn", "mlp", "norm") if states.get(part, ("", None))[1] is not None), None
    )


def _student_block(states: _States, layer: int, x: float, y: float, height: float) -> list[Box]:
    if len({state for state, _ in states.values()}) == 1:
        state, parent = next(iter(states.values()))
        title = f"block {layer}: " + (f"teacher block {parent}" if parent is not None else "fresh")
        return [Box(x, y, COLUMN, height, state, str(layer), title)]
    present = [part for part in PARTS if part in states]
    width = COLUMN / max(len(present), 1)
    return [
        Box(
            x + place * width,
            y,
            width - 1.5,
            height,
            states[part][0],
            part,
            f"block {layer}, {part}: {states[part][0]}",
        )
        for place, part in enumerate(present)
    ]


def _outer(part: str, state: str, y: float, x: float) -> list[Box]:
    text = _TITLES[part]
    left = "kept" if state in ("kept", "made") else "dropped"
    teacher = [] if state == "tied" else [Box(0, y, COLUMN, 17.0, left, text, f"teacher's {text}")]
    shown = f"{text} = embedding" if state == "tied" else text
    return [*teacher, Box(x, y, COLUMN, 17.0, state, shown, f"{text}: {state}")]


def _link(left: float, right: float) -> str:
    start, end = COLUMN + 2, WIDTH - COLUMN - 2
    middle = (start + end) / 2
    return f"M{start:g} {left:.1f}C{middle:g} {left:.1f} {middle:g} {right:.1f} {end:g} {right:.1f}"


def map_of(inherit: Mapping[str, Any]) -> tuple[str, LayerMap] | None:
    """Reads an inherit.json.

    Returns:
        The teacher's name and the picture, or None where there is no plan in it or the plan reads no teacher.
    """
    plan = inherit.get("plan") or {}
    origin = plan.get("origin")
    if not origin:
        return None
    ops = [op for op in plan["ops"] if ":" not in op["target"]]
    origins = [
        Origin(op["target"], op["op"], op.get("source") or next(iter(op.get("sources", ())), None)) for op in ops
    ]
    return checkpoint_name(origin["path"]), draw_map(origins, teacher_layers=origin["config"]["num_layers"])
