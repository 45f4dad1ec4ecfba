"""Which figures an analysis of a checkpoint gives, for reports and for ``minherit analyze`` alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_inherit.eval import plots


@dataclass(frozen=True)
class Drawing:
    """A figure to be drawn: ``draw(wide=...)`` gives it."""

    name: str
    title: str
    note: str
    draw: Callable[..., Any]


def drawings_of(analysis: Mapping[str, Any]) -> list[Drawing]:
    """Lists the figures of a JSON file of ``minherit analyze``, or of a study's script; an unknown kind has none."""
    makers = {"attention": _attention, "importance": _importance, "points": _points, "curves": _curves}
    maker = makers.get(str(analysis.get("kind")))
    return maker(analysis) if maker else []


def _attention(analysis: Mapping[str, Any]) -> list[Drawing]:
    sample = f"Mean over {analysis['sequences']} sequences of {analysis['tokens']} tokens."
    share = f"{100 * analysis['tau']:.0f}%"

    def matrix(key: str, colorbar: str, vmin: float) -> Callable[..., Any]:
        return lambda wide=True: plots.heatmap(
            analysis[key],
            xlabel="head",
            ylabel="block",
            title="",
            colorbar=colorbar,
            vmin=vmin,
            log=vmin > 0,
            wide=wide,
        )

    def lines(wide: bool = True) -> Any:
        series = {"largest rank of a head": analysis["max_rank"], "mean mass of the heads": analysis["avg_mass"]}
        return plots.layer_lines(series, ylabel="rank, columns", wide=wide, log=True)

    return [
        Drawing(
            "rank",
            "Attention rank",
            f"Singular values needed for {share} of the energy of a head's attention. {sample}",
            matrix("rank", "rank", 1),
        ),
        Drawing(
            "mass",
            "Attention mass",
            f"Columns that hold {100 * analysis['eta']:.0f}% of a head's attention. {sample}",
            matrix("mass", "columns", 1),
        ),
        Drawing(
            "sink", "Attention sink", f"Mean attention paid to the first token. {sample}", matrix("sink", "share", 0)
        ),
        Drawing("layers", "Rank and mass of the blocks", f"MaxRank and AvgMass of each block. {sample}", lines),
    ]


def _importance(analysis: Mapping[str, Any]) -> list[Drawing]:
    found = []
    if "block_influence" in analysis:
        found.append(
            Drawing(
                "influence",
                "Block influence",
                "One less the mean cosine between a block's input and output: the lowest are the first to go.",
                lambda wide=True: plots.layer_lines(
                    {"block influence": analysis["block_influence"]}, ylabel="1 - cosine", wide=wide, log=True
                ),
            )
        )
    if "angular" in analysis:
        found.append(
            Drawing(
                "angular",
                "Angular distance of spans",
                "Angle, over pi, between the hidden state before a span of blocks and after it, at the last token.",
                lambda wide=True: plots.heatmap(
                    analysis["angular"],
                    xlabel="first block of the span",
                    ylabel="blocks of the span",
                    first_row=1,
                    title="",
                    colorbar="distance",
                    vmin=0,
                    wide=wide,
                ),
            )
        )
    if "removal_loss" in analysis:
        found.append(
            Drawing(
                "removal",
                "Loss without a block",
                f"Of the whole model: {analysis['loss']:.3f} nats.",
                lambda wide=True: plots.layer_lines(
                    {"loss without the block": analysis["removal_loss"]}, ylabel="loss (nats)", wide=wide, log=True
                ),
            )
        )
    return found


def _points(analysis: Mapping[str, Any]) -> list[Drawing]:
    """A study's values at a few places: ``groups`` of label -> [x, y, error], ``reference`` [label, y]."""
    groups = {label: [(x, y, error) for x, y, error in rows] for label, rows in analysis["groups"].items()}

    def draw(wide: bool = True) -> Any:
        axes = {"xlabel": analysis["xlabel"], "ylabel": analysis["ylabel"]}
        return plots.points(groups, **axes, reference=_reference(analysis), wide=wide)

    return [Drawing(analysis["name"], analysis["title"], analysis["note"], draw)]


def _curves(analysis: Mapping[str, Any]) -> list[Drawing]:
    """A study's losses against tokens seen: ``curves`` with label, x, y and error, ``reference`` [label, y]."""
    curves = [plots.Curve(one["label"], one["x"], one["y"], one["error"]) for one in analysis["curves"]]

    def draw(wide: bool = True) -> Any:
        return plots.loss_curves(curves, reference=_reference(analysis), wide=wide)

    return [Drawing(analysis["name"], analysis["title"], analysis["note"], draw)]


def _reference(analysis: Mapping[str, Any]) -> tuple[str, float] | None:
    found = analysis.get("reference")
    return None if found is None else (found[0], found[1])
