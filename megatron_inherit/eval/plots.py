"""Figures: loss curves of arms, per-layer measures, heat maps. One look, safe for colour-blind readers, light and dark.

Figures are drawn in the light theme. ``to_svg`` replaces each of its colours by a CSS variable of the page that embeds
the drawing, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from megatron_inherit.base.optional import require
from megatron_inherit.base.quantities import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = ("#0063b1", "#d1495b", "#00826b", "#b06f00", "#7b4fa3", "#2f8fb3", "#5f6b76", "#9a3b76")
"""Line colours: told apart under deuteranopia and protanopia, contrast >= 3:1 on white; dashes differ as well."""

INK, MUTED, GRID, PAPER = "#1b1f24", "#5b6570", "#dde2e7", "#fefefe"
THEME = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES, start=1)
}
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (1, 1)), (0, (4, 1, 1, 1, 1, 1)))

_LINE = 14.0
"""Points from one label to the next."""
_REFERENCE_DASH = (0, (4, 3))
_SAMPLE = 26.0
"""Length in points of a line's sample beside its label."""

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "svg.fonttype": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "lines.linewidth": 2.0,
}


@dataclass(frozen=True)
class Curve:
    """One arm's line.

    Attributes:
        label: Its name, written at the end of the line.
        x: Tokens seen; nothing of an arm that only keeps its place, so that every arm has one colour in all figures.
        y: Loss in nats.
        error: Standard error of each y, drawn as a band, or None.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float | None] | None = None


_P = ParamSpec("_P")


def _themed(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Runs a drawing function under the house style."""

    @functools.wraps(draw)
    def styled(*args: _P.args, **options: _P.kwargs) -> Figure:
        with require("matplotlib", "plots").rc_context(_STYLE):
            return draw(*args, **options)

    return styled


@_themed
def loss_curves(
    curves: Sequence[Curve],
    *,
    ylabel: str = "validation loss (nats)",
    reference: tuple[str, float] | None = None,
    wide: bool = True,
) -> Figure:
    """Draws losses against tokens seen; the token axis is logarithmic where it spans more than a factor of 30.

    A start far above everything later leaves the top of the picture: it would press the rest flat.

    Args:
        curves: The arms.
        ylabel: What y is.
        reference: Label and height of a horizontal line, the teacher's loss for instance.
        wide: For a page; else for a phone.
    """
    figure, axes = _canvas((9.6, _height(4.6, curves)) if wide else (4.6, _height(4.4, curves)))
    _draw_losses(figure, axes, curves, reference, ylabel)
    return figure


def _draw_losses(
    figure: Figure, axes: Axes, curves: Sequence[Curve], reference: tuple[str, float] | None, ylabel: str
) -> None:
    for number, curve in enumerate(curves):
        if not len(curve.x):
            continue
        color, dash = _look(number)
        mark: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(curve.x) <= 40 else {}
        axes.plot(curve.x, curve.y, color=color, linestyle=dash, solid_capstyle="round", **mark)
        if curve.error is not None and any(value is not None for value in curve.error):
            y, error = np.asarray(curve.y), np.asarray([value or 0.0 for value in curve.error])
            axes.fill_between(curve.x, y - error, y + error, color=color, alpha=0.18, linewidth=0)
    _token_axis(axes, curves)
    _loss_axis(axes, curves, reference)
    axes.set_ylabel(ylabel)
    if reference is not None:
        axes.axhline(reference[1], color=MUTED, linewidth=1.2, linestyle=_REFERENCE_DASH)
    _end_labels(figure, axes, curves, reference)


@_themed
def layer_lines(series: Mapping[str, Sequence[float]], *, ylabel: str, wide: bool = True, log: bool = False) -> Figure:
    """Draws one value a block for each named measure."""
    figure, axes = _canvas((9.6, 3.6) if wide else (4.6, 3.6))
    for number, (label, values) in enumerate(series.items()):
        axes.plot(range(len(values)), values, color=SERIES[number % len(SERIES)], marker="o", markersize=4, label=label)
    axes.set_xlabel("block")
    axes.set_ylabel(ylabel)
    if log:
        axes.set_yscale("log")
        _plain_log(axes.yaxis)
    axes.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(integer=True))
    if len(series) > 1:
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series) if wide else 1)
    return figure


@_themed
def heatmap(
    values: Any,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    colorbar: str,
    vmin: float | None = None,
    log: bool = False,
    first_row: int = 0,
    wide: bool = True,
) -> Figure:
    """Draws a matrix [rows, columns], the first row at the top, with numbers where there is room; NaN stays blank."""
    matrix = np.asarray(values, dtype=float)
    rows, columns = matrix.shape
    width = (9.6 if columns > 24 else 7.2) if wide else 4.6
    figure, axes = _canvas((width, min(11.0, 1.4 + 0.27 * rows)))
    low = float(np.nanmin(matrix)) if vmin is None else vmin
    colors = require("matplotlib.colors", "plots")
    norm = (colors.LogNorm if log else colors.Normalize)(low, max(float(np.nanmax(matrix)), low * 1.01 + 1e-9))
    mesh = axes.pcolormesh(matrix, cmap="cividis", norm=norm, edgecolors=PAPER, linewidth=0.6)
    axes.invert_yaxis()
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(*_cell_ticks(columns, 24 if wide else 10))
    axes.set_yticks(*_cell_ticks(rows, 40, first_row))
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if columns <= (16 if wide else 9):
        _cell_numbers(axes, matrix, mesh)
    bar = figure.colorbar(mesh, ax=axes, label=colorbar, fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)
    if log:
        _plain_log(bar.ax.yaxis)
    return figure


@_themed
def points(
    groups: Mapping[str, Sequence[tuple[float, float, float | None]]],
    *,
    xlabel: str,
    ylabel: str,
    reference: tuple[str, float] | None = None,
    wide: bool = True,
) -> Figure:
    """Draws (x, y, standard error) points, joined where each x of a group has one: a sweep of depths, say."""
    figure, axes = _canvas((9.6, 4.0) if wide else (4.6, 4.0))
    for number, (label, values) in enumerate(groups.items()):
        x, y, error = zip(*sorted(values, key=lambda value: value[:2]), strict=True)
        look: dict[str, Any] = {"color": SERIES[number % len(SERIES)], "marker": "o", "capsize": 3, "label": label}
        joined = "-" if len(set(x)) == len(x) else "none"
        axes.errorbar(x, y, yerr=[e or 0.0 for e in error], linestyle=joined, **look)
    if reference is not None:
        axes.axhline(reference[1], color=MUTED, linewidth=1.2, linestyle=_REFERENCE_DASH, label=reference[0])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


@_themed
def curves_and_table(
    curves: Sequence[Curve],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    reference: tuple[str, float] | None = None,
) -> Figure:
    """Draws the loss curves with the arms' table below, for places that show a picture but no page."""
    table_height = 0.32 * (len(rows) + 1) + 0.2
    curves_height = _height(4.4, curves)
    figure = require("matplotlib.figure", "plots").Figure(
        figsize=(9.6, curves_height + table_height), layout="constrained"
    )
    top, below = figure.subplots(2, 1, height_ratios=(curves_height, table_height))
    _draw_losses(figure, top, curves, reference, "validation loss (nats)")
    if reference is not None:
        top.axhline(reference[1], color=MUTED, linewidth=1.2, linestyle=_REFERENCE_DASH)
    below.axis("off")
    table = below.table([list(row) for row in rows], colLabels=list(header), loc="upper center", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    table.auto_set_column_width(range(len(header)))
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor(GRID)
        cell.set_height(1 / (len(rows) + 1))
        cell.get_text().set_color(MUTED if row == 0 else INK)
        cell.get_text().set_ha("left" if column == 0 else "right")
    return figure


def to_png(figure: Figure, *, dpi: int = 160) -> bytes:
    """Renders a figure in the light theme."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def to_svg(figure: Figure, *, description: str) -> str:
    """Renders a figure as an SVG element for a page that defines the variables of ``THEME``.

    Args:
        figure: The drawing.
        description: What a screen reader says.
    """
    matplotlib = require("matplotlib", "plots")
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) (?:height|width)="[^"]*"([^>]*?) (?:height|width)="[^"]*"', r"\1\2", svg, count=1)
    for color, variable in THEME.items():
        svg = svg.replace(color, f"var({variable})")
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _plain_log(axis: Any) -> None:
    """Labels a logarithmic axis 1, 2, 5, 10, ... instead of with powers."""
    ticker = require("matplotlib.ticker", "plots")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(ticker.NullLocator())


def _canvas(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = require("matplotlib.figure", "plots").Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _token_axis(axes: Axes, curves: Sequence[Curve]) -> None:
    positive = sorted(x for curve in curves for x in curve.x if x > 0)
    axes.set_xlabel("tokens seen")
    if positive and positive[-1] > 30 * positive[0]:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.4)
    start = 0 if any(0 in curve.x for curve in curves) or not positive else positive[0]
    axes.set_xlim(start, positive[-1] if len(positive) > 1 else None)
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.xaxis.set_minor_locator(require("matplotlib.ticker").NullLocator())
    if len(axes.get_xticks()) > 7 and axes.get_xscale() == "symlog":
        axes.set_xticks(axes.get_xticks()[::2])


def _loss_axis(axes: Axes, curves: Sequence[Curve], reference: tuple[str, float] | None) -> None:
    """Sets the y range so that the part after the start fills the picture."""
    later = [y for curve in curves for x, y in zip(curve.x, curve.y, strict=True) if x > 0 and np.isfinite(y)]
    everything = [y for curve in curves for y in curve.y if np.isfinite(y)]
    if not everything:
        return
    high, low = max(everything), min(everything + ([reference[1]] if reference else []))
    if later and high - low > 2.5 * (max(later) - low):
        high = max(later) + 0.25 * (max(later) - low)
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def _end_labels(figure: Figure, axes: Axes, curves: Sequence[Curve], reference: tuple[str, float] | None) -> None:
    """Writes each line's name at its end, pushed apart where lines end close together, and beside the axes."""
    right = max((curve.x[-1] for curve in curves if len(curve.x)), default=1)
    wanted = [
        (float(ends[-1]), curve.label, *_look(number))
        for number, curve in enumerate(curves)
        if (ends := [y for y in curve.y if np.isfinite(y)])
    ]
    wanted += [(reference[1], reference[0], MUTED, _REFERENCE_DASH)] if reference else []
    wanted.sort(key=lambda entry: entry[0])
    sampled = len({dash for *_, dash in wanted if dash != _REFERENCE_DASH}) > 1
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    top = axes.get_window_extent().height * 72 / figure.dpi
    points_per_unit = top / (high - low)
    heights = spread([(y - low) * points_per_unit for y, *_ in wanted], _LINE)
    last = len(heights) - 1
    heights = [max(height, _LINE * place) for place, height in enumerate(heights)]
    heights = [min(height, top - _LINE * (last - place)) for place, height in enumerate(heights)]
    for (y, label, color, dash), height in zip(wanted, heights, strict=True):
        shift = height - (y - low) * points_per_unit
        if sampled:
            _sample(figure, axes, (right, y), shift, color=color, dash=dash)
        axes.annotate(
            label,
            (right, y),
            xytext=(8 + (_SAMPLE + 5 if sampled else 0), shift),
            textcoords="offset points",
            color=color,
            va="center",
            fontsize=10.5,
            annotation_clip=False,
        )


def _height(least: float, curves: Sequence[Curve]) -> float:
    """Gives the inches that the names of the curves, and of a reference, need one below the other."""
    return max(least, 1.0 + (1 + sum(len(curve.x) > 0 for curve in curves)) * _LINE / 72)


def _look(number: int) -> tuple[str, Any]:
    """Gives an arm's colour and dash: where the colours are used up they come again, dashed."""
    return SERIES[number % len(SERIES)], _DASHES[number // len(SERIES) % len(_DASHES)]


def _sample(figure: Figure, axes: Axes, end: tuple[float, float], shift: float, *, color: str, dash: Any) -> None:
    """Draws a piece of a line before its label, which stands ``shift`` points above the line's end."""
    transforms = require("matplotlib.transforms", "plots")
    one_point = transforms.Affine2D().scale(1 / 72) + figure.dpi_scale_trans
    place = one_point + transforms.ScaledTranslation(*end, axes.transData)
    line = require("matplotlib.lines", "plots").Line2D
    axes.add_artist(line([8, 8 + _SAMPLE], [shift, shift], color=color, linestyle=dash, transform=place, clip_on=False))


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Moves ascending positions as little as needed so that neighbours stand ``gap`` apart, clusters kept centred."""
    clusters: list[list[float]] = []
    for position in positions:
        clusters.append([position])
        while len(clusters) > 1 and _start(clusters[-1], gap) < _start(clusters[-2], gap) + gap * len(clusters[-2]):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    return [_start(cluster, gap) + gap * place for cluster in clusters for place in range(len(cluster))]


def _start(cluster: Sequence[float], gap: float) -> float:
    return sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def _cell_ticks(number: int, most: int, first: int = 0) -> tuple[list[float], list[str]]:
    places = range(0, number, -(-number // most))
    return [place + 0.5 for place in places], [str(place + first) for place in places]


def _cell_numbers(axes: Axes, matrix: np.ndarray, mesh: Any) -> None:
    digits = 0 if np.nanmax(np.abs(matrix)) >= 100 else 1 if np.nanmax(np.abs(matrix)) >= 10 else 2
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            dark = sum(mesh.cmap(mesh.norm(value))[:3]) < 1.5
            shade = "#ffffff" if dark else "#000000"
            axes.text(column + 0.5, row + 0.5, f"{value:.{digits}f}", ha="center", va="center", fontsize=8, color=shade)
